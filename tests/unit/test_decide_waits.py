"""decide(): no wait delays protection, and every wait has its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sentei.policies.engine import routing
from sentei.policies.machine import Wait
from tests.stories_engine import (
    BREACHES,
    WAITING,
    in_alarm,
    in_approval,
    in_bake,
    in_benefit,
    in_evidence,
    in_freeze,
    in_hold,
    in_no_gain,
    in_pause,
    in_promotion,
    in_resume,
    in_shadow,
    in_signal_trouble,
    in_silence,
    in_want_of_replicas,
    staged,
)
from tests.strategies_policy import Story, drift


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


NAMED: list[tuple[Callable[[], Story], str | None]] = [
    (in_hold, "time"),
    (in_evidence, "evidence"),
    (in_benefit, "benefit"),
    (in_want_of_replicas, "replicas"),
    (in_resume, "order"),
    (in_approval, "approval"),
    (in_freeze, "freeze"),
    (in_bake, "time"),
    (in_silence, "data"),
    (in_signal_trouble, "signal"),
    (in_alarm, None),
    (in_pause, None),
    (in_no_gain, None),
    (in_promotion, None),
]


@pytest.mark.parametrize(("wait", "name"), NAMED)
def test_the_state_names_what_it_waits_for(wait: Callable[[], Story], name: str | None) -> None:
    """A running rollout says which gate is shut; other phases speak for themselves."""
    assert wait().state.waits_for == name


def test_every_wait_of_the_machine_has_its_breaches() -> None:
    """No word is left out: dense that is down is test_dense_down's, an alarm of the ratio pauses."""
    seen = {name for wait, name in NAMED if wait in WAITING and name is not None}

    assert seen == set(Wait) - {Wait.DENSE, Wait.ASSIGNMENT}
    assert in_alarm in WAITING
