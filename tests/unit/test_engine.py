"""decide(): the order as a truth table, a breach in every waiting state, each order of an operator."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from sentei.policies.edits import edited_state
from sentei.policies.engine import (
    STEPS,
    Decision,
    PolicyStateError,
    QuarantineError,
    decide,
    initial_state,
    routing,
    state_from_json,
    state_to_json,
)
from sentei.policies.signals import Observation, Signals, SliceTraffic, Verdict
from tests.strategies_policy import Story, drift, make_policy, monday, sparse_health, without_approval

FRIDAY_NIGHT = 86_400.0 * 8 + 20 * 3600.0  # 1970-01-09, 20:00 UTC


def bad_traffic() -> tuple[SliceTraffic, ...]:
    """Far too many sessions on the candidate."""
    return (SliceTraffic("mid", 0.5, 100, 100),)


# Every condition of the order, first wins: how to make it true, and a part of the reason that it gives.
CONDITIONS: list[tuple[str, dict[str, Any], str]] = [
    ("lease", {"has_lease": False}, "does not hold the lease"),
    ("abort", {"commands": "abort"}, "aborted by ann"),
    ("breaker", {"health": sparse_health(20, 15)}, "15 of 20 requests failed"),
    ("harm", {"failed": 30}, "errors in *"),
    ("srm", {"traffic": bad_traffic()}, "sample ratio mismatch"),
    ("read error", {"read_error": "disk full"}, "cannot be read (disk full)"),
    ("signal", {"drift": drift("drift", 5, "input_drift")}, "input_drift: drift in 1 of 1 windows"),
    ("hold", {"after_s": 1.0}, "stage half-medium holds for"),
    ("safe", {"quality": 0.5}, "quality in mid is"),
    ("benefit", {"ratio": 1.6}, "a gain of 0.9 is disproved"),
    ("approval", {}, "waits for the approval of ann"),
    ("freeze", {"commands": "approve", "freeze": True}, "freeze window Fri 16:00"),
    ("grow", {"commands": "approve"}, "on to full"),
]


@lru_cache
def _staged() -> Story:
    story = Story(make_policy())
    story.run_to("half-medium")
    return story


def staged() -> Story:
    """A rollout in the stage with the human gate, built once and copied."""
    return copy(_staged())


def tell(story: Story, given: dict[str, Any]) -> Decision:
    """One tick of clean evidence, changed by the conditions that are given."""
    after_s = given.get("after_s", 30.0)
    if given.get("freeze"):
        after_s = FRIDAY_NIGHT - story.now_s
    story.now_s += after_s
    seen = story.audits(40)
    if "quality" in given:
        seen = tuple(o for o in seen if o.value_name != "audit.kl") + tuple(
            replace(o, missing=True) for o in seen if o.value_name == "audit.kl" and int(o.seq) % 8 == 0
        )
        seen += tuple(replace(o, value=0.35) for o in story.audits(12) if o.value_name == "audit.kl")
    if "ratio" in given:
        seen = tuple(
            replace(o, value=given["ratio"]) if o.value_name == "audit.compute_ratio" else o for o in seen
        )
    seen += story.served(40, failed=given.get("failed", 0))
    signals = {k: given[k] for k in ("has_lease", "health", "traffic", "read_error", "drift") if k in given}
    if "commands" in given:
        signals["commands"] = story.order(given["commands"])
    return story.tick(seen, after_s=0.0, **signals)


@pytest.mark.parametrize("index", range(len(CONDITIONS)), ids=[name for name, _, _ in CONDITIONS])
def test_each_condition_alone_gives_its_reason(index: int) -> None:
    """One row of the truth table: only this condition holds, and the decision names it with its numbers."""
    _, given, reason = CONDITIONS[index]

    assert reason in tell(staged(), given).reason


def merged(first: int, second: int) -> dict[str, Any]:
    """Two conditions at once; orders cannot be merged, so the earlier one's stays."""
    return CONDITIONS[second][1] | CONDITIONS[first][1]


PAIRS = [
    (first, second)
    for first in range(len(CONDITIONS))
    for second in range(first + 1, len(CONDITIONS))
    if not set(CONDITIONS[first][1]) & set(CONDITIONS[second][1])
    and CONDITIONS[first][0] not in ("lease", "approval")
    and CONDITIONS[second][0] != "approval"
    and {CONDITIONS[first][0], CONDITIONS[second][0]} != {"hold", "freeze"}
    # What cannot be read is not seen, so it cannot be proven in the same tick.
    and (CONDITIONS[first][0] not in ("harm", "srm") or CONDITIONS[second][0] != "read error")
]


@pytest.mark.parametrize(
    ("first", "second"), PAIRS, ids=[f"{CONDITIONS[a][0]}-{CONDITIONS[b][0]}" for a, b in PAIRS]
)
def test_the_earlier_condition_wins(first: int, second: int) -> None:
    """Of two conditions the earlier one of the order gives the reason."""
    decision = tell(staged(), merged(first, second))

    assert CONDITIONS[first][2] in decision.reason


def test_without_the_lease_nothing_changes_at_all() -> None:
    """Step 0: another controller decides; even an abort waits for it."""
    story = staged()
    before = story.state

    decision = story.tick(
        story.audits(50, excess=0.9),
        has_lease=False,
        commands=story.order("abort"),
        health=sparse_health(9, 9),
    )

    assert decision.state == before
    assert not decision.changed
    assert decision.actions == ()


def in_shadow() -> Story:
    """Waiting for evidence, no user on sparse."""
    return Story(make_policy())


def in_hold() -> Story:
    """Waiting for the least time of the stage."""
    story = Story(make_policy())
    story.run_to("half")
    story.tick(story.audits(3), after_s=1.0)
    return story


def in_approval() -> Story:
    """Waiting for a human."""
    story = staged()
    assert "waits for the approval" in story.good_tick().reason
    return story


def in_freeze() -> Story:
    """Waiting for the end of a freeze window."""
    story = Story(make_policy(without_approval), now_s=FRIDAY_NIGHT - 4 * 3600.0 - 45.0)
    story.run_to("half")
    story.now_s += 20.0
    assert (
        "freeze window" in story.tick(story.audits(5) + story.served(5), traffic=story.fair_traffic()).reason
    )
    return story


def in_bake() -> Story:
    """Waiting for the end of the last stage's bake."""
    story = Story(make_policy())
    story.run_to("full")
    assert "full holds" in story.good_tick(after_s=5.0).reason
    return story


def in_silence() -> Story:
    """Waiting for news."""
    story = staged()
    assert "stale" in story.tick(after_s=70.0, is_news=False).reason
    return story


def in_pause() -> Story:
    """Waiting for an operator."""
    story = staged()
    assert "paused by ann" in story.tick(commands=story.order("pause")).reason
    return story


def in_promotion() -> Story:
    """Promoted; the watch goes on."""
    story = in_bake()
    story.good_tick()
    assert story.state.outcome == "promoted"
    return story


def in_signal_trouble() -> Story:
    """Waiting for a drift check that works again."""
    story = staged()
    assert story.tick(drift=drift("error", 1)).state.waits_for == "signal"
    return story


def in_edit() -> Story:
    """Just after an edit of the running policy."""
    story = staged()
    safer = make_policy(lambda document: document["spec"]["advance"].update(min_units=50))
    story.state = edited_state(story.policy, safer, story.state, story.now_s)
    story.policy = safer
    return story


WAITING: list[Callable[[], Story]] = [
    in_hold,
    in_approval,
    in_freeze,
    in_bake,
    in_silence,
    in_pause,
    in_promotion,
    in_signal_trouble,
    in_edit,
]

# What breaks, and who answers for it in the state.
BREACHES: dict[str, tuple[Callable[[Story], Decision], str]] = {
    "harm": (lambda story: story.tick(story.served(80, failed=80), is_news=False), "errors"),
    "breaker": (lambda story: story.tick(health=sparse_health(20, 15), is_news=False), "breaker"),
    "silence": (lambda story: story.tick(after_s=301.0, is_news=False), "no_data"),
    "quality": (lambda story: story.tick(story.audits(60, excess=0.9), is_news=False), "quality"),
}


@pytest.mark.parametrize("breach", BREACHES)
@pytest.mark.parametrize("wait", WAITING)
def test_a_breach_in_any_waiting_state_rolls_back_in_that_tick(
    wait: Callable[[], Story], breach: str
) -> None:
    """No hold, approval, freeze, bake, silence, pause or edit delays any breach by a tick."""
    story = wait()
    act, by = BREACHES[breach]

    decision = act(story)

    assert (decision.state.outcome, decision.state.by) == ("rolled_back", by)
    assert decision.state.waits_for is None
    assert all(
        route.share == 0 and route.rung_id == "dense"
        for route in routing(story.policy, decision.state).routes
    )


@pytest.mark.parametrize("wait", [in_shadow, *WAITING])
def test_drift_of_quality_in_any_waiting_state_rolls_back_after_its_windows(
    wait: Callable[[], Story],
) -> None:
    """Two windows of drift in a row roll back, whatever else the rollout waits for."""
    story = wait()

    first = story.tick(drift=drift("drift", 1), is_news=False)
    second = story.tick(drift=drift("drift", 2), is_news=False)

    assert first.state.outcome != "rolled_back"
    assert (second.state.outcome, second.state.by) == ("rolled_back", "kl_drift")
    assert "drift in 2 of 2 windows in a row: kl 0.5 over 0.1" in second.reason


@pytest.mark.parametrize("wait", [in_shadow, *WAITING])
def test_an_abort_works_in_any_waiting_state(wait: Callable[[], Story]) -> None:
    """The operator's stop is always heard, and named."""
    story = wait()

    decision = story.tick(commands=story.order("abort", by="bob"), is_news=False)

    assert (decision.state.outcome, decision.state.by) == ("rolled_back", "operator:bob")


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_in_the_cool_off_changes_nothing_and_no_retry_gets_past_it(breach: str) -> None:
    """After a rollback all is dense; a breach, a retry that is too early and good news leave it there."""
    story = staged()
    story.tick(commands=story.order("abort"))
    dense = routing(story.policy, story.state)
    for kind in ("retry", "resume", "approve"):
        story.tick(commands=story.order(kind), after_s=2.0)

    decision = BREACHES[breach][0](story)

    assert decision.state.outcome == "rolled_back"
    assert routing(story.policy, decision.state) == dense
    assert {route.share for route in dense.routes} == {0.0}


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (in_hold, "time"),
        (in_approval, "approval"),
        (in_freeze, "freeze"),
        (in_bake, "time"),
        (in_silence, "data"),
        (in_signal_trouble, "signal"),
        (in_pause, None),
        (in_promotion, None),
    ],
)
def test_the_state_names_what_it_waits_for(wait: Callable[[], Story], name: str | None) -> None:
    """A running rollout says which gate is shut; other phases speak for themselves."""
    assert wait().state.waits_for == name


def test_the_same_drift_window_counts_once_and_silence_is_no_clear_window() -> None:
    """A window is counted by its id; error and no_data neither add to a streak nor end it; clear ends it."""
    story = in_shadow()

    streaks = []
    for status, window in [
        ("drift", 1),
        ("drift", 1),
        ("error", 2),
        ("no_data", 2),
        ("clear", 2),
        ("drift", 3),
    ]:
        story.tick(drift=drift(status, window))
        streaks.append(story.state.drift[0].streak)

    assert streaks == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(("status", "text"), [("error", "the check failed"), ("drift", "1 of 2 windows")])
def test_a_signal_in_trouble_holds(status: str, text: str) -> None:
    """A failed check or a first window of drift stops growth and nothing else."""
    story = in_shadow()

    decision = story.good_tick(drift=drift(status, 1))

    assert text in decision.reason
    assert decision.state.stage_id == "shadow"


def test_a_signal_may_insist_on_its_first_window() -> None:
    """With no_data: hold the stage waits until Evidently has looked once."""

    def insist(document: dict[str, Any]) -> None:
        document["spec"]["signals"][0]["no_data"] = "hold"

    story = Story(make_policy(insist))

    assert "no full window yet" in story.good_tick().reason
    assert story.good_tick(drift=drift("clear", 1)).state.stage_id == "half"


def test_silence_holds_then_rolls_back() -> None:
    """Stale after max_age, no data after grace, rolled back after `after`; news starts the count again."""
    story = staged()
    reasons = [story.tick(after_s=70.0, is_news=False).reason]
    reasons.append(story.tick(after_s=60.0, is_news=False).reason)
    story.tick(after_s=1.0)
    fresh = story.tick(after_s=59.0, is_news=False)

    assert "stale after 1m" in reasons[0]
    assert "over 2m" in reasons[1]
    assert "no news" not in fresh.reason
    last = story.tick(after_s=250.0, is_news=False)
    assert (last.state.outcome, last.state.by) == ("rolled_back", "no_data")


def test_a_store_that_cannot_be_read_holds_then_rolls_back() -> None:
    """Unknown is not zero: a failed read moves no evidence, holds, and after `after` rolls back."""
    story = staged()
    before = story.state

    held = story.tick(after_s=20.0, read_error="timeout", is_news=False)
    last = story.tick(after_s=301.0, read_error="timeout", is_news=False)

    assert "cannot be read (timeout)" in held.reason
    assert replace(held.state, waits_for=None) == replace(before, waits_for=None)
    assert last.state.by == "no_data"


def test_stale_evidence_is_called_stale() -> None:
    """A proof of safety does not outlive the news it came from."""
    story = staged()
    story.good_tick()

    verdicts = {report.verdict for report in story.tick(after_s=90.0, is_news=False).verdicts}

    assert Verdict.SAFE not in verdicts
    assert Verdict.STALE in verdicts


def test_a_sample_ratio_mismatch_pauses_and_its_resume_starts_afresh() -> None:
    """The alarm freezes growth without moving traffic; the operator's resume forgets the old count."""
    story = staged()
    version = story.state.version

    frozen = story.tick(story.audits(1), traffic=bad_traffic())
    story.now_s += 500.0
    resumed = story.tick(commands=story.order("resume"))

    assert (frozen.state.phase, frozen.state.by) == ("paused", "srm")
    assert frozen.state.version == version
    assert resumed.state.phase == "running"
    assert resumed.state.by is None
    assert resumed.state.cell("srm", "mid", "") is None


def test_a_sample_ratio_mismatch_may_roll_back() -> None:
    """With action: rollback the alarm sends everybody to dense, and answers for it."""

    def strict(document: dict[str, Any]) -> None:
        document["spec"]["guardrails"]["items"][3]["action"] = "rollback"

    story = Story(make_policy(strict))
    story.run_to("half")

    decision = story.tick(story.audits(1), traffic=bad_traffic())

    assert (decision.state.outcome, decision.state.by) == ("rolled_back", "srm")


def test_a_stage_is_never_left_in_the_moment_it_was_entered() -> None:
    """A tick that is done again at once, after a crash, does not advance a second stage."""

    def eager(document: dict[str, Any]) -> None:
        without_approval(document)
        document["spec"]["stages"][1]["hold_min"] = "1ms"
        document["spec"]["guardrails"]["items"] = document["spec"]["guardrails"]["items"][:2]

    story = Story(make_policy(eager))
    story.good_tick()
    again = story.good_tick(after_s=0.0)

    assert "stage half was entered just now" in again.reason
    assert story.good_tick(after_s=1.0).state.stage_id == "half-medium"


def test_a_pause_does_not_count_as_time_in_the_stage() -> None:
    """After a resume the least time goes on where it stood."""
    story = in_hold()
    before = story.now_s - story.state.stage_entered_s
    story.tick(commands=story.order("pause"), after_s=0.0)

    story.tick(commands=story.order("resume"), after_s=1000.0)

    assert story.now_s - story.state.stage_entered_s == pytest.approx(before)


def test_harm_in_one_slice_goes_a_rung_down_then_dense() -> None:
    """previous_rung falls one rung; from the mildest there is only dense, and the other slice goes on."""
    story = staged()

    down = story.tick(story.audits(30, excess=0.6, slices=("long",), value_name="audit.token_disagreement"))
    routes = {route.slice_id: route for route in routing(story.policy, down.state).routes}
    assert [action.kind for action in down.actions] == ["rung_down"]
    assert (routes["long"].rung_id, routes["long"].share) == ("mild", 0.5)
    assert routes["mid"].rung_id == "medium"
    assert down.state.outcome is None

    bad = story.audits(
        30, excess=0.9, slices=("long",), value_name="audit.token_disagreement", rung_id="mild"
    )
    dense = story.tick(bad)
    routes = {route.slice_id: route for route in routing(story.policy, dense.state).routes}
    assert [action.kind for action in dense.actions] == ["to_dense"]
    assert (routes["long"].rung_id, routes["long"].share, routes["long"].audit_share) == ("dense", 0.0, 0.0)
    assert dense.state.slice_state("long").by == "agree"
    assert dense.state.phase == "running"


def test_when_the_last_slice_falls_the_rollout_is_rolled_back() -> None:
    """Every routed slice on dense is the outcome rolled_back, by the guardrail that did it."""
    story = staged()

    decision = story.tick(story.audits(40, excess=0.9, value_name="audit.kl"))

    assert [action.kind for action in decision.actions] == ["to_dense", "to_dense", "rollback"]
    assert (decision.state.outcome, decision.state.by) == ("rolled_back", "quality")
    assert f"{story.policy.digest}+medium" in decision.state.quarantine


def test_a_version_grows_only_when_routes_change() -> None:
    """The routing table's version is a fence: it grows with every change of a route and with nothing else."""
    story = in_shadow()

    same = story.tick(story.audits(5)).state.version
    grown = story.good_tick().state.version

    assert (same, grown) == (1, 2)


def test_an_outage_of_hours_advances_one_stage_only() -> None:
    """Catch-up never skips a monitored stage."""
    story = Story(make_policy(without_approval))

    decision = story.good_tick(count=60, after_s=7200.0)

    assert decision.state.stage_id == "half"
    assert story.tick(story.audits(1), after_s=0.1).state.stage_id == "half"


def test_a_stage_over_its_longest_time_waits_for_a_human_or_rolls_back() -> None:
    """on_max: hold goes on only when approved; on_max: rollback ends it."""
    story = Story(make_policy(without_approval))
    story.run_to("half")
    late = story.good_tick(after_s=3601.0)
    assert "took longer than 1h" in late.reason
    assert story.good_tick(commands=story.order("promote")).state.stage_id == "half-medium"

    def strict(document: dict[str, Any]) -> None:
        document["spec"]["advance"]["on_max"] = "rollback"

    story = Story(make_policy(strict))
    story.run_to("half")
    assert story.good_tick(after_s=3601.0).state.by == "stage_max"


@pytest.mark.parametrize(
    ("kind", "by", "text"),
    [
        ("approve", "ann", "no approval is needed"),
        ("resume", "ann", '"resume" is not possible while the rollout is running'),
        ("retry", "ann", '"retry" is not possible while the rollout is running'),
        ("jump", "ann", 'there is no order "jump"'),
    ],
)
def test_an_order_that_cannot_be_obeyed_is_refused_with_a_reason(kind: str, by: str, text: str) -> None:
    """A refused order changes nothing but the cursor of orders."""
    story = in_shadow()
    story.good_tick()

    decision = story.good_tick(commands=story.order(kind, by))

    assert decision.actions[0].kind == "refuse"
    assert text in decision.actions[0].detail
    assert decision.state.command_seq == 1


def test_an_approval_counts_only_after_the_evidence_and_by_the_right_person() -> None:
    """Too early it is refused, not kept; from somebody else it is refused; then it opens the gate."""
    story = staged()

    early = story.tick(story.audits(1), commands=story.order("approve"))
    story.good_tick()
    wrong = story.good_tick(commands=story.order("approve", by="bob"))
    right = story.good_tick(commands=story.order("approve", by="ann"))

    assert early.actions[0].kind == "refuse"
    assert not early.state.is_approved
    assert "waits for the approval of ann" in wrong.actions[0].detail
    assert [action.kind for action in right.actions] == ["approve", "advance"]
    assert right.state.stage_id == "full"


def test_an_approval_at_any_time_is_kept() -> None:
    """With when: any_time the order may come before the evidence."""

    def any_time(document: dict[str, Any]) -> None:
        document["spec"]["stages"][2]["approval"]["when"] = "any_time"

    story = Story(make_policy(any_time))
    story.run_to("half-medium")
    story.tick(story.audits(1), commands=story.order("approve"))

    assert story.state.is_approved
    assert story.good_tick().state.stage_id == "full"


def test_an_order_is_obeyed_once() -> None:
    """An order that the store shows again is not obeyed again."""
    story = in_shadow()
    order = story.order("pause")
    story.tick(commands=order)
    story.tick(commands=story.order("resume"))

    assert story.tick(commands=order).state.phase == "running"


def test_a_retry_waits_starts_afresh_and_is_limited() -> None:
    """Cool-off first, then the first stage without evidence, quarantine released, and only so often."""
    story = staged()
    story.tick(commands=story.order("abort"))
    early = story.tick(commands=story.order("retry"))
    late = story.tick(commands=story.order("retry"), after_s=31.0, drift=drift("drift", 7))

    assert "cool-off ends in" in early.actions[0].detail
    assert late.state.phase == "running"
    assert (late.state.stage_id, late.state.cells, late.state.quarantine) == ("shadow", (), ())
    assert late.state.drift[0].window_id == 7
    assert late.state.outcome is None
    story.tick(commands=story.order("abort"))
    again = story.tick(commands=story.order("retry"), after_s=31.0)
    assert "1 of 1 retries used" in again.actions[0].detail


def test_what_is_rolled_back_learns_nothing_and_stays() -> None:
    """After a rollback no evidence, however good, moves anything."""
    story = staged()
    story.tick(commands=story.order("abort"))
    before = story.state

    decision = story.good_tick()

    assert decision.state == before
    assert not decision.changed


def test_a_failed_digest_cannot_start_again_by_itself() -> None:
    """The same policy at the same rung is refused; an edited one starts."""
    story = staged()
    failed = story.tick(commands=story.order("abort")).state.quarantine

    with pytest.raises(QuarantineError, match='rolled back at rung "medium" before'):
        initial_state(story.policy, "r2", monday(), quarantine=failed)

    def edit(document: dict[str, Any]) -> None:
        document["spec"]["advance"]["min_units"] = 11

    assert initial_state(make_policy(edit), "r2", monday(), quarantine=failed).phase == "running"


def test_a_state_of_another_policy_is_refused() -> None:
    """An edited policy never judges the old one's evidence."""
    story = in_shadow()

    with pytest.raises(PolicyStateError, match="an edited policy starts a new rollout"):
        decide(make_policy(without_approval), story.state, Signals(), monday())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schema":2}', b'{"schema":1}', b"\xff"])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    """Whatever the bytes are, the error is ours and says so."""
    with pytest.raises(PolicyStateError, match="rollout state"):
        state_from_json(data)


def test_a_restart_at_every_tick_gives_the_same_bytes() -> None:
    """Going through the bytes after every tick changes nothing, to the last bit."""
    straight, restarted = Story(make_policy()), Story(make_policy())
    for index in range(30):
        for story in (straight, restarted):
            commands = story.order("approve") if index % 3 == 0 else ()
            story.good_tick(count=3, after_s=7.0, commands=commands, health=sparse_health(30, 1))
        restarted.state = state_from_json(state_to_json(restarted.state))

    assert state_to_json(straight.state) == state_to_json(restarted.state)
    assert straight.state.stage_id != "shadow"


def test_the_breaker_trips_on_a_share_of_failures_and_on_lost_replicas() -> None:
    """Enough requests that mostly fail, or no replica for long; in shadow there is nobody to protect."""
    story = staged()
    few = story.tick(story.audits(1), health=sparse_health(9, 9))
    gone = story.tick(story.audits(1), health=sparse_health(0, 0, replicas=0))
    back = story.tick(story.audits(1), health=sparse_health(5, 0))
    story.tick(story.audits(1), health=sparse_health(0, 0, replicas=0))
    long_gone = story.tick(story.audits(1), after_s=6.0, health=sparse_health(0, 0, replicas=0))

    assert few.state.outcome is None
    assert "no ready replica" in gone.reason
    assert back.state.sparse_down_since_s is None
    assert (long_gone.state.outcome, long_gone.state.by) == ("rolled_back", "breaker")
    assert in_shadow().tick(health=sparse_health(50, 50)).state.outcome is None


def test_operational_evidence_starts_afresh_per_stage_and_quality_is_carried() -> None:
    """F15: failures depend on the share, quality on rung and slice."""
    story = Story(make_policy(without_approval))
    story.run_to("half")
    old = story.served(5, failed=5, at_s=story.state.stage_entered_s - 1.0)
    story.tick(old, after_s=0.0)
    assert story.state.cell("errors", "*", "") is None

    units = story.state.cell("agree", "mid", "mild").units  # type: ignore[union-attr]
    story.tick(story.served(12), after_s=0.0)
    assert story.state.cell("errors", "*", "").units == 12  # type: ignore[union-attr]
    story.run_to("half-medium")

    assert story.state.cell("errors", "*", "") is None
    assert story.state.cell("agree", "mid", "mild").units >= units  # type: ignore[union-attr]


def test_served_units_may_be_asked_for() -> None:
    """min_served_units waits for audits of sessions that sparse itself served in this stage."""

    def ask(document: dict[str, Any]) -> None:
        document["spec"]["advance"]["min_served_units"] = 5

    story = Story(make_policy(ask))
    story.run_to("half")
    held = story.tick(story.audits(3), after_s=20.0)
    assert "3 of 5 units served by sparse" in held.reason
    story.tick(story.audits(3) + story.served(30), after_s=1.0, traffic=story.fair_traffic())
    assert story.state.stage_id == "half-medium"


def test_advise_decides_but_never_routes() -> None:
    """In mode advise the table stays at share 0, with audits."""

    def advise(document: dict[str, Any]) -> None:
        document["spec"]["mode"] = "advise"

    story = Story(make_policy(advise))
    story.run_to("half")
    routes = routing(story.policy, story.state).routes

    assert [route.share for route in routes] == [0.0, 0.0, 0.0]
    assert [route.audit_share for route in routes] == [0.0, 1.0, 1.0]


def test_zero_observations_never_advance() -> None:
    """No news, however long, is no evidence: the first stage is never left."""
    story = in_shadow()
    for _ in range(50):
        decision = story.tick(after_s=5.0)

    assert decision.state.stage_id == "shadow"
    assert {report.verdict for report in decision.verdicts} == {Verdict.NO_DATA}


def test_observations_of_unknown_places_are_left_alone() -> None:
    """A pinned or unknown slice, an unknown rung or value: no evidence, and the cursor moves on."""
    story = in_shadow()
    strange = tuple(
        Observation(i + 1, name, place, rung, "s", "dense", story.now_s, 0.9, 0.0)
        for i, (name, place, rung) in enumerate(
            [
                ("audit.kl", "short", "mild"),
                ("audit.kl", "nowhere", "mild"),
                ("audit.kl", "mid", "dense"),
                ("x", "mid", "mild"),
            ]
        )
    )
    story.seq = 4

    decision = story.tick(strange)

    assert decision.state.cells == ()
    assert decision.state.cursor == 4


def test_the_steps_stand_in_the_documented_order() -> None:
    """The order of DESIGN section 4, as names."""
    assert [step.__name__ for step in STEPS] == [
        "observe",
        "check_control",
        "handle_commands",
        "check_breaker",
        "check_harm",
        "check_srm",
        "check_data",
        "check_signals",
        "check_hold",
        "check_safe",
        "check_benefit",
        "check_approval",
        "check_freeze",
        "grow",
    ]
