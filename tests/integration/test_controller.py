"""The controller keeps the policy's pace: one check per `check_every`, orders and errors at the next look."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.errors import StoreError
from sentei.pipeline.integrations.calls import Secrets
from sentei.pipeline.integrations.gatekeeper import GateKeeper
from sentei.pipeline.integrations.prometheus import MetricReader
from sentei.pipeline.rollout.runner import start_rollout
from sentei.serving.rollout.controller import Controller
from tests.fakes_records import POLICY, ROLLOUT, FlakyStore
from tests.fakes_serving import FakeClock

SLOW = POLICY.replace("check_every: 1s", "check_every: 60s").replace(
    "monitor_lease: 3s", "monitor_lease: 90s"
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlakyStore]:
    """A store in a file of its own."""
    with FlakyStore.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def begin(store: FlakyStore, folder: Path, policy: str = SLOW) -> tuple[Controller, FakeClock]:
    """A controller that looks by hand, and its clock."""
    clock = FakeClock()
    start_rollout(store, policy, now_s=clock(), rollout_id=ROLLOUT)
    return Controller(store, mirror=None, reports=folder, clock=clock), clock


def look(controller: Controller, clock: FakeClock, seconds: int) -> int:
    """Look once a second; how many ticks that made."""
    before = controller.num_ticks
    for _ in range(seconds):
        controller.tick()
        clock.now_s += 1
    return controller.num_ticks - before


def test_the_policy_says_how_often_it_is_checked(store: FlakyStore, tmp_path: Path) -> None:
    """At 60s there is one tick in ten seconds and three in two minutes and a second; at 1s there are ten."""
    controller, clock = begin(store, tmp_path)

    assert [look(controller, clock, seconds) for seconds in (10, 51, 60)] == [1, 1, 1]
    with FlakyStore.open(f"sqlite:///{tmp_path}/fast.db") as fast:
        assert look(*begin(fast, tmp_path, POLICY), 10) == 10


def test_an_order_does_not_wait_for_the_check(store: FlakyStore, tmp_path: Path) -> None:
    """A command or an edit is taken at the next look, once."""
    controller, clock = begin(store, tmp_path)
    look(controller, clock, 5)
    store.add_command(ROLLOUT, "pause", by="ann", at_s=clock())

    assert look(controller, clock, 5) == 1

    store.add_revision(ROLLOUT, SLOW.replace("bake: 2s", "bake: 9s"), by="ann", at_s=clock())
    assert look(controller, clock, 5) == 1


def test_a_failed_tick_is_tried_again_at_the_next_look(store: FlakyStore, tmp_path: Path) -> None:
    """Nobody waits a minute for a store that is back after a second."""
    controller, clock = begin(store, tmp_path)
    controller.tick()
    clock.now_s += 60
    store.calls_until_failure = 3  # beyond the two reads of a look
    controller.tick()
    store.calls_until_failure = None

    assert "planted failure" in controller.last_error
    assert look(controller, clock, 5) == 1
    assert controller.last_error == ""


def test_the_pace_runs_by_a_clock_that_nobody_sets(store: FlakyStore, tmp_path: Path) -> None:
    """A wall clock that steps back an hour delays no check, and one that steps forward brings none early."""
    clock, monotonic = FakeClock(), FakeClock()
    start_rollout(store, SLOW, now_s=clock(), rollout_id=ROLLOUT)
    controller = Controller(store, mirror=None, reports=tmp_path, clock=clock, monotonic=monotonic)
    look(controller, monotonic, 1)

    for step_s in (-3600, 7200):
        clock.now_s += step_s
        assert look(controller, monotonic, 58) == 0
        assert look(controller, monotonic, 2) == 1


def test_a_policy_that_checks_more_often_than_the_app_looks_is_obeyed(
    store: FlakyStore, tmp_path: Path
) -> None:
    """At `check_every: 100ms` an app that looks every ten seconds looks as often as the policy says."""

    async def run() -> int:
        start_rollout(
            store, POLICY.replace("check_every: 1s", "check_every: 100ms"), now_s=0.0, rollout_id=ROLLOUT
        )
        controller = Controller(store, mirror=None, reports=tmp_path)
        controller.start(tick_every_s=10, drift_every_s=60, mirror_every_s=60)
        controller.tick()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if controller.num_ticks >= 5:
                break
        controller.stop()
        return controller.num_ticks

    assert asyncio.run(run()) >= 5


@pytest.mark.parametrize("asks", [False, True])
def test_who_asks_nobody_reads_nothing_for_it(store: FlakyStore, tmp_path: Path, asks: bool) -> None:
    """A policy with neither a gate nor a metric of its own costs no read beside the tick's, any second."""
    policy = POLICY
    if asks:
        gate = "approval: {webhook: {id: ci, url: 'http://127.0.0.1:9/gate'}}"
        item = "{id: cart, url: 'http://127.0.0.1:9', query: up, bound: {max: 1}, window: 5m}"
        policy = POLICY.replace("share: 50%, rung: medium}", f"share: 50%, rung: medium, {gate}}}")
        policy = policy.replace("  guardrails:\n", f"  guardrails:\n    prometheus: [{item}]\n")
    clock, secrets = FakeClock(), Secrets(tmp_path, {})
    start_rollout(store, policy, now_s=clock(), rollout_id=ROLLOUT)
    controller = Controller(
        store,
        mirror=None,
        reports=tmp_path,
        clock=clock,
        gatekeeper=GateKeeper(store, secrets),
        metric_reader=MetricReader(store, secrets),
    )
    controller.tick()

    for ask in (controller.ask_gate, controller.read_metrics):
        store.calls_until_failure = 0
        if asks:
            with pytest.raises(StoreError, match="planted failure"):
                ask()
        else:
            ask()
