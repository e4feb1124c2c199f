"""A wall clock that is set shortens no hold, ends no bake and delays no rollback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.rollout.clock import Uptime, find_step, read_uptime
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request

SLOW = POLICY.replace("share: 0, rung: medium}", "share: 0, rung: medium, hold_min: 30s}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


class Machine:
    """A machine whose wall clock may be set, and whose uptime may not."""

    def __init__(self, store: Store, policy: str) -> None:
        self.store, self.up_s, self.set_s, self.boot = store, 0.0, 0.0, "one"
        start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT)

    def live(self, seconds: int, *, traffic: bool = True) -> list[str]:
        """Good sessions and one tick a second, each of a controller just started; the kinds of the log."""
        for _ in range(seconds):
            now_s = START_S + self.up_s + self.set_s
            for i in range(8 if traffic else 0):
                number = int(self.up_s) * 8 + i
                self.store.add_request(make_request(number, at_s=now_s, share=0.5))
                self.store.add_audit(make_audit(number, at_s=now_s))
            options = RunnerOptions("a", uptime=lambda: Uptime(self.boot, self.up_s))
            result = RolloutRunner.open(self.store, ROLLOUT, options).tick(now_s)
            assert result.error == ""
            self.up_s += 1
        return [event.kind for event in EventLog(self.store).read(ROLLOUT)]


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, 25.0, -7.0])
def test_a_clock_that_is_set_changes_no_hold(store: Store, step_s: float) -> None:
    """Ten seconds into a hold of thirty the clock is set: the hold ends twenty seconds later all the same."""
    machine = Machine(store, SLOW)
    machine.live(10)
    machine.set_s = step_s

    assert "advance" not in machine.live(20)
    kinds = machine.live(3)

    assert (kinds.count("clock"), "advance" in kinds) == (1, True)
    assert EventLog(store).verify() == len(kinds)


def test_a_clock_that_is_set_forward_does_not_hasten_the_rollback_of_silence(store: Store) -> None:
    """After 90 s without news the policy rolls back, counted in seconds that have passed."""
    machine = Machine(store, POLICY.replace("grace: 60s, after: 300s", "grace: 60s, after: 90s"))
    machine.live(2)
    machine.live(30, traffic=False)
    machine.set_s = 3600.0

    assert "rollback" not in machine.live(55, traffic=False)
    assert "rollback" in machine.live(10, traffic=False)


def test_after_a_reboot_a_clock_before_the_newest_event_is_wrong() -> None:
    """Nobody knows how long it was away, so no time has passed; a later clock is believed."""
    kept = {"boot": "one", "seconds": 500.0}

    assert find_step(1000.0, kept, 900.0, Uptime("two", 3.0)) == -100.0
    assert find_step(1000.0, kept, 4600.0, Uptime("two", 3.0)) == 0.0
    assert find_step(1000.0, None, 4600.0, None) == 0.0
    assert find_step(1000.0, kept, 1010.4, Uptime("one", 510.0)) == 0.0  # slewed, not set


def test_the_uptime_of_this_machine_runs_on() -> None:
    """The real clock: one boot, never backwards."""
    first, second = read_uptime(), read_uptime()

    assert first is not None
    assert second is not None
    assert (first.boot, first.seconds <= second.seconds) == (second.boot, True)
