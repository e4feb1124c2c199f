"""Controllers that are killed, doubled or frozen: real processes on SQLite and on a real Postgres server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BAKE_S, HOLD_S, PAUSE_S = 3.0, 2.0, 2.0


@pytest.fixture(params=["sqlite", "postgres"])
def port(request: pytest.FixtureRequest) -> str:
    """The port of a real server; 0 for SQLite."""
    return "0" if request.param == "sqlite" else str(request.getfixturevalue("postgres").port)


def play(scene: str, folder: Path, port: str) -> dict[str, Any]:
    """Play one scene in a process of its own, which forks its controllers."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.kill_story", scene, str(folder), port],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kill_between_any_two_persisted_steps_changes_nothing(tmp_path: Path, port: str) -> None:
    """SIGKILL inside and after each write of a whole rollout: same state bytes, same deeds, same times."""
    found = play("kill", tmp_path, port)

    kinds = [kind for _, kind, _ in found["deeds"]]
    assert kinds == ["started", "advance", "pause", "resume", "edit", "advance", "promote"]
    assert found["points"] == 2 * sum(found["writes"]) > 50
    assert found["wrong"] == []
    # No time in hold is lost or gained: the pause is not counted, each wait is as long as the policy says.
    at = {kind: (at_s, json.loads(state)) for at_s, kind, state in found["deeds"]}
    assert at["resume"][1]["stage_entered_s"] == found["deeds"][1][0] + PAUSE_S
    assert at["promote"][0] == at["promote"][1]["stage_entered_s"] + BAKE_S
    assert at["promote"][1]["outcome"] == "promoted"


def test_of_two_controllers_one_acts(tmp_path: Path, port: str) -> None:
    """Two processes tick at once: one obeys the pause, and when it is killed the other obeys the abort."""
    found = play("pair", tmp_path, port)

    leader, follower = found["leader"], 1 - found["leader"]
    assert (found["codes"][leader], found["codes"][follower]) == (-9, 0)
    assert found["follower_acted_before_s"] == []
    assert 0 < found["taken_over_after_s"] < 2.5  # the lease is 1 s
    assert found["errors"] == []
    assert [kind for kind, _ in found["events"] if kind != "hold"] == ["started", "pause", "rollback"]
    tokens = [token for _, token in found["events"]]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == 2
    assert found["length"] == len(found["events"])


def test_a_frozen_controller_cannot_write_when_it_wakes_up(tmp_path: Path, port: str) -> None:
    """Stopped after it took the lease, outlived by it, woken: the fence refuses its event and its routes."""
    found = play("stop", tmp_path, port)

    assert found["code"] == 0  # it met StaleLeaseError, and nothing else
    assert found["other"] == "rollback"
    assert found["kinds"].count("rollback") == 1
    assert found["length"] == len(found["kinds"])
    assert found["renewals"] == 2
