"""The command line: errors are one readable line and an exit code, documents are JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sentei.pipeline.cli.app import app, run
from sentei.pipeline.cli.extras import MissingExtraError, check_extras, packages_of
from sentei.pipeline.cli.output import ExitCode
from sentei.pipeline.rollout.client import AdminClient, AdminError
from tests.strategies_policy import TWO_SLICES

ROOT = Path(__file__).resolve().parents[2]
DEMO_POLICY = ROOT / "policies" / "examples" / "demo.yaml"


def test_lint_accepts_a_shipped_policy() -> None:
    """`policy lint --json` of a good policy prints one document that says ok, and exits with 0."""
    done = CliRunner().invoke(app, ["policy", "lint", str(DEMO_POLICY), "--json"])

    assert done.exit_code == ExitCode.OK
    assert json.loads(done.stdout)["ok"] is True


def test_a_policy_that_can_never_end_is_not_green(tmp_path: Path) -> None:
    """A slice that no guardrail gives units: the first word and the exit code say no."""
    document = yaml.safe_load(TWO_SLICES)
    spec = document["spec"]
    spec["stages"] = spec["stages"][1:2] + spec["stages"][3:]
    spec["stages"][1]["rung"] = "mild"
    spec["guardrails"]["items"] = [spec["guardrails"]["items"][2] | {"advance": "all_safe"}]
    spec["signals"] = []
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(document), encoding="utf-8")

    done = CliRunner().invoke(app, ["policy", "lint", str(policy)])

    assert done.exit_code == ExitCode.FAILED, done.stdout
    assert done.stdout.startswith("can never end")


def test_lint_names_the_nearest_known_key(tmp_path: Path) -> None:
    """`policy lint` of an unknown key names file, line, path and the nearest known key, and exits with 2."""
    text = DEMO_POLICY.read_text(encoding="utf-8").replace("hold_min: 2s", "hold_mim: 2s", 1)
    policy = tmp_path / "policy.yaml"
    policy.write_text(text, encoding="utf-8")

    done = CliRunner().invoke(app, ["policy", "lint", str(policy), "--json"])

    assert done.exit_code == ExitCode.BAD_INPUT
    errors = json.loads(done.stdout)["errors"]
    line = 1 + text[: text.index("hold_mim")].count("\n")
    assert any(e["line"] == line and "hold_min" in e["message"] and e["file"] == str(policy) for e in errors)


def test_missing_file_is_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is not there is one line on stderr and exit code 2, not a traceback."""
    monkeypatch.setattr("sys.argv", ["sentei", "policy", "lint", "nowhere.yaml"])

    with pytest.raises(SystemExit) as ended:
        run()

    assert ended.value.code == ExitCode.BAD_INPUT
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["policy", "lint"], ["policy", "explain"], ["rollout", "start"]])
def test_a_policy_that_is_no_utf8_names_the_file(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file saved as UTF-16 is one line with its name and exit code 2."""
    policy = tmp_path / "wide.yaml"
    policy.write_text(DEMO_POLICY.read_text(encoding="utf-8"), encoding="utf-16")
    monkeypatch.setattr("sys.argv", ["sentei", *words, str(policy)])

    with pytest.raises(SystemExit) as ended:
        run()

    assert ended.value.code == ExitCode.BAD_INPUT
    assert "wide.yaml is not UTF-8" in capsys.readouterr().err.replace("\n", "")


def test_schema_is_json() -> None:
    """`policy schema` prints a JSON Schema."""
    done = CliRunner().invoke(app, ["policy", "schema"])

    assert json.loads(done.stdout)["type"] == "object"


def test_doctor_reports_each_package() -> None:
    """`doctor --json` names what it looked at."""
    done = CliRunner().invoke(app, ["doctor", "--json"])

    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"torch", "ray", "home", "device"} <= set(checks)
    assert re.match(r"(cpu|cuda) in (float32|bfloat16): .+; this .PU ", checks["device"]["found"])


@pytest.mark.parametrize(
    "command",
    ["distill", "calibrate", "evaluate", "study", "explain x", "demo", "bench prefill", "bench decode"],
)
def test_every_offline_command_can_be_told_its_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """One option in all of them; a GPU that is not there is said before anything is loaded."""
    from sentei.kernels import placement
    from sentei.pipeline import models

    none = placement.Hardware("2.13.0", "CUDA")
    for module in (placement, models):
        monkeypatch.setattr(module, "read_hardware", lambda: none)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("text")

    done = CliRunner().invoke(app, [*command.split(), "--device", "cuda"])

    assert isinstance(done.exception, placement.DeviceError)
    assert "built for CUDA, finds no GPU" in str(done.exception)


def test_unreachable_app_names_address_and_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose app is away says which address, and how to name another."""
    import httpx

    def refuse(self: httpx.Client, *args: object, **kwargs: object) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx.Client, "request", refuse)
    client = AdminClient("http://127.0.0.1:9")

    with pytest.raises(AdminError, match=r"127\.0\.0\.1:9 .*--url") as caught:
        client.rollouts()
    client.close()
    assert caught.value.is_absent


def test_edit_prints_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rollout edit` sends the file to the newest rollout, and shows the answer."""
    sent: list[str] = []

    def take(self: AdminClient, rollout_id: str, text: str, source: str) -> dict[str, object]:
        sent.append(rollout_id)
        return {"rollout_id": rollout_id, "seq": 3, "changes": ["spec.stages[c50].share: 0.5 -> 0.1"]}

    monkeypatch.setattr(AdminClient, "rollouts", lambda self: [{"rollout_id": "newest"}])
    monkeypatch.setattr(AdminClient, "edit_policy", take)

    done = CliRunner().invoke(app, ["rollout", "edit", str(DEMO_POLICY), "--json"])

    assert done.exit_code == ExitCode.OK
    assert sent == ["newest"]
    assert json.loads(done.stdout)["changes"] == ["spec.stages[c50].share: 0.5 -> 0.1"]


def test_lint_says_how_long_a_policy_takes() -> None:
    """`policy lint --json` gives durations, what each stage needs, and warnings with their line."""
    arguments = [
        "policy",
        "lint",
        str(DEMO_POLICY),
        "--sessions-per-hour",
        "3600",
        "--mix",
        "long=1",
        "--json",
    ]

    found = json.loads(CliRunner().invoke(app, arguments).stdout)

    assert found["ok"] is True
    assert found["duration_best"] == "128s"
    assert found["duration_worst"] == "unbounded"
    assert [stage["needs"][0]["audits"] for stage in found["stages"]] == [32, 39, 32, 39]
    lines = DEMO_POLICY.read_text(encoding="utf-8").splitlines()
    assert all(str(item["value"]) in lines[item["line"] - 1] for item in found["warnings"])


@pytest.mark.parametrize("mix", ["long", "short=1", "long=x"])
def test_a_mix_that_cannot_be_read_is_bad_input(mix: str) -> None:
    """`--mix` must name exactly the routed slices, each with a number."""
    done = CliRunner().invoke(app, ["policy", "lint", str(DEMO_POLICY), "--mix", mix])

    assert isinstance(done.exception, ValueError)
    assert "long" in str(done.exception)


def test_explain_draws_and_tells(tmp_path: Path) -> None:
    """`policy explain` writes a page with the stages as a picture and every sentence."""
    page = tmp_path / "demo.html"

    done = CliRunner().invoke(app, ["policy", "explain", str(DEMO_POLICY), "--out", str(page), "--json"])

    found = json.loads(done.stdout)
    html = page.read_text(encoding="utf-8")
    assert "<svg" in html
    assert "shadow-bold" in html
    assert html.count("<li>") >= len(found["sentences"]) > 10


def test_an_unknown_scorer_form_is_bad_input() -> None:
    """`distill --form` names the forms that exist, before anything is loaded."""
    done = CliRunner().invoke(app, ["distill", "--form", "cubic"])

    assert done.exit_code == ExitCode.BAD_INPUT
    assert "choose from residual, low_rank" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["evaluate", "--only", "speed"], "choose from recall"),
        (["evaluate", "--only", "recall", "--timed-runs", "2"], "--compare, --timed-runs"),
        (["calibrate", "--missed-needles", "0.1"], "belongs to --density, --nll and --speed"),
    ],
)
def test_what_does_not_go_together_is_said_before_a_model_is_loaded(options: list[str], words: str) -> None:
    """The message names the options."""
    done = CliRunner().invoke(app, options)

    assert done.exit_code == ExitCode.BAD_INPUT
    assert words in " ".join(done.output.replace("\u2502", " ").split())


def test_an_extra_is_what_the_metadata_lists_for_it() -> None:
    """Extras inside extras are followed, and what only some platforms want is left out."""
    lines = [
        "pydantic<3,>=2.13",
        'torch<2.14,>=2.13; extra == "model"',
        'triton<3.8; (platform_system == "Linux" and platform_machine in "x86_64") and extra == "model"',
        'sentei[model,small]; extra == "serve"',
        'ray[serve]<2.61,>=2.60; extra == "serve"',
        'psutil; extra == "small"',
        "plotly<6; extra == 'train'",
    ]

    assert list(packages_of(lines, "serve")) == ["torch", "psutil", "ray"]
    assert list(packages_of(lines, "train")) == ["plotly"]
    assert list(packages_of(lines, "nothing")) == []


def test_a_missing_extra_is_told_with_its_command() -> None:
    """Whatever this environment has, an extra that nobody installs together is named by what is away."""
    with pytest.raises(
        MissingExtraError, match=r"this command needs .+: pip install 'sentei\[both\]'"
    ) as caught:
        check_extras("both", requirements=['no-such-package>=1; extra == "both"', 'pytest; extra == "both"'])

    assert "no-such-package, not installed here" in str(caught.value)
    assert caught.value.is_absent
