"""The tick: the same story whatever fails between two steps, and no renewal when nothing works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.records import Rollout
from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import (
    RolloutError,
    RolloutRunner,
    RunnerOptions,
    TickResult,
    drift_specs,
    start_rollout,
)
from sentei.policies.engine import QuarantineError
from sentei.policies.schema.load import PolicyError, load_policy
from tests.fakes_records import POLICY, ROLLOUT, START_S, FlakyStore
from tests.stories_rollout import begin, run, serve


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlakyStore]:
    """A store that can be told to fail."""
    with FlakyStore.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def kinds(store: Store) -> list[str]:
    """What happened, without growing evidence and what was waited for."""
    quiet = ("evidence", "hold")
    return [event.kind for event in EventLog(store).read(ROLLOUT) if event.kind not in quiet]


def states(store: Store) -> list[str]:
    """All states to the byte, but for those that wait for a store that could not be read."""
    found = [event.state for event in EventLog(store).read(ROLLOUT)]
    return [text for text in found if json.loads(text)["waits_for"] != "data"]


def test_safe_candidate_is_promoted_stage_by_stage(store: FlakyStore) -> None:
    """Good audits lead from shadow to full, and the routing table follows."""
    results = run(store, 20)

    assert kinds(store) == ["started", "advance", "advance", "promote"]
    assert results[-1].decision is not None
    assert results[-1].decision.state.outcome == "promoted"
    routing = store.read_routing()
    assert routing is not None
    assert routing[0].routes[0].share == 0.95
    assert EventLog(store).verify() > 0


def test_harmful_candidate_is_rolled_back_by_its_guardrail(store: FlakyStore) -> None:
    """Bad audits end in dense for everybody, and the state names the guardrail."""
    results = run(store, 10, disagreement=0.6)

    state = results[-1].decision.state if results[-1].decision else None
    routing = store.read_routing()
    assert state is not None
    assert routing is not None
    assert (state.outcome, state.by) == ("rolled_back", "agree")
    assert (routing[0].routes[0].share, routing[0].routes[0].rung_id) == (0.0, "dense")


def test_quiet_tick_appends_nothing_and_renews_the_lease(store: FlakyStore) -> None:
    """Without news the log stays as it is; the router still hears that somebody watches."""
    runner = begin(store)
    serve(store, 0)
    runner.tick(START_S + 1)
    length, before = EventLog(store).verify(), store.read_routing()

    result = runner.tick(START_S + 1.5)

    after = store.read_routing()
    assert before is not None
    assert after is not None
    assert result.event is None
    assert EventLog(store).verify() == length
    assert (after[0], after[1]) == (before[0], before[1] + 1)


@pytest.mark.parametrize("fails_after_commit", [False, True])
def test_failure_between_any_two_steps_changes_nothing_in_the_end(
    tmp_path: Path, fails_after_commit: bool
) -> None:
    """Kill one tick at each of its transactions: the next controller comes to the same states."""
    with FlakyStore.open(f"sqlite:///{tmp_path}/whole.db") as whole:
        run(whole, 6)
        expected = states(whole)
        num_calls = _count_calls_of_a_tick(tmp_path)
    assert num_calls > 5

    for step in range(num_calls):
        with FlakyStore.open(f"sqlite:///{tmp_path}/{fails_after_commit}-{step}.db") as store:
            result = _run_with_one_killed_tick(store, step, fails_after_commit)

            assert result.error or fails_after_commit
            assert states(store) == expected
            assert EventLog(store).verify() >= len(expected)


def _count_calls_of_a_tick(tmp_path: Path) -> int:
    with FlakyStore.open(f"sqlite:///{tmp_path}/count.db") as store:
        runner = begin(store)
        serve(store, 0)
        runner.tick(START_S + 0.5)
        serve(store, 1)
        store.num_calls = 0
        runner.tick(START_S + 1.5)
        return store.num_calls


def _run_with_one_killed_tick(store: FlakyStore, step: int, fails_after_commit: bool) -> TickResult:
    """Kill the tick of second 2 at its `step`-th transaction; a new runner does it again and goes on."""
    runner, killed = begin(store), TickResult()
    for second in range(6):
        serve(store, second)
        if second == 2:
            store.calls_until_failure, store.fails_after_commit = step, fails_after_commit
            killed = runner.tick(START_S + second + 0.5)
            store.calls_until_failure = None
            runner = begin(store, "a")
        runner.tick(START_S + second + 0.5)
    return killed


def test_dead_store_means_no_renewal_and_a_loop_that_goes_on(store: FlakyStore) -> None:
    """While the store is away ticks report errors and nothing is renewed; then the rollout goes on."""
    runner = begin(store)
    serve(store, 0)
    runner.tick(START_S + 1)
    before = store.read_routing()
    store.calls_until_failure = 0

    results = [runner.tick(START_S + 1 + second) for second in range(1, 4)]

    assert all("planted failure" in result.error for result in results)
    assert runner.num_errors == 3
    store.calls_until_failure = None
    assert store.read_routing() == before
    assert not runner.tick(START_S + 5).error


def test_second_controller_waits_and_takes_over(store: FlakyStore) -> None:
    """Only the holder of the lease acts; when it falls silent the other goes on from the event log."""
    first, second = begin(store, "a"), begin(store, "b")
    serve(store, 0)

    assert first.tick(START_S + 1).event is not None
    assert not second.tick(START_S + 2).has_lease
    serve(store, 1)
    taken_over = second.tick(START_S + 12)

    assert taken_over.event is not None
    assert not first.tick(START_S + 13).has_lease
    assert EventLog(store).verify() == 3


def test_operator_command_is_obeyed_once(store: FlakyStore) -> None:
    """An abort in the inbox rolls back at the next tick, and is not read again."""
    runner = begin(store)
    runner.tick(START_S)
    store.add_command(ROLLOUT, "abort", by="ann", reason="wrong model", at_s=START_S)

    runner.tick(START_S + 1)
    again = runner.tick(START_S + 2)

    assert kinds(store) == ["started", "rollback"]
    assert again.event is None


def test_rolled_back_policy_cannot_start_again_by_itself(store: FlakyStore) -> None:
    """The digest that failed is in quarantine until an operator releases it."""
    run(store, 10, disagreement=0.6)

    with pytest.raises(QuarantineError):
        start_rollout(store, POLICY, now_s=2000.0, rollout_id="again")

    assert (
        start_rollout(store, POLICY, now_s=2000.0, rollout_id="again", releases_quarantine=True).rollout_id
        == "again"
    )


def test_rollout_gets_a_name_from_policy_and_time(store: FlakyStore) -> None:
    """Without an id the policy's name and the moment are the id."""
    assert start_rollout(store, POLICY, now_s=0.0) == Rollout("test-19700101-000000", POLICY, 0.0, {})


@pytest.mark.parametrize("rollout_id", ["../evil", "a b", "-x", "x" * 101])
def test_id_that_cannot_name_a_folder_is_refused(store: FlakyStore, rollout_id: str) -> None:
    """Ids become folder names and tags, so their letters are limited."""
    with pytest.raises(RolloutError, match="cannot be used"):
        start_rollout(store, POLICY, now_s=0.0, rollout_id=rollout_id)


def test_bad_policy_is_refused_before_anything_is_written(store: FlakyStore) -> None:
    """A policy with a fault starts nothing."""
    with pytest.raises(PolicyError):
        start_rollout(store, POLICY.replace("check_every", "check_evry"), now_s=0.0)

    assert store.read_rollouts() == ()


def test_unknown_rollout_is_named_with_the_known_ones(store: FlakyStore) -> None:
    """Opening what is not there says what is."""
    begin(store)

    with pytest.raises(RolloutError, match=r"'nope' is not in store .*the newest are: 'r1'"):
        RolloutRunner.open(store, "nope", RunnerOptions("a"))


def test_drift_checks_allow_what_the_guardrail_allows() -> None:
    """A signal on a column with a guardrail takes its bound; one without is compared with itself."""
    signals = """  signals:
    - {id: d, column: token_disagreement, window_units: 10}
    - {id: n, column: prompt_tokens, window_units: 10}
  breaker:"""
    policy = load_policy(POLICY.replace("  breaker:", signals, 1))

    assert [(s.signal_id, s.allowed_excess) for s in drift_specs(policy)] == [("d", 0.10), ("n", None)]
