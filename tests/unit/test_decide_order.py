"""decide(): the order as a truth table, and one stage a tick at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sentei.policies.engine import STEPS, Decision, routing
from sentei.policies.signals import Verdict
from tests.stories_engine import FRIDAY_NIGHT, bad_traffic, in_shadow, staged
from tests.strategies_policy import Story, drift, make_policy, sparse_health, without_approval

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
    ("benefit", {"ratio": 0.9}, "at most 0.9 is not proven"),
    ("approval", {}, "waits for the approval of ann"),
    ("freeze", {"commands": "approve", "freeze": True}, "freeze window Fri 16:00"),
    ("grow", {"commands": "approve"}, "on to full"),
]


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


def test_the_steps_stand_in_the_documented_order() -> None:
    """The order of docs/guides/policy.md, as names."""
    assert [step.__name__ for step in STEPS] == [
        "observe",
        "check_dense",
        "handle_commands",
        "check_artifact",
        "check_breaker",
        "check_harm",
        "check_srm",
        "check_data",
        "check_signals",
        "check_metrics",
        "check_hold",
        "check_safe",
        "check_benefit",
        "check_approval",
        "check_freeze",
        "grow",
    ]


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


def test_an_outage_of_hours_advances_one_stage_only() -> None:
    """Catch-up never skips a monitored stage."""
    story = Story(make_policy(without_approval))

    decision = story.good_tick(count=60, after_s=7200.0)

    assert decision.state.stage_id == "half"
    assert story.tick(story.audits(1), after_s=0.1).state.stage_id == "half"


def test_zero_observations_never_advance() -> None:
    """No news, however long, is no evidence: the first stage is never left."""
    story = in_shadow()
    for _ in range(50):
        decision = story.tick(after_s=5.0)

    assert decision.state.stage_id == "shadow"
    assert {report.verdict for report in decision.verdicts} == {Verdict.NO_DATA}


def test_advise_decides_but_never_routes() -> None:
    """In mode advise the table stays at share 0, with audits."""

    def advise(document: dict[str, Any]) -> None:
        document["spec"]["mode"] = "advise"

    story = Story(make_policy(advise))
    story.run_to("half")
    routes = routing(story.policy, story.state).routes

    assert [route.share for route in routes] == [0.0, 0.0, 0.0]
    assert [route.audit_share for route in routes] == [0.0, 1.0, 1.0]
