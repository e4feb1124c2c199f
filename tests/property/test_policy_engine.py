"""Properties that hold for any world: any data, silence, drift, orders and failures, in any order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.policies.edits import edited_state
from sentei.policies.engine import decide, initial_state, routing, state_from_json, state_to_json
from sentei.policies.evidence import (
    SRM_TILTS,
    BetaBinomial,
    Betting,
    Detector,
    Split,
)
from sentei.policies.judge import GuardrailReport
from sentei.policies.machine import TRANSITIONS, Event, Phase, SliceEvent, is_possible
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Observation, Signals, Verdict
from sentei.serving.ingress.router import assign, position
from tests.evidence_paths import betting_paths, update_all
from tests.strategies_policy import (
    Story,
    drift,
    edits,
    monday,
    observation_lists,
    sparse_health,
    unit_values,
)
from tests.strategies_rollout import BEGINNINGS, Told, policy, stories


def shares(state: object) -> list[float]:
    """The candidate share of every slice."""
    return [route.share for route in routing(policy(), state).routes]  # type: ignore[arg-type]


@lru_cache
def reachable() -> frozenset[tuple[str, str]]:
    """Phases that one tick may lead from and to: several events of the table, or none."""
    pairs = {(phase.value, phase.value) for phase in Phase}
    for _ in Phase:
        pairs |= {
            (start, TRANSITIONS[key].value)
            for start, middle in pairs
            for key in TRANSITIONS
            if key[0] == middle
        }
    return frozenset(pairs)


@settings(max_examples=40)
@given(stories())
def test_any_order_of_events_keeps_the_machine_legal(told: Told) -> None:
    """A known phase, a known stage, shares in [0, 1), pinned slices dense, versions never fall."""
    for before, decision in told.rerun():
        state = decision.state
        assert state.phase in set(Phase)
        assert policy().stage_index(state.stage_id) <= policy().stage_index(before.stage_id) + 1
        assert all(0 <= share < 1 for share in shares(state))
        assert shares(state)[0] == 0
        assert state.version >= before.version
        assert decision.reason
        assert (before.phase, state.phase) in reachable()
        assert state.waits_for is None or state.phase == Phase.RUNNING
        if state.phase == Phase.ROLLED_BACK:
            assert state.outcome == "rolled_back"
            assert shares(state) == [0, 0, 0]
        if state.phase == Phase.SHELTERED:
            assert state.dense_down_since_s is not None
            assert {route.rung_id for route in routing(policy(), state).routes} <= {"dense", "mild"}


@settings(max_examples=40)
@given(stories())
def test_a_guardrail_that_cannot_pass_never_raises_a_share(told: Told) -> None:
    """If any required verdict stands in the way, no slice's share is higher after the tick."""
    for before, decision in told.rerun():
        if any(not report.can_advance for report in decision.verdicts):
            assert all(new <= old for new, old in zip(shares(decision.state), shares(before), strict=True))


@settings(max_examples=40)
@given(stories())
def test_there_is_no_way_to_safe_without_units(told: Told) -> None:
    """SAFE and HARM rest on at least one measured unit, and NO_DATA is what zero units are called."""
    for _, decision in told.rerun():
        for report in decision.verdicts:
            if report.verdict in (Verdict.SAFE, Verdict.HARM):
                assert report.units > 0
            if report.units == 0 and report.missing == 0:
                assert report.verdict is Verdict.NO_DATA


@settings(max_examples=40)
@given(stories())
def test_a_restart_at_every_tick_goes_on_with_the_same_bytes(told: Told) -> None:
    """Saving and loading the state after each tick changes nothing that follows, nor the bytes themselves."""
    state = state_from_json(state_to_json(told.state))
    for index, (before, decision) in enumerate(told.rerun()):
        assert state_to_json(state) == state_to_json(before)
        data = state_to_json(decide(policy(), state, told.ticks[index], told.time_of(index)).state)
        assert data == state_to_json(decision.state)
        state = state_from_json(data)
        assert state_to_json(state) == data


@settings(max_examples=40)
@given(stories())
def test_no_tick_raises_a_share_but_an_advance_or_a_retry(told: Told) -> None:
    """Orders, alarms, edits, shelters and fallbacks never send a session more to sparse."""
    for before, decision in told.rerun():
        if not {"advance", "retry"} & {action.kind for action in decision.actions}:
            assert all(new <= old for new, old in zip(shares(decision.state), shares(before), strict=True))


@settings(max_examples=30)
@given(stories(), st.integers(0, 1000))
def test_every_request_goes_to_one_variant_and_the_shares_sum_to_one(told: Told, tokens: int) -> None:
    """Each length has one slice at most, each session one side, and both sides together are all of them."""
    units = [f"s{i}" for i in range(200)]
    for _, decision in told.rerun():
        table = routing(policy(), decision.state)
        covering = [route for route in table.routes if route.min_tokens <= tokens < route.max_tokens]
        assert len(covering) == (tokens < 400)
        found = Counter(assign(table, prompt_tokens=tokens, unit=unit).variant for unit in units)
        assert found["dense"] + found["sparse"] == len(units)
        expected = sum(position(unit, table.salt) < route.share for route in covering for unit in units)
        assert found["sparse"] == expected


@settings(max_examples=40)
@given(stories(), edits(), st.integers(0, 9))
def test_a_safer_edit_at_any_moment_keeps_the_machine_legal(told: Told, edited: Policy, at: int) -> None:
    """No edit raises a share or a rung, wherever the rollout stands, and decisions go on under it."""
    rules, state = policy(), told.state
    for index, signals in enumerate(told.ticks):
        now_s = told.time_of(index)
        if index == at and is_possible(state.phase, Event.EDIT):
            after = edited_state(rules, edited, state, now_s)
            old, new = routing(rules, state).routes, routing(edited, after).routes
            assert all(a.share <= b.share for a, b in zip(new, old, strict=True))
            assert state_from_json(state_to_json(after)) == after
            rules, state = edited, after
        state = decide(rules, state, signals, now_s).state
    assert state.policy_digest == rules.digest


@settings(max_examples=40)
@given(stories())
def test_the_same_inputs_give_the_same_decision(told: Told) -> None:
    """decide has no memory of its own."""
    assert told.rerun() == told.rerun()


def test_the_stories_of_these_properties_have_every_deed() -> None:
    """What no story did would be proven of nothing: growth, fallbacks, orders and alarms all happen."""
    seen: set[str] = set()
    for begins in BEGINNINGS:  # each for itself: a draw among all of them may hardly ever begin paused

        @settings(max_examples=60)
        @given(stories(begins=(begins,)))
        def look(told: Told) -> None:
            seen.update(deeds(told))

        look()

    # An edit is given and not decided (the property of edits applies one); a gate needs a policy with one.
    assert seen >= {*Event, *SliceEvent, "refuse", "alert"} - {Event.EDIT, Event.APPROVE}


def deeds(told: Told) -> set[str]:
    """Everything that happened in a story."""
    return {action.kind for _, decision in told.rerun() for action in decision.actions}


@settings(max_examples=60)
@given(observation_lists())
def test_feeding_in_ticks_or_at_once_gives_the_same_evidence(items: tuple[Observation, ...]) -> None:
    """How observations fall into ticks does not matter to the evidence they are."""

    def fold(chunks: list[tuple[Observation, ...]]) -> bytes:
        state = initial_state(policy(), "r1", monday())
        for chunk in chunks:
            cursor = max((item.seq for item in chunk), default=state.cursor)
            state = decide(
                policy(), state, Signals(chunk, cursor=cursor, newest_data_at_s=monday()), monday()
            ).state
        return repr((state.cells, state.outcome)).encode()

    at_once = fold([items])
    one_by_one = fold([(item,) for item in items])

    if b"rolled_back" not in one_by_one and b"rolled_back" not in at_once:
        assert at_once == one_by_one


@settings(max_examples=60)
@given(st.lists(unit_values, min_size=1, max_size=40), st.data())
def test_more_harm_never_delays_a_rollback(values: list[float], data: st.DataObject) -> None:
    """If a stream is rolled back, so is every stream with one unit made worse, and not later."""
    at = data.draw(st.integers(0, len(values) - 1))
    worse = list(values)
    worse[at] = 1.0

    def ticks_to_harm(stream: list[float]) -> int:
        story = Story(policy())
        for index, value in enumerate(stream):
            seen = story.audits(1, slices=("mid",), value_name="audit.kl", value=2 * value, floor=0.0)[:1]
            if story.tick(seen).state.slice_state("mid").is_dense:
                return index
        return len(stream)

    # A worse unit also makes the bets that follow it smaller, by less than one unit is worth.
    assert ticks_to_harm(worse) <= ticks_to_harm(values) + 1


def first_fall(told: Told) -> int:
    """The first tick after which nobody is on sparse any more, by a rollback."""
    falls = (i for i, (_, d) in enumerate(told.rerun()) if d.state.phase == Phase.ROLLED_BACK)
    return next(falls, len(told.ticks))


TROUBLES = ("failures", "breaker", "drift")


def with_trouble(told: Told, kind: str, at: int) -> Told:
    """The same story with one more thing that is bad in one of its ticks; drift is also in the next one."""
    signals = told.ticks[at]
    where = ("mid", "medium", "x", "sparse", told.time_of(at))
    failed = tuple(Observation(signals.cursor + i, "serve.failed", *where, value=1.0) for i in range(1, 13))
    changes: dict[str, dict[str, Any]] = {
        "failures": {"observations": (*signals.observations, *failed)},
        "breaker": {"health": sparse_health(50, 40)},
        "drift": {"drift": drift("drift", signals.cursor)},
    }
    later = told.ticks[at + 1 :]
    if kind == "drift":
        later = [replace(item, drift=drift("drift", item.cursor)) for item in later[:1]] + later[1:]
    return replace(told, ticks=[*told.ticks[:at], replace(signals, **changes[kind]), *later])


@settings(max_examples=100)
@given(
    stories(begins=("half-medium", "full", "promoted", "paused"), is_calm=True),
    st.sampled_from(TROUBLES),
    st.data(),
)
def test_more_trouble_never_delays_a_rollback(told: Told, kind: str, data: st.DataObject) -> None:
    """Failed sessions, a failing variant or drift on top of any story: rolled back no later than without.

    The stories are those in which nothing grows on the way: trouble that holds a stage back may well keep
    a rollout from the harm of the next one.
    """
    at = data.draw(st.integers(0, len(told.ticks) - 1))

    assert first_fall(with_trouble(told, kind, at)) <= first_fall(told)


@pytest.mark.parametrize("kind", TROUBLES)
def test_trouble_does_bring_a_rollback_forward(kind: str) -> None:
    """Each kind of trouble makes some story end sooner, so the property above is about something."""
    sooner = []

    @settings(max_examples=100)
    @given(stories(begins=("full",), is_calm=True))
    def look(told: Told) -> None:
        sooner.append(first_fall(with_trouble(told, kind, 0)) < first_fall(told))

    look()

    assert sum(sooner) >= 5


@settings(max_examples=100)
@given(st.lists(unit_values, min_size=1, max_size=60), st.data())
def test_a_worse_unit_never_delays_what_bets_a_fixed_amount(values: list[float], data: st.DataObject) -> None:
    """The change detector and the counts of failures are monotone in every single unit, without exception."""
    at = data.draw(st.integers(0, len(values) - 1))
    worse = [*values[:at], max(values[at], data.draw(unit_values)), *values[at + 1 :]]
    hits, more_hits = [[float(v > 0.5) for v in stream] for stream in (values, worse)]

    def peaks(evidence: Detector | BetaBinomial, stream: list[float]) -> list[float]:
        found = []
        for value in stream:
            evidence = evidence.update(value)
            found.append(evidence.log_e_max)
        return found

    for start, one, other in (
        (Detector(0.2), values, worse),
        (BetaBinomial(0.2, "harm"), hits, more_hits),
    ):
        assert all(b >= a - 1e-9 for a, b in zip(peaks(start, one), peaks(start, other), strict=True))


@given(st.lists(unit_values, max_size=60), st.integers(0, 60))
def test_every_state_restarts_where_it_stopped(values: list[float], at: int) -> None:
    """Streaming in two parts is streaming in one, for each kind of evidence."""
    hits = [float(value > 0.5) for value in values]
    for start in (Betting(0.2, "harm", 0.05), Betting(0.2, "safe", 0.05, 0.9)):
        assert update_all(update_all(start, values[:at]), values[at:]) == update_all(start, values)
    watch = Detector(0.2)
    assert update_all(update_all(watch, values[:at]), values[at:]) == update_all(watch, values)
    counts = BetaBinomial(0.2, "safe")
    assert update_all(update_all(counts, hits[:at]), hits[at:]) == update_all(counts, hits)


@given(st.lists(unit_values, min_size=1, max_size=60), st.data())
def test_a_betting_path_only_depends_on_the_past(values: list[float], data: st.DataObject) -> None:
    """Changing a later unit leaves every earlier point of the path alone: bets are predictable."""
    import numpy as np

    at = data.draw(st.integers(0, len(values) - 1))
    other = [*values[:at], 1.0 - values[at], *values[at + 1 :]]

    first = betting_paths(np.array([values]), bound=0.3, direction="harm", alpha=0.05)[0, :at]
    second = betting_paths(np.array([other]), bound=0.3, direction="harm", alpha=0.05)[0, :at]

    assert first.tolist() == second.tolist()


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0.01, 0.99))
def test_the_sample_ratio_evidence_is_a_likelihood_ratio_average(
    hits: int, misses: int, share: float
) -> None:
    """Summed over all outcomes of one coin, weighted by the null, the evidence averages to exactly one."""
    start = Split.start(SRM_TILTS).update(hits, hits + misses, share)

    import math

    up, down = start.update(1, 1, share), start.update(0, 1, share)
    average = share * math.exp(up.log_e - start.log_e) + (1 - share) * math.exp(down.log_e - start.log_e)

    assert abs(average - 1) < 1e-9


def test_reports_say_what_they_need() -> None:
    """A report that is not required never stands in the way; a required one without units always does."""
    story = Story(policy())
    reports: dict[str, GuardrailReport] = {item.id: item for item in story.tick().verdicts}

    assert reports["errors"].can_advance
    assert not reports["agree"].can_advance
    assert replace(reports["errors"], is_required=True).can_advance is False
