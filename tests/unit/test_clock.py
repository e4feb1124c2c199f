"""Time that does not step, and a controller that counts holds by it."""

from __future__ import annotations

from pathlib import Path

from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.serving.clock import SteadyClock
from sentei.serving.rollout.controller import Controller
from tests.fakes_records import POLICY
from tests.fakes_serving import FakeClock

START_S = 1_000_000.0


def steady(wall: FakeClock, monotonic: FakeClock) -> SteadyClock:
    """A clock over two that tests move."""
    wall.now_s = START_S
    return SteadyClock(wall, monotonic)


def test_steps_of_the_wall_clock_do_not_reach_it() -> None:
    """Ten seconds are ten seconds, whether the wall clock stepped an hour ahead or back."""
    wall, monotonic = FakeClock(), FakeClock()
    clock, times = steady(wall, monotonic), list[float]()

    for step_s in (0.0, 3600.0, -7200.0):
        wall.now_s += step_s
        monotonic.now_s += 10.0
        times.append(clock())

    assert times == [START_S + 10, START_S + 20, START_S + 30]


def test_it_starts_after_what_was_written_before() -> None:
    """A process that starts after a step back goes on where the log ended."""
    clock = steady(FakeClock(), FakeClock())

    clock.not_before(START_S - 50.0)
    unmoved = clock()
    clock.not_before(START_S + 3600.0)

    assert (unmoved, clock()) == (START_S, START_S + 3600.0)


def test_step_neither_ends_a_lease_nor_a_hold_of_a_running_controller(tmp_path: Path) -> None:
    """Each tick of a controller whose wall clock jumps about stamps one second after the one before."""
    wall, monotonic = FakeClock(), FakeClock()
    clock = steady(wall, monotonic)
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, POLICY, now_s=START_S, rollout_id="r1")
        controller = Controller(store, mirror=None, reports=tmp_path, clock=clock)
        for step_s in (0.0, 3600.0, -9000.0, 86_400.0):
            wall.now_s += step_s
            monotonic.now_s += 1.0
            controller.tick()
        state = RolloutRunner.open(store, "r1", RunnerOptions("other")).state()

    assert state is not None
    assert (controller.last_error, state.waits_for, state.phase) == ("", "time", "running")
    assert clock() == START_S + 4


def test_controller_that_restarts_after_a_step_back_does_not_go_back(tmp_path: Path) -> None:
    """Holds of before the restart are not lengthened by the hour that the clock lost."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, POLICY, now_s=START_S, rollout_id="r1")
        Controller(store, mirror=None, reports=tmp_path, clock=steady(FakeClock(), FakeClock())).tick()
        wall = FakeClock()
        wall.now_s = START_S - 3600.0
        clock = SteadyClock(wall, FakeClock())

        Controller(store, mirror=None, reports=tmp_path, clock=clock).tick()

    assert clock() == START_S
