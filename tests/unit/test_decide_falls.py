"""decide(): how a breach falls back, by rung, slice, alarm and breaker."""

from __future__ import annotations

from typing import Any

from sentei.policies.engine import routing
from sentei.policies.signals import Observation
from sentei.policies.state import Quarantined
from tests.stories_engine import bad_traffic, in_shadow, staged
from tests.strategies_policy import Story, drift, make_policy, sparse_health


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
    assert Quarantined(story.policy.digest, "medium") in decision.state.quarantine


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


def harm_in_long(story: Story) -> tuple[Observation, ...]:
    """Proof that one slice disagrees too much: it goes a rung down, the other stays."""
    return story.audits(30, excess=0.6, slices=("long",), value_name="audit.token_disagreement")


def test_a_slice_that_falls_hides_no_drift() -> None:
    """The second window of drift rolls back in the tick in which a slice falls, and answers for it."""
    story = staged()
    story.tick(drift=drift("drift", 1))

    decision = story.tick(harm_in_long(story), drift=drift("drift", 2))

    assert [action.kind for action in decision.actions] == ["rung_down", "rollback"]
    assert (decision.state.outcome, decision.state.by) == ("rolled_back", "kl_drift")
    assert "drift in 2 of 2 windows" in decision.reason


def test_a_slice_that_falls_hides_no_silence() -> None:
    """Nothing new for too long rolls back, also when old scores that arrive late make a slice fall."""
    story = staged()

    decision = story.tick(harm_in_long(story), after_s=301.0, is_news=False)

    assert [action.kind for action in decision.actions] == ["rung_down", "rollback"]
    assert decision.state.by == "no_data"


def test_a_slice_that_falls_hides_no_late_stage() -> None:
    """A stage over its longest time under on_max: rollback ends in that tick too."""

    def strict(document: dict[str, Any]) -> None:
        document["spec"]["advance"]["on_max"] = "rollback"
        document["spec"]["stages"][2]["max"] = "1h"

    story = Story(make_policy(strict))
    story.run_to("half-medium")

    decision = story.tick(harm_in_long(story), after_s=3601.0)

    assert [action.kind for action in decision.actions] == ["rung_down", "rollback"]
    assert decision.state.by == "stage_max"


def test_a_slice_that_falls_hides_no_sample_ratio() -> None:
    """The alarm of another slice pauses in the same tick; that of a slice that went dense is no matter."""
    story, other = staged(), staged()

    paused = story.tick(harm_in_long(story), traffic=bad_traffic())
    bad = other.audits(30, excess=0.9, slices=("mid",), value_name="audit.kl")
    fallen = other.tick(bad, traffic=bad_traffic())

    assert [action.kind for action in paused.actions] == ["rung_down", "pause"]
    assert (paused.state.phase, paused.state.by) == ("paused", "srm")
    assert [action.kind for action in fallen.actions] == ["to_dense"]
    assert fallen.state.phase == "running"


def test_an_order_in_the_tick_of_a_fall_is_answered() -> None:
    """An approval that comes while a slice falls is refused with the reason, not lost; nothing grows."""
    story = staged()
    story.good_tick()

    decision = story.tick(harm_in_long(story), after_s=30.0, commands=story.order("approve"))

    assert [action.kind for action in decision.actions] == ["rung_down", "refuse"]
    assert "agree in long at medium" in decision.actions[1].detail
    assert (decision.state.stage_id, decision.state.is_approved) == ("half-medium", False)
    assert decision.state.waits_for is None
