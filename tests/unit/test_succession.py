"""One rollout after another: a promoted one is not dropped without a word, and of two starts one wins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.reports.rollout_report import build_report
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.pipeline.rollout.succession import StartRefusedError
from sentei.pipeline.tracking.mirror import Mirror
from sentei.policies.state import state_from_json
from tests.fakes_records import POLICY, ROLLOUT, START_S, FakeTracker
from tests.stories_rollout import begin, run, serve

LATER_S = START_S + 100


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def kinds(store: Store, rollout_id: str) -> list[str]:
    """The events of a rollout."""
    return [event.kind for event in EventLog(store).read(rollout_id)]


def test_a_promoted_rollout_is_not_dropped_without_a_word(store: Store) -> None:
    """A start over it is refused: it says what would end, and how to ask for it."""
    run(store, 15)

    with pytest.raises(StartRefusedError, match=r"sends 95% of long at rung medium.*--replace") as caught:
        start_rollout(store, POLICY, now_s=LATER_S, rollout_id="r2")

    assert caught.value.can_replace
    assert [item.rollout_id for item in store.read_rollouts()] == [ROLLOUT]


def test_a_replaced_rollout_is_closed_in_the_log(store: Store) -> None:
    """Its last event names who took its place; nothing decides for it any more."""
    run(store, 15)
    about = {"started_by": "ann"}
    start_rollout(store, POLICY, now_s=LATER_S, rollout_id="r2", about=about, replaces=True)

    results = [RolloutRunner.open(store, "r2", RunnerOptions("a")).tick(LATER_S + i) for i in range(2)]
    stale = RolloutRunner.open(store, ROLLOUT, RunnerOptions("a")).tick(LATER_S + 3)

    assert [result.error for result in results] == ["", ""]
    assert kinds(store, ROLLOUT)[-2:] == ["promote", "close"]
    last = EventLog(store).latest(ROLLOUT)
    assert last is not None
    state = state_from_json(last.state)
    assert (state.outcome, state.by) == ("replaced", "rollout:r2")
    assert state.reason == "replaced by rollout r2, started by ann; it was promoted"
    assert "is over: replaced by rollout r2" in stale.error
    routing = store.read_routing()
    assert routing is not None
    assert (routing[0].rollout_id, routing[0].routes[0].share) == ("r2", 0.0)
    assert EventLog(store).verify() > 0


def test_a_replaced_rollout_is_told_as_such(store: Store) -> None:
    """The report says that its share has ended, and its run in MLflow is no failure."""
    run(store, 15)
    start_rollout(store, POLICY, now_s=LATER_S, rollout_id="r2", replaces=True)
    RolloutRunner.open(store, "r2", RunnerOptions("a")).tick(LATER_S)
    tracker = FakeTracker()

    assert Mirror(store, tracker).run_once().reason == ""

    report = build_report(store, ROLLOUT)
    assert (report.outcome, report.share_now, report.share_peak) == ("replaced", 0.0, 0.95)
    old = tracker.runs[f"sentei-rollouts/rollout:{ROLLOUT}"]
    assert (old["status"], old["tags"]["outcome"]) == ("FINISHED", "replaced")


@pytest.mark.parametrize(("seconds", "phase"), [(0, "waiting"), (1, "running")])
def test_a_rollout_that_is_not_over_stands_in_the_way(store: Store, seconds: int, phase: str) -> None:
    """Also one that no controller has taken up yet; `replaces` is for promoted ones only."""
    runner = begin(store)
    for second in range(seconds):
        serve(store, second)
        runner.tick(START_S + second)

    with pytest.raises(StartRefusedError, match=f"'{ROLLOUT}' is {phase}.*; abort it first"):
        start_rollout(store, POLICY, now_s=LATER_S, rollout_id="r2", replaces=True)


def test_of_two_starts_at_once_one_wins(tmp_path: Path) -> None:
    """Eight threads start a rollout in the same moment, half of them by name: seven are told."""
    url, told, won = f"sqlite:///{tmp_path}/state.db", [], []
    gate = threading.Barrier(8)

    def start(i: int) -> None:
        with Store.open(url) as own:
            gate.wait()
            try:
                won.append(start_rollout(own, POLICY, now_s=START_S, rollout_id=f"r{i}" if i % 2 else None))
            except StartRefusedError as error:
                told.append(str(error))

    Store.open(url).close()
    threads = [threading.Thread(target=start, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with Store.open(url) as store:
        assert len(store.read_rollouts()) == len(won) == 1
    assert len(told) == 7
    assert all("abort it first" in text for text in told)
