"""Time that does not step, and a controller that counts holds by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sentei.monitors.clock import SteadyClock
from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.serving.rollout.controller import Controller
from tests.fakes_records import POLICY, make_audit, make_request
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


@pytest.mark.parametrize("step_s", [-90_000.0, -3600.0, 40.0, 3600.0, 90_000.0])
def test_processes_of_one_machine_share_their_time_across_restarts_and_steps(
    tmp_path: Path, step_s: float
) -> None:
    """Whoever starts after a step of the wall clock goes on where the machine's monotonic clock is."""
    wall, monotonic = FakeClock(), FakeClock()
    wall.now_s = START_S
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        first = store.clock(wall, monotonic, "boot-1")
    wall.now_s += step_s + 7.0
    monotonic.now_s += 7.0
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        second = store.clock(wall, monotonic, "boot-1")
        store.add_request(make_request(1, at_s=second()))
        kept = store.read_requests("r1")[0]["at_s"]

    assert (first(), second(), kept) == (START_S + 7.0,) * 3


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_step_across_a_restart_ends_no_hold_and_no_bake(tmp_path: Path, step_s: float) -> None:
    """The hold of the last stage has its ten minutes, whatever the wall clock says after the restart."""
    wall, monotonic = FakeClock(), FakeClock()
    wall.now_s = START_S
    text = POLICY.replace("bake: 2s", "bake: 10m").replace(
        "share: 0, rung: medium", "share: 0, rung: medium, hold_min: 10m"
    )
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, text, now_s=START_S, rollout_id="r1")
        Controller(
            store, mirror=None, reports=tmp_path, clock=store.clock(wall, monotonic, "b"), machine="b"
        ).tick()
        wall.now_s += step_s + 60.0
        monotonic.now_s += 60.0
        clock = store.clock(wall, monotonic, "b")
        controller = Controller(store, mirror=None, reports=tmp_path, clock=clock, machine="b")
        for i in range(40):
            store.add_audit(make_audit(i, at_s=clock(), variant_served="dense"))
        controller.tick()
        state = RolloutRunner.open(store, "r1", RunnerOptions("other")).state()
        assert state is not None
        assert (state.stage_id, clock() - state.stage_entered_s) == ("shadow", 60.0)
        monotonic.now_s += 545.0
        store.add_request(make_request(99, at_s=clock(), chosen_for_audit=False))
        controller.tick()
        state = RolloutRunner.open(store, "r1", RunnerOptions("other")).state()

    assert state is not None
    assert state.stage_id == "half"


def test_on_another_machine_what_nobody_watched_is_no_time_of_a_hold(tmp_path: Path) -> None:
    """Where only wall clocks tell how long it was, a step of one of them must not end a hold."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, POLICY, now_s=START_S, rollout_id="r1")
        for machine, at_s in (
            ("boot-1", START_S),
            ("boot-2", START_S + 7200.0),
            ("boot-2", START_S + 7210.0),
        ):
            options = RunnerOptions(f"owner at {at_s}", machine=machine)
            assert RolloutRunner.open(store, "r1", options).tick(at_s).error == ""
        state = RolloutRunner.open(store, "r1", RunnerOptions("other")).state()
        kinds = [event.kind for event in EventLog(store).read("r1")]

    assert state is not None
    assert state.stage_entered_s == START_S + 7200.0
    assert kinds.count("take_up") == 1


def test_silence_is_not_lengthened_by_a_step_back_across_a_restart(tmp_path: Path) -> None:
    """Five silent minutes roll back after five minutes, though the wall clock lost an hour on the way."""
    wall, monotonic = FakeClock(), FakeClock()
    wall.now_s = START_S
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, POLICY, now_s=START_S, rollout_id="r1")
        for passed_s, step_s in ((0.0, 0.0), (200.0, -3600.0), (101.0, 0.0)):
            monotonic.now_s += passed_s
            wall.now_s += passed_s + step_s
            Controller(store, mirror=None, reports=tmp_path, clock=store.clock(wall, monotonic, "b")).tick()
        state = RolloutRunner.open(store, "r1", RunnerOptions("other")).state()

    assert state is not None
    assert (state.phase, state.by) == ("rolled_back", "no_data")


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
