"""Dense that is down: no fallback may send users there; what is owed is carried out when it is back."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any

import pytest

from sentei.policies.engine import Decision, routing, state_from_json, state_to_json
from sentei.policies.signals import VariantHealth
from sentei.policies.state import Quarantined
from tests.strategies_policy import Story, drift, make_policy, without_approval

Health = tuple[VariantHealth, ...]


def health(*, dense: tuple[int, int, int] = (100, 0, 1), sparse: tuple[int, int, int] = (50, 0, 1)) -> Health:
    """Requests, failures and ready replicas of both variants."""
    return (VariantHealth("dense", 60.0, *dense), VariantHealth("sparse", 60.0, *sparse))


DENSE_GONE = health(dense=(0, 0, 0))
DENSE_FAILS = health(dense=(20, 15, 1))
WELL = health()


@lru_cache
def _at_medium() -> Story:
    story = Story(make_policy(without_approval))
    story.run_to("half-medium")
    return story


def at_medium() -> Story:
    """Half of the sessions on sparse, at the bolder rung."""
    return copy(_at_medium())


def routed(story: Story) -> dict[str, tuple[str, float]]:
    """Rung and share of each slice."""
    return {r.slice_id: (r.rung_id, r.share) for r in routing(story.policy, story.state).routes}


def kinds(decision: Decision) -> list[str]:
    """What happened."""
    return [action.kind for action in decision.actions]


HARMS: dict[str, Callable[[Story], dict[str, Any]]] = {
    "harm": lambda story: {"observations": story.served(80, failed=80)},
    "abort": lambda story: {"commands": story.order("abort")},
    "drift": lambda story: {"drift": drift("drift", 9)},
    "silence": lambda story: {"after_s": 301.0, "is_news": False},
}


@pytest.mark.parametrize("down", [DENSE_GONE, DENSE_FAILS])
@pytest.mark.parametrize("harm", HARMS)
def test_a_rollback_while_dense_is_down_becomes_a_shelter(harm: str, down: Health) -> None:
    """The dead pool gets no session more, whoever asks: the share stays, the rung is the mildest."""
    story = at_medium()
    if harm == "drift":
        story.tick(drift=drift("drift", 8))

    decision = story.tick(health=down, **HARMS[harm](story))

    assert kinds(decision) == ["alert", "shelter"]
    assert (decision.state.phase, decision.state.outcome) == ("sheltered", None)
    assert routed(story) == {"short": ("dense", 0.0), "mid": ("mild", 0.5), "long": ("mild", 0.5)}
    assert "dense is down, so sparse stays at rung mild until dense is back" in decision.reason


def test_the_rollback_that_is_owed_comes_when_dense_is_back() -> None:
    """The first tick with a dense that can take the traffic rolls back, and names who asked for it."""
    story = at_medium()
    sheltered = story.tick(story.served(80, failed=80), health=DENSE_GONE)
    still = [story.tick(health=DENSE_GONE) for _ in range(3)]

    back = story.tick(health=WELL)

    assert [kinds(decision) for decision in still] == [[], [], []]
    assert {decision.state.phase for decision in still} == {"sheltered"}
    assert kinds(back) == ["rollback"]
    assert (back.state.outcome, back.state.by) == ("rolled_back", "errors")
    assert back.reason.endswith("dense is back")
    assert {share for _, share in routed(story).values()} == {0.0}
    # The rung that failed is in quarantine, the one that gave shelter is not.
    failed = (Quarantined(story.policy.digest, "medium"),)
    assert back.state.quarantine == sheltered.state.quarantine == failed


def test_an_operator_who_aborts_again_does_not_wait_for_dense() -> None:
    """The second abort is an order to go dense all the same."""
    story = at_medium()
    first = story.tick(commands=story.order("abort"), health=DENSE_GONE)
    second = story.tick(commands=story.order("abort", by="bob"), health=DENSE_GONE)

    assert first.state.phase == "sheltered"
    assert (second.state.outcome, second.state.by) == ("rolled_back", "operator:bob")


@pytest.mark.parametrize("kind", ["pause", "resume", "approve", "retry"])
def test_no_other_order_is_possible_in_a_shelter(kind: str) -> None:
    """Refused with state and order named; nothing moves."""
    story = at_medium()
    story.tick(commands=story.order("abort"), health=DENSE_GONE)
    before = routed(story)

    decision = story.tick(commands=story.order(kind), health=DENSE_GONE)

    assert kinds(decision) == ["refuse"]
    assert "is not possible while the rollout is sheltered" in decision.actions[0].detail
    assert routed(story) == before


def test_a_shelter_outlives_a_restart() -> None:
    """What is owed stands in the state."""
    story = at_medium()
    story.tick(commands=story.order("abort"), health=DENSE_GONE)
    story.state = state_from_json(state_to_json(story.state))

    assert story.tick(health=WELL).state.by == "operator:ann"


def test_dense_that_is_down_alerts_once_and_holds_growth() -> None:
    """Good evidence of sparse is no reason to grow while its control cannot be compared with."""
    story = at_medium()
    first, second = story.good_tick(health=DENSE_GONE), story.good_tick(health=DENSE_GONE)
    third = story.good_tick(health=WELL)

    assert kinds(first) == ["alert"]
    assert kinds(second) == []
    assert "dense has no ready replica" in second.reason
    assert (second.state.waits_for, second.state.stage_id) == ("dense", "half-medium")
    assert third.state.stage_id == "full"


def test_both_failing_is_no_fault_of_dense() -> None:
    """What hits both alike (a bad client, a full disk) goes to dense, the side that is known."""
    story = at_medium()

    decision = story.tick(health=health(dense=(20, 15, 1), sparse=(20, 15, 1)))

    assert (decision.state.outcome, decision.state.by) == ("rolled_back", "breaker")


@pytest.mark.parametrize("unknown", [(), health(dense=(0, 0, 0), sparse=(0, 0, 0)), DENSE_GONE[:1]])
def test_unknown_health_is_no_fault_of_dense(unknown: Health) -> None:
    """Replicas that nobody counted do not keep users on sparse."""
    story = at_medium()

    assert story.tick(commands=story.order("abort"), health=unknown).state.outcome == "rolled_back"


def test_in_shadow_nobody_needs_shelter() -> None:
    """Without users on sparse a rollback moves nobody, so it does not wait."""
    story = Story(make_policy())

    assert story.tick(commands=story.order("abort"), health=DENSE_GONE).state.outcome == "rolled_back"


def bad_audits(story: Story, rung_id: str, slices: tuple[str, ...] = ("long",)) -> dict[str, Any]:
    """Proof of harm by a guardrail that sends its slice to dense."""
    return {
        "observations": story.audits(40, excess=0.9, slices=slices, value_name="audit.kl", rung_id=rung_id)
    }


def test_a_slice_that_must_go_dense_waits_at_the_mildest_rung() -> None:
    """The slice axis in the same way: shelter now, dense when dense is back, the other slice goes on."""
    story = at_medium()
    down = story.tick(health=DENSE_GONE, **bad_audits(story, "medium"))
    here = routed(story)
    again = story.tick(health=DENSE_GONE, **bad_audits(story, "mild"))
    back = story.tick(health=WELL)

    assert kinds(down) == ["alert", "shelter"]
    assert (here["long"], here["mid"]) == (("mild", 0.5), ("medium", 0.5))
    assert kinds(again) == []
    assert back.actions[0].kind == "to_dense"
    assert routed(story)["long"] == ("dense", 0.0)
    assert back.state.slice_state("long").by == "quality"
    assert not back.state.slice_state("long").owes_dense


def test_when_every_slice_owes_dense_its_return_is_a_rollback() -> None:
    """Nothing is left on sparse: the outcome is rolled_back, by the guardrail that did it."""
    story = at_medium()
    story.tick(health=DENSE_GONE, **bad_audits(story, "medium", ("mid", "long")))

    back = story.tick(health=WELL)

    assert kinds(back) == ["to_dense", "to_dense", "rollback"]
    assert (back.state.outcome, back.state.by) == ("rolled_back", "quality")


def test_a_rung_down_needs_no_dense() -> None:
    """previous_rung above the mildest rung works as ever while dense is down."""
    story = at_medium()
    seen = story.audits(30, excess=0.6, slices=("long",), value_name="audit.token_disagreement")

    decision = story.tick(seen, health=DENSE_GONE)

    assert kinds(decision) == ["alert", "rung_down"]
    assert routed(story)["long"] == ("mild", 0.5)


def test_a_promoted_rollout_is_sheltered_too() -> None:
    """The watch goes on after promotion, and so does this rule; the outcome is open again."""
    story = at_medium()
    story.run_to("full")
    story.good_tick()
    assert story.state.outcome == "promoted"

    decision = story.tick(story.served(80, failed=80), health=DENSE_GONE)

    assert (decision.state.phase, decision.state.outcome, decision.state.ended_s) == ("sheltered", None, None)
    assert routed(story)["mid"] == ("mild", 0.9)
    assert story.tick(health=WELL).state.outcome == "rolled_back"
