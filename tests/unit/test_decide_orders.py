"""decide(): each order of an operator, and who may give it when."""

from __future__ import annotations

from typing import Any

import pytest

from sentei.policies.engine import QuarantineError, initial_state
from tests.stories_engine import in_hold, in_shadow, staged
from tests.strategies_policy import Story, drift, make_policy, monday, without_approval


def test_a_pause_does_not_count_as_time_in_the_stage() -> None:
    """After a resume the least time goes on where it stood."""
    story = in_hold()
    before = story.now_s - story.state.stage_entered_s
    story.tick(commands=story.order("pause"), after_s=0.0)

    story.tick(commands=story.order("resume"), after_s=1000.0)

    assert story.now_s - story.state.stage_entered_s == pytest.approx(before)


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


def gated(document: dict[str, Any]) -> None:
    """Ann or a webhook opens the gate."""
    hook = {"id": "ci", "url": "https://ci.example.com/gate"}
    document["spec"]["stages"][2]["approval"] = {"by": ["ann"], "webhook": hook}


def waiting_for_the_gate() -> Story:
    """A story in which nothing but the approval is missing."""
    story = Story(make_policy(gated))
    story.run_to("half-medium")
    story.good_tick()
    assert story.state.waits_for == "approval"
    return story


def test_the_yes_of_a_gate_is_an_approval_by_its_name() -> None:
    """It comes as an order, for the stay that it was asked about, and the log names the gate."""
    story = waiting_for_the_gate()

    done = story.good_tick(commands=story.order("gate", by="gate:ci", reason=story.state.stay))

    assert (done.actions[0].kind, done.actions[0].detail) == ("approve", "approved by gate:ci")
    assert done.state.stage_id == "full"


@pytest.mark.parametrize(
    "order",
    [
        {"kind": "gate", "by": "gate:other"},
        {"kind": "gate", "by": "ann"},
        {"kind": "gate", "by": "gate:ci", "reason": "half-medium, entered at 1.000"},
        {"kind": "approve", "by": "gate:ci"},
    ],
)
def test_no_other_yes_opens_a_gate(order: dict[str, str]) -> None:
    """Another gate's, one that was asked about another stay, or a person's with a gate's name."""
    story = waiting_for_the_gate()

    done = story.good_tick(commands=story.order(**({"reason": story.state.stay} | order)))

    assert [action.kind for action in done.actions] == ["refuse"]
    assert "waits for the approval of ann, gate:ci" in done.actions[0].detail
    assert not done.state.is_approved


def test_the_yes_of_a_gate_does_not_outlive_the_evidence() -> None:
    """The answer was on its way when the evidence went: it is refused, and the gate is asked again later."""
    story = waiting_for_the_gate()
    order = story.order("gate", by="gate:ci", reason=story.state.stay)

    late = story.good_tick(commands=order, drift=drift("drift", 1, "input_drift"))

    assert [action.kind for action in late.actions] == ["refuse"]
    assert late.state.stage_id == "half-medium"
