"""The wheel alone, in a new environment, with what a plain `pip install` brings: a policy author's install.

It takes about half a minute, most of it pip's, and needs a package index; without one it skips and says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn

from sentei.monitors.store import Store
from sentei.pipeline.cli.app import app
from sentei.pipeline.cli.output import ExitCode
from sentei.serving.front.access import Operator, OperatorBook, Role
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.rollout.operations import add_admin_routes
from sentei.serving.settings import Limits
from tests.fakes_serving import MODEL, FakeTokenizer, FakeVariant
from tests.machine import free_port, wait_for
from tests.old_store import build_old_store

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "policies", "monitors", "pipeline", "serving")
WITHOUT_EXTRAS = (
    "policy lint",
    "policy explain",
    "policy schema",
    "policy simulate",
    "policy replay",
    "rollout ",
    "store ",
    "report",
    "doctor",
)
OFFLINE = ("NewConnectionError", "ConnectTimeoutError", "Temporary failure in name resolution")
TOO_HEAVY = {"torch", "ray", "transformers", "mlflow", "evidently", "triton", "pandas", "plotly", "pyarrow"}
LINT_S = 1.0
RUNS = 7
TOKEN = "a-token-of-tests"


class Light:
    """A virtual environment with the wheel and nothing else of ours."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.wheel, self.folder = wheel, folder
        self.python = folder / "env" / "bin" / "python"

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run its `sentei` in a folder that is not the repository."""
        return self.call(str(self.python.with_name("sentei")), *words, **variables)

    def seconds(self, *words: str) -> float:
        """The quickest of some runs of a program of the environment."""
        timings = []
        for _ in range(RUNS):
            began_s = time.perf_counter()
            done = self.call(str(self.python.with_name(words[0])), *words[1:])
            timings.append(time.perf_counter() - began_s)
            assert done.returncode == 0, done.stderr
        return min(timings)

    def call(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program as a shell elsewhere would: with a home of its own and nothing of this Python."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        place = {**kept, "SENTEI_HOME": str(self.folder / "home"), "COLUMNS": "200", **variables}
        return subprocess.run(words, env=place, cwd=self.folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    """Build the wheel from a copy of the sources, and install it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("src", *FOLDERS):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    found = Light(next(folder.glob("*.whl")), folder)
    venv.create(folder / "env", with_pip=True)
    pip(str(found.python), "install", str(found.wheel))
    return found


def pip(python: str, *words: str) -> None:
    """Run pip; skips where no index can be reached."""
    done = subprocess.run(
        [python, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode and any(word in done.stderr for word in OFFLINE):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_the_folders(light: Light) -> None:
    """Templates, examples, weights and data as well as modules; pages for developers stay behind."""
    expected = {
        f"sentei/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"
    }
    with zipfile.ZipFile(light.wheel) as packed:
        held = set(packed.namelist())

    assert expected - held == set()


def test_nothing_heavy_comes_with_it(light: Light) -> None:
    """Of the packages of extras none is there."""
    listed = light.call(str(light.python), "-m", "pip", "list", "--format", "json")

    assert TOO_HEAVY & {row["name"].lower() for row in json.loads(listed.stdout)} == set()


def test_policies_are_linted_explained_simulated(light: Light) -> None:
    """Every shipped example, out of the wheel."""
    where = "import sentei.policies; print(sentei.policies.__path__[0])"
    examples = Path(light.call(str(light.python), "-c", where).stdout.strip()) / "examples"
    policies = sorted(examples.glob("*.yaml"))
    assert light.folder in examples.parents
    assert len(policies) >= 7

    for policy in policies:
        assert json.loads(light.run("policy", "lint", "--json", str(policy)).stdout)["ok"], policy
    explained = light.run("policy", "explain", str(policies[0]), "--out", "page.html")
    simulated = light.run(
        "policy", "simulate", "--scenario", "aa", "--rollouts", "5", "--sessions", "50", "--json"
    )

    assert explained.returncode == ExitCode.OK, explained.stderr
    assert "<svg" in (light.folder / "page.html").read_text(encoding="utf-8")
    assert json.loads(simulated.stdout)[0]["scenario"] == "aa", simulated.stderr
    assert json.loads(light.run("policy", "schema").stdout)["type"] == "object"
    assert light.run("doctor").returncode in (ExitCode.OK, ExitCode.FAILED)
    assert "policy" in light.run("--help").stdout


def test_a_recorded_rollout_is_replayed(light: Light) -> None:
    """From an older store that somebody copied here: upgraded by the migrations of the wheel, and checked."""
    url = f"sqlite:///{light.folder}/state.db"
    build_old_store(url)
    policy = str(ROOT / "policies" / "examples" / "fast-staging.yaml")

    refused = light.run("policy", "replay", policy, "failed", "--store", url)
    upgraded = light.run("store", "upgrade", "--store", url)
    checked = light.run("store", "check", "--store", url)
    done = light.run("policy", "replay", policy, "failed", "--store", url, "--json")

    assert refused.returncode == ExitCode.UNREACHABLE
    assert "sentei store upgrade --store" in refused.stderr
    assert (upgraded.returncode, checked.returncode) == (0, 0), upgraded.stderr + checked.stdout
    assert json.loads(done.stdout)["rollout_id"] == "failed", done.stderr


def test_a_rollout_is_steered_from_it(light: Light, tmp_path: Path) -> None:
    """Start, status, pause and history go over HTTP to an app that runs elsewhere."""
    policy = str(ROOT / "policies" / "examples" / "demo.yaml")
    with serve_operations(tmp_path) as url:
        place = {"SENTEI_URL": url, "SENTEI_ADMIN_TOKEN": TOKEN}
        started = light.run("rollout", "start", policy, "--json", **place)
        assert started.returncode == ExitCode.OK, started.stderr
        paused = light.run("rollout", "pause", "--reason", "lunch", **place)
        listed = light.run("rollout", "list", "--json", **place)

    assert paused.returncode == ExitCode.OK, paused.stderr
    assert [one["rollout_id"] for one in json.loads(listed.stdout)["rollouts"]] == [
        json.loads(started.stdout)["rollout_id"]
    ]


@contextmanager
def serve_operations(folder: Path) -> Iterator[str]:
    """The real operations API over HTTP on loopback, with fakes for the variants behind it."""
    port = free_port()
    with Store.open(f"sqlite:///{folder / 'state.db'}") as store:
        variants = {"dense": FakeVariant("dense"), "sparse": FakeVariant("sparse")}
        gateway = Gateway(
            variants,
            store,
            tokenizer=FakeTokenizer(),
            model_name=MODEL,
            limits=Limits(poll_every_s=60),
            note="",
        )
        api = build_api(gateway)
        operator = Operator(
            name="admin", token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest(), role=Role.APPROVE
        )
        add_admin_routes(api, gateway, store, operators=OperatorBook([operator]))
        server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error"))

        async def serve() -> None:
            for name in variants:
                await gateway.introduce_once(name)
            await server.serve()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            wait_for(lambda: bool(server.started), "the operations API listens")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def leaves() -> Iterator[tuple[str, ...]]:
    """Every command with an argument for each place that must have one."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while pending:
        words, command = pending.pop()
        if inner := getattr(command, "commands", None):
            pending += [((*words, name), found) for name, found in inner.items()]
            continue
        required = [param for param in command.params if param.required]
        given = [word for param in required for word in (*param.opts[:1] * is_option(param), "x")]
        yield (*words, *given)


def is_option(param: Any) -> bool:
    """Whether a parameter is given by name."""
    return str(param.opts[0]).startswith("-")


def test_what_needs_an_extra_says_so_in_one_line(light: Light) -> None:
    """All commands but those of a policy author: no traceback, no usage text, and what to do."""
    heavy = [words for words in leaves() if not " ".join(words).startswith(WITHOUT_EXTRAS)]
    assert len(heavy) >= 13

    for words in heavy:
        done = light.run(*words)
        lines = done.stderr.strip().splitlines()
        assert (done.returncode, len(lines)) == (ExitCode.UNREACHABLE, 1), (words, done.stderr)
        assert lines[0].startswith("error: this command needs torch and"), words
        assert "pip install 'sentei[" in lines[0], words


def test_an_address_of_postgres_names_its_extra(light: Light) -> None:
    """Its driver is an extra, too."""
    done = light.run("report", "--store", "postgresql+psycopg://user@127.0.0.1/none")

    assert done.returncode == ExitCode.BAD_INPUT
    assert "pip install 'sentei[postgres]'" in done.stderr


def test_lint_is_quick(light: Light, capsys: pytest.CaptureFixture[str]) -> None:
    """In a new environment in under a second, told as a multiple of an empty Python program."""
    policy = str(ROOT / "policies" / "examples" / "cautious.yaml")

    lint_s, help_s = light.seconds("sentei", "policy", "lint", policy), light.seconds("sentei", "--help")
    empty_s = light.seconds("python", "-c", "pass")

    with capsys.disabled():
        print(
            f"\npolicy lint {lint_s:.2f} s, --help {help_s:.2f} s: {lint_s / empty_s:.0f} and "
            f"{help_s / empty_s:.0f} times `python -c pass` ({empty_s * 1000:.0f} ms; quickest of {RUNS})"
        )
    assert lint_s < LINT_S
