"""Every error of ours has one root, and the command line turns each into one line and an exit code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sentei.errors import SenteiError
from sentei.pipeline.cli.app import run
from sentei.pipeline.cli.output import ExitCode

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "policies", "monitors", "pipeline", "serving")
DEMO_POLICY = str(ROOT / "policies" / "examples" / "demo.yaml")


def own_errors() -> dict[str, set[str]]:
    """The bases of every public error class of ours, read from the source: importing all would take Ray."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name[0] != "_":
                found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    return found


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line as a process would; return its exit code."""
    monkeypatch.setattr("sys.argv", ["sentei", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0)


def test_every_error_of_ours_has_one_root() -> None:
    """Whoever adds an error puts it into a tree, so that the command line knows it."""
    classes = own_errors()

    loose = [name for name, bases in classes.items() if not bases & {SenteiError.__name__, *classes}]

    assert len(classes) > 30
    assert loose == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["register"], ExitCode.BAD_INPUT, "sentei distill"),
        (["report"], ExitCode.UNREACHABLE, "is not there"),
        (["report", "--store", "sqlite:////nowhere/state.db"], ExitCode.UNREACHABLE, "is not there"),
        (["report", "--store", "nonsense"], ExitCode.BAD_INPUT, "store URL"),
        (["policy", "replay", DEMO_POLICY], ExitCode.UNREACHABLE, "is not there"),
        (
            ["explain", DEMO_POLICY, "--model", "/nowhere/it's"],
            ExitCode.UNREACHABLE,
            "/nowhere/it's",
        ),
        (["distill", "--corpus", "/nowhere/a.txt"], ExitCode.BAD_INPUT, "/nowhere/a.txt"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: ExitCode,
    words: str,
    *,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad input is 2, what is not there is 3, and neither is a traceback or makes a database."""
    monkeypatch.setenv("SENTEI_HOME", str(tmp_path / "it's home"))
    monkeypatch.setenv("COLUMNS", "1000")

    assert call(monkeypatch, *arguments) == code

    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]
    assert said[-1].startswith("error: ")
    assert not list(tmp_path.rglob("state.db"))


def test_an_error_of_any_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The root alone decides: no class needs to be known to the command line."""

    class AbsentError(SenteiError):
        is_absent = True

    def fail() -> None:
        raise AbsentError("the thing is away; bring it back")

    monkeypatch.setattr("sentei.pipeline.cli.app.app", fail)

    assert call(monkeypatch) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.strip() == "error: the thing is away; bring it back"


def test_windows_too_short_for_questions_name_the_option() -> None:
    """`distill --tokens 256` says which option is too small, not a number that nobody gave."""
    from sentei.pipeline.measure.texts import make_texts
    from sentei.pipeline.models import resolve_model
    from sentei.pipeline.tasks.prompt import TaskError
    from sentei.pipeline.text.corpus import load_corpus

    with pytest.raises(TaskError, match=r"windows of 256 tokens \(--tokens\) are too short"):
        make_texts(resolve_model("pocket"), load_corpus().documents, window_tokens=256, num=2, seed=0)
