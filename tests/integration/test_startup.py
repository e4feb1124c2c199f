"""A start that fails or takes long: tried again, told of, and ended with its cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sentei.pipeline.demo import local_server
from sentei.pipeline.demo.local_server import LocalServer, ServerError
from sentei.serving import local
from sentei.serving.errors import StartError
from sentei.serving.startup import StartUp, cause_of, missing

# Importing Ray Serve warns inside pydantic; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


class Flaky:
    """Fails so often, then works."""

    def __init__(self, num_failures: int) -> None:
        self.left = num_failures
        self.undone = 0

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise RuntimeError("\nThe actor died: killed by ray.kill\nmore")
        return "up"

    def undo(self) -> None:
        self.undone += 1


def test_failed_start_is_tried_again() -> None:
    """What failed is put away, told of, and tried again."""
    said: list[str] = []
    work = Flaky(2)

    found = StartUp(said.append).again("Serve's proxy", work, catch=(RuntimeError,), undo=work.undo)

    assert (found, work.undone) == ("up", 2)
    assert said[0] == "waiting for Serve's proxy"
    assert said[1].startswith("Serve's proxy failed in try 1 of 5 (RuntimeError: The actor died")


def test_start_that_never_works_names_its_cause() -> None:
    """The last try's own words are in the error."""
    with pytest.raises(StartError, match=r"Ray did not start in 5 tries.*killed by ray\.kill"):
        StartUp(lambda _: None).again("Ray", Flaky(99), catch=(RuntimeError,))


def test_node_that_is_slow_to_come_up_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says so by a bare Exception; what such a try has left, and no more, is ended before the next."""
    left: list[subprocess.Popen[bytes]] = []
    callers_own = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def start_ray(_: str) -> None:
        left.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(local, "_start_ray", start_ray)

    with (
        pytest.raises(StartError, match=r"Ray did not start in 5 tries.*timed out during startup"),
        local.running_app(local.LocalOptions(model="pocket")),
    ):
        pass

    is_spared = callers_own.poll() is None
    callers_own.kill()
    callers_own.wait(10)
    assert len(left) == 5
    assert all(process.poll() is not None for process in left)
    assert is_spared, "what ran before the start is the caller's"
    for process in (*left, callers_own):
        assert process.stdin is not None
        process.stdin.close()


def test_wrong_settings_are_not_tried_again() -> None:
    """An error of another kind goes through at once."""
    with pytest.raises(RuntimeError):
        StartUp(lambda _: None).again("Ray", Flaky(99), catch=(TimeoutError,))


def test_parts_that_are_not_up_are_named() -> None:
    """Whoever waits reads for what; healthy parts are not named."""
    parts = {"Dense": ("UPDATING", ""), "Ingress": ("HEALTHY", "")}

    assert missing(parts) == "Dense (updating)"
    assert missing({}) == "the app"


def test_cause_is_the_last_line_of_a_failed_part() -> None:
    """Of Serve's words and a traceback the error itself is left."""
    message = (
        "The deployment failed to start 3 times\nTraceback:\n  File x\nConfigError: adapter is 'a', gone\n"
    )
    parts = {"Sparse": ("DEPLOY_FAILED", message), "Dense": ("UPDATING", "x"), "Ingress": ("HEALTHY", "")}

    assert cause_of(parts) == "Sparse: ConfigError: adapter is 'a', gone"


def test_server_that_never_answers_says_what_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the app learns what it waited for last."""
    monkeypatch.setattr(local_server, "READY_TIMEOUT_S", 1.0)
    server = LocalServer({}, tmp_path, environment={})
    server.log_path.write_text("a line", encoding="utf-8")
    server._answers.put({"waiting": "waiting for Dense (updating)"})
    server._process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True, start_new_session=True
    )

    with pytest.raises(ServerError, match=r"last: waiting for Dense \(updating\); .*server\.log"):
        server._wait_for_url()

    server.stop()
