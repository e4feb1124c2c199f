"""What is proven: this stage's, of what sparse served, of one artifact; and silence after promotion."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import pytest

from sentei.policies.engine import QuarantineError, initial_state, routing, state_from_json, state_to_json
from sentei.policies.evidence import log_threshold
from sentei.policies.schema.budget import harm_alpha, try_alpha
from sentei.policies.schema.load import PolicyError
from sentei.policies.signals import SliceLengths, Verdict
from sentei.policies.state import ARTIFACT, Quarantined
from tests.stories_engine import in_promotion, in_shadow
from tests.strategies_policy import Story, make_policy, put, twice, without_approval


def at(stage_id: str) -> Story:
    """A rollout that has just entered a stage."""
    story = Story(make_policy(without_approval))
    story.run_to(stage_id)
    return story


def report(story: Story, gate_id: str = "agree", slice_id: str = "mid") -> Any:
    """The verdict of now."""
    reports = copy(story).tick(after_s=0.0).verdicts
    return next(item for item in reports if (item.id, item.slice_id) == (gate_id, slice_id))


def test_a_stage_proves_its_own_safety() -> None:
    """What shadow proved says nothing once users are on sparse; evidence of harm goes on."""
    story = at("half")

    assert (report(story).verdict, report(story).units) == (Verdict.NO_DATA, 0)
    both = story.state.cell("agree", "mid", "mild")
    assert both is not None
    assert both.harm.units >= 40


def test_audits_of_what_dense_served_prove_nothing_while_sparse_serves() -> None:
    """Harm in what sparse serves must not be diluted by the replays of dense's own answers."""
    story = at("half")

    seen = story.audits(80, variant="dense") + story.served(40)
    story.tick(seen, after_s=60.0, traffic=story.fair_traffic())
    assert (story.state.stage_id, report(story).verdict) == ("half", Verdict.NO_DATA)
    story.tick(story.audits(80), after_s=1.0)
    assert story.state.stage_id == "half-medium"


def test_harm_of_what_sparse_served_is_found_among_many_good_audits() -> None:
    """A thousand audits of dense-served answers do not hide eighty bad ones."""
    story = at("half")
    story.tick(story.audits(1000, variant="dense", slices=("mid",)), after_s=20.0)

    story.tick(story.audits(80, excess=0.5, slices=("mid",)), after_s=1.0)

    assert story.state.slice_state("mid").is_dense


def test_the_upper_half_of_a_slice_must_be_among_the_proof() -> None:
    """Half of the requests are long, so a proof by the short ones alone holds, and says why."""
    story = in_shadow()
    lengths = tuple(SliceLengths(slice_id, 100, 50) for slice_id in ("mid", "long"))

    held = story.tick(story.audits(60, half="lower"), lengths=lengths)
    assert held.reason == "mid: 0 of 3 units of its longer prompts, 50% of its requests"
    story.tick(story.audits(3, half="upper"))
    assert story.state.stage_id == "half"


def test_event_split_takes_the_share_of_the_request() -> None:
    """Just after an advance the failures of before carry the odds of before."""

    def two_arms(document: dict[str, Any]) -> None:
        gate = document["spec"]["guardrails"]["items"][2]
        gate |= {"bound": {"ratio": 1.25}, "test": "event_split"}

    found = []
    for share in (0.5, 0.9):
        story = Story(make_policy(twice(without_approval, two_arms)))
        story.run_to("half")
        sparse = story.served(20, failed=20, share=share)
        story.tick(sparse + story.served(20, failed=20, variant="dense", share=share), after_s=5.0)
        cell = story.state.cell("errors", "*", "")
        assert cell is not None
        found.append(cell.harm.expected)  # type: ignore[union-attr]

    assert found[0] == pytest.approx(40 * 0.625 / 1.125)
    assert found[1] == pytest.approx(40 * 1.125 / 1.225)


def test_missing_audits_are_forgiven_after_their_window_and_named_first() -> None:
    """One crash holds for an hour at most, and the hold says what is missing and why."""
    story = in_shadow()
    story.tick(story.audits(5) + story.audits(30, missing=True, reason="queue_full"))

    held = story.tick(story.audits(1))
    assert "30 of 36 audits missing, 83.3% over 10.0% in 1h (30 queue_full)" in held.reason
    for _ in range(8):
        story.tick(story.audits(20), after_s=600.0)
    assert report(story).verdict is not Verdict.ERROR


def test_no_harm_asks_for_units_in_which_harm_would_have_shown() -> None:
    """Below the floor that alpha and bound give the loader refuses, and says the number."""
    with pytest.raises(PolicyError, match=r'min_units: must be at least \d+: "agree" is asked for no_harm'):
        make_policy(twice(put("advance.need", "no_harm"), put("advance.min_units", 1)))


def test_the_last_stage_may_not_leave_the_proof_to_another() -> None:
    """A stage's `need: no_harm` is for those that are followed by a proof."""
    with pytest.raises(PolicyError, match="the last stage must prove"):
        make_policy(twice(put("stages.3.need", "no_harm"), put("advance.min_units", 50)))


def test_a_stage_may_leave_the_proof_to_a_later_one() -> None:
    """With `need: no_harm` the units of the rung so far are enough, whoever served them."""
    story = Story(
        make_policy(twice(without_approval, put("stages.1.need", "no_harm"), put("advance.min_units", 20)))
    )
    story.run_to("half")

    seen = story.audits(1, variant="dense") + story.served(30)
    story.tick(seen, after_s=20.0, traffic=story.fair_traffic())
    assert story.state.stage_id == "half-medium"


def test_tries_share_the_budget() -> None:
    """Each try has half of what was left, so ten of them spend no more than alpha_total."""
    policy = make_policy()
    gate = policy.spec.guardrails.items[0]

    assert sum(try_alpha(policy, number) for number in range(1, 11)) < policy.spec.guardrails.alpha_total
    assert harm_alpha(policy, gate, 2) == pytest.approx(harm_alpha(policy, gate) / 2)
    story = Story(policy)
    story.tick(commands=story.order("abort"))
    story.tick(commands=story.order("retry"), after_s=60.0)
    story.tick(story.audits(1))
    assert report(story).threshold_safe == pytest.approx(log_threshold(try_alpha(policy, 2)))


def test_what_is_proven_is_one_artifact() -> None:
    """The first digest is bound with an event and reaches the routers; another one goes dense at once."""
    story = in_shadow()

    bound = story.tick(artifact="a" * 64)
    assert [item.kind for item in bound.actions] == ["bind"]
    assert routing(story.policy, story.state).artifact == "a" * 64
    assert story.tick(artifact="a" * 64).actions == ()
    assert story.tick(artifact="").state.artifact == "a" * 64
    story.tick(artifact="b" * 64)
    assert (story.state.phase, story.state.by) == ("rolled_back", "artifact")


def test_quarantine_holds_the_artifact_whatever_the_policy_says() -> None:
    """Another salt is another policy and the same sparse model."""
    story = in_shadow()
    story.tick(artifact="a" * 64)
    story.tick(commands=story.order("abort"))

    assert story.state.quarantine == (Quarantined(f"{ARTIFACT}{'a' * 64}", "mild"),)
    other = make_policy(put("assignment.salt", "another"))
    with pytest.raises(QuarantineError, match="artifact aaaaaaaaaaaa was rolled back"):
        initial_state(other, "r2", 0.0, quarantine=story.state.quarantine, artifact="a" * 64)
    assert initial_state(other, "r2", 0.0, quarantine=story.state.quarantine, artifact="b" * 64)


def test_promoted_and_no_audit_is_scored_any_more() -> None:
    """Requests go on, so it is no silence of the service: an alert once after `grace`, and then back."""
    story = in_promotion()
    since_s = story.now_s

    alerted = story.tick(after_s=130.0, unscored_since_s=since_s + 1)
    assert [item.kind for item in alerted.actions] == ["alert"]
    assert "no audit was scored for 129s, over 2m" in alerted.reason
    assert story.tick(after_s=10.0, unscored_since_s=since_s + 1).actions == ()
    story.tick(after_s=200.0, unscored_since_s=since_s + 1)
    assert (story.state.phase, story.state.by) == ("rolled_back", "no_data")


def test_the_watch_sees_the_same_users_again() -> None:
    """After promotion harm is proven by the units of the watch, and acts."""
    story = in_promotion()

    story.tick(story.audits(48, excess=0.9), after_s=1.0)

    assert story.state.phase == "rolled_back"


def test_a_state_with_both_arms_and_missing_audits_survives_its_bytes() -> None:
    """What was added to the state is kept exactly."""
    story = at("half")
    story.tick(story.audits(3, missing=True, reason="expired") + story.audits(3), artifact="c" * 64)

    assert state_from_json(state_to_json(story.state)) == story.state
    assert any(cell.arm == "served" and cell.recent for cell in story.state.cells)
    assert replace(story.state, artifact="") != story.state
