"""Edits of a running policy: only what is safer applies live, and evidence never outlives its bound."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from sentei.policies.edits import SAFER, EditError, check_edit, edited_state, review_edit
from sentei.policies.engine import routing
from sentei.policies.evidence import BetaBinomial, Betting, Split
from sentei.policies.machine import IllegalEventError
from sentei.policies.schema.policy import Policy
from sentei.policies.state import Quarantined
from tests.strategies_policy import Change, Story, make_policy, put, twice, without_approval


def rate_guardrail(document: dict[str, Any]) -> None:
    """Judge failures by the rate of both arms, so that every kind of evidence is there."""
    document["spec"]["guardrails"]["items"][2] |= {"bound": {"ratio": 2.0}, "test": "event_split"}


@lru_cache
def base() -> Policy:
    """The policy that runs."""
    return make_policy()


# One value of the running policy, the safer one and, where there is one, the opposite.
FIELDS: list[tuple[str, Any, Any]] = [
    ("stages.3.share", 0.8, 0.95),
    ("stages.1.hold_min", "20s", "5s"),
    ("stages.1.max", "30m", "2h"),
    ("stages.3.bake", "60s", "1s"),
    ("stages.1.approval", {"by": ["ann"]}, None),
    ("stages.2.approval", None, {"by": ["ann", "bob"]}),
    ("slices.buckets.1.pin", "control", None),
    ("slices.buckets.2.max_rung", "mild", None),
    ("advance.min_units", 20, 5),
    ("advance.min_served_units", 5, None),
    ("advance.on_max", "rollback", None),
    ("audit.missing", {"max_share": 0.05}, {"max_share": 0.5}),
    ("guardrails.detector_arl", 1000, 100_000),
    ("guardrails.items.0.bound.excess_over_floor", 0.1, 0.3),
    ("guardrails.items.2.bound.max", 0.1, 0.4),
    ("guardrails.items.0.action", "rollback_slice", None),
    ("guardrails.items.1.action", "rollback", "previous_rung"),
    ("guardrails.items.2.advance", "all_safe", None),
    ("benefit.0.want.max", 0.8, 0.95),
    ("signals.0.consecutive", 1, 3),
    ("signals.0.no_data", "hold", None),
    ("breaker.variant.min_requests", 5, 20),
    ("breaker.variant.failure_share", 0.25, 0.75),
    ("breaker.variant.no_replica_for", "1s", "10s"),
    ("data.max_age", "30s", "90s"),
    ("data.no_data.grace", "60s", "180s"),
    ("data.no_data.then", "rollback", None),
    ("data.no_data.after", "200s", "400s"),
    ("data.monitor_lease", "5s", "20s"),
    ("rollback.retry.max", 0, 2),
    ("rollback.retry.cool_off", "60s", "1s"),
    ("schedule.check_every", "10s", "90s"),
    ("schedule.freeze", ["Fri 16:00-Mon 08:00 UTC", "Wed 12:00-Wed 13:00 UTC"], []),
    ("notify.webhooks.0.url", "https://other.example.com/sentei", None),
    ("notify.webhooks.0.secret", {"env": "SENTEI_KEY"}, None),
    ("notify.webhooks.0.events", ["rolled_back", "slice_fell", "approval_wanted", "promoted"], ["promoted"]),
    ("notify.webhooks.0.hold_longer_than", "1h", "9h"),
    ("notify.webhooks.1.url_from", {"file": "chat-url"}, None),
    ("notify.webhooks.1.timeout", "9s", None),
]


@pytest.mark.parametrize(("path", "safer"), [(path, safer) for path, safer, _ in FIELDS if safer is not None])
def test_a_safer_value_is_taken(path: str, safer: Any) -> None:
    """Less traffic, milder, tighter, longer, harder: each alone is an edit without a refusal."""
    edited = make_policy(put(path, safer))

    assert [item.refusal for item in check_edit(base(), edited)] == [""]


@pytest.mark.parametrize(
    ("path", "bolder"), [(path, bolder) for path, _, bolder in FIELDS if bolder is not None]
)
def test_the_opposite_is_refused_by_the_name_of_its_field(path: str, bolder: Any) -> None:
    """The refusal names the field, both values, what is allowed, and the way out."""
    with pytest.raises(EditError, match="start a new rollout") as caught:
        check_edit(base(), make_policy(put(path, bolder)))

    (change,) = caught.value.changes
    assert change.path.split(".")[-1].split("[")[0] in (*path.split("."), "max_share")
    assert change.refusal in str(caught.value)
    assert f"{change.old}" in str(change)


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        (put("mode", "advise"), "spec.mode", "cannot change"),
        (put("assignment.salt", "other"), "spec.assignment.salt", "cannot change"),
        (put("guardrails.alpha_total", 0.01), "spec.guardrails.alpha_total", "cannot change"),
        (
            put("guardrails.items.0.bound.floor_cap", 0.05),
            "spec.guardrails.items[agree].bound.floor_cap",
            "cannot",
        ),
        (
            put("guardrails.items.1.value", "audit.token_disagreement"),
            "spec.guardrails.items[quality].value",
            "cannot",
        ),
        (put("signals", []), "spec.signals", "cannot be taken out or moved"),
        (
            put("ladder", [{"id": "mild"}, {"id": "medium"}, {"id": "bold"}]),
            "spec.ladder[bold]",
            "cannot be added",
        ),
        (put("stages.3.id", "most"), "spec.stages", "cannot be taken out or moved"),
        (put("stages.1.rung", "mild"), "", ""),
    ],
)
def test_what_is_not_in_the_table_needs_a_new_rollout(change: Change, path: str, words: str) -> None:
    """Another population, another budget of errors, another meaning of a value: never live."""
    found = [item for item in review_edit(base(), make_policy(change)) if item.refusal]

    assert [item.path for item in found][:1] == ([path] if path else [])
    assert all(words in item.refusal for item in found)


def test_all_unsafe_fields_are_named_at_once() -> None:
    """Nobody has to try an edit three times."""
    change = twice(put("stages.3.share", 0.94), put("advance.min_units", 1), put("data.max_age", "30s"))

    with pytest.raises(EditError) as caught:
        check_edit(base(), make_policy(change))

    assert [item.path for item in caught.value.changes] == [
        "spec.advance.min_units",
        "spec.stages[full].share",
    ]
    assert "spec.stages[full].share: 0.9 -> 0.94 may only fall" in str(caught.value)


def test_the_policy_that_runs_is_no_edit() -> None:
    """Nothing changes, and that is said."""
    with pytest.raises(EditError, match="nothing would change"):
        check_edit(base(), make_policy())


def test_signals_and_benefits_may_be_added() -> None:
    """One more thing that can stop growth spends nothing of the error budget."""
    extra = {"id": "agree_drift", "column": "token_disagreement", "no_data": "ignore"}
    added = make_policy(lambda document: document["spec"]["signals"].insert(0, extra))

    after = edited_state(base(), added, Story(base()).state, 0.0)

    assert [item.path for item in check_edit(base(), added)] == ["spec.signals[agree_drift]"]
    assert [track.signal_id for track in after.drift] == ["agree_drift", "kl_drift", "input_drift"]


def test_a_gate_with_other_people_is_refused() -> None:
    """Fewer may open it, or after the evidence; not somebody else, and it cannot be taken away."""
    paths = [
        [item.path for item in review_edit(base(), make_policy(change)) if item.refusal]
        for change in (put("stages.2.approval.by", ["bob"]), without_approval)
    ]

    assert paths == [["spec.stages[half-medium].approval"]] * 2


@lru_cache
def _running(kind: str) -> Story:
    changes = {"plain": without_approval, "ratio": twice(without_approval, rate_guardrail)}
    story = Story(make_policy(changes[kind]))
    story.run_to("half-medium" if kind == "plain" else "half")
    dense = story.served(4, failed=1, variant="dense")
    story.tick(story.audits(5) + story.served(5, failed=1) + dense, traffic=story.fair_traffic())
    return story


def running(kind: str = "plain") -> Story:
    """A rollout with evidence of every kind, at half of the sessions."""
    return copy(_running(kind))


def edit(story: Story, *changes: Change) -> None:
    """Apply an edit, as the runner does."""
    document_changes = (without_approval, *changes)
    if story.policy.spec.guardrails.items[2].test == "event_split":
        document_changes = (without_approval, rate_guardrail, *changes)
    edited = make_policy(twice(*document_changes))
    story.state = edited_state(story.policy, edited, story.state, story.now_s)
    story.policy = edited


def test_a_tighter_bound_keeps_evidence_of_harm_and_asks_for_proof_again() -> None:
    """A bet against the looser bound is a fair bet against the tighter one; a proof under it is none."""
    story = running()
    before = story.state.cell("agree", "mid", "medium")
    edit(story, put("guardrails.items.0.bound.excess_over_floor", 0.1))
    after = story.state.cell("agree", "mid", "medium")

    assert before is not None
    assert after is not None
    assert isinstance(before.harm, Betting)
    assert isinstance(after.harm, Betting)
    assert (after.harm.log_e, after.harm.units) == (before.harm.log_e, before.harm.units)
    assert after.harm.bound < before.harm.bound
    assert after.watch is not None
    assert before.watch is not None
    assert (after.watch.logs, after.watch.bound) == (before.watch.logs, after.harm.bound)
    assert after.safe is not None
    assert (after.safe.units, after.safe.log_e) == (0, 0.0)
    assert story.state.cell("quality", "mid", "medium") == running().state.cell("quality", "mid", "medium")


def test_a_tighter_proportion_starts_afresh() -> None:
    """A beta-binomial count cannot change its bound, so both its directions begin again."""
    story = running()
    edit(story, put("guardrails.items.2.bound.max", 0.1))
    cell = story.state.cell("errors", "*", "")

    assert cell is not None
    assert isinstance(cell.harm, BetaBinomial)
    assert (cell.harm.units, cell.harm.bound) == (0, 0.1)


def test_a_tighter_ratio_keeps_its_evidence_of_harm() -> None:
    """Each event carries its own null probability, so only the events to come feel the tighter ratio."""
    story = running("ratio")
    before = story.state.cell("errors", "*", "")
    edit(story, put("guardrails.items.2.bound.ratio", 1.5))
    after = story.state.cell("errors", "*", "")

    assert before is not None
    assert after is not None
    assert isinstance(after.harm, Split)
    assert after.harm == before.harm
    assert after.safe is not None
    assert after.safe.units == 0


def test_a_tighter_want_keeps_what_speaks_against_the_gain() -> None:
    """Proof of the gain starts afresh under a tighter bound; evidence of its absence goes on."""
    story = running()
    edit(story, put("benefit.0.want.max", 0.8))
    cell = story.state.cell("gain", "mid", "medium")

    assert cell is not None
    assert cell.safe is not None
    assert cell.safe.units == 0
    assert cell.harm.units == running().state.cell("gain", "mid", "medium").harm.units  # type: ignore[union-attr]


def test_a_smaller_share_restarts_the_stage() -> None:
    """Fewer sessions at once; its clock and what depends on the share begin again, quality is kept."""
    story = running()
    edit(story, put("stages.1.share", 0.2), put("stages.2.share", 0.2))

    assert [route.share for route in routing(story.policy, story.state).routes] == [0.0, 0.2, 0.2]
    assert story.state.stage_entered_s == story.now_s
    assert story.state.cell("errors", "*", "") is None
    after, before = (state.cell("agree", "mid", "medium") for state in (story.state, running().state))
    assert after is not None
    assert before is not None
    assert (after.harm, after.watch) == (before.harm, before.watch)
    assert (after.safe.units if after.safe else None) == 0  # what is proven is proven in this stage
    assert {item.served_units for item in story.state.slices} == {0}


def test_a_stage_that_is_left_or_not_reached_restarts_nothing() -> None:
    """Only the present stage's share matters to its evidence."""
    story = running()
    entered = story.state.stage_entered_s
    edit(story, put("stages.3.share", 0.7))

    assert story.state.stage_entered_s == entered
    assert story.state.cell("errors", "*", "") is not None


def test_a_pause_across_a_restarted_stage_is_not_counted_twice() -> None:
    """After pause, edit and resume the stage is exactly as old as it has run since the edit."""
    story = running()
    story.tick(commands=story.order("pause"), after_s=10.0)
    story.now_s += 100.0
    edit(story, put("stages.1.share", 0.2), put("stages.2.share", 0.2))

    story.tick(commands=story.order("resume"), after_s=50.0)

    assert story.now_s - story.state.stage_entered_s == 0.0


def test_a_pinned_slice_leaves_with_its_evidence() -> None:
    """It goes dense, and the others go on without it."""
    story = running()
    edit(story, put("slices.buckets.2.pin", "control"))

    routes = {route.slice_id: route.share for route in routing(story.policy, story.state).routes}
    assert routes == {"short": 0.0, "mid": 0.5, "long": 0.0}
    assert {cell.slice_id for cell in story.state.cells} == {"mid", "*"}
    story.tick(story.served(20, slice_id="mid"))
    assert story.good_tick().state.stage_id == "full"


def test_an_approval_does_not_survive_a_tighter_gate() -> None:
    """Who approved before may not be among those who may approve now."""
    open_gate = make_policy(put("stages.2.approval.by", ["anyone"]))
    story = Story(open_gate)
    story.run_to("half-medium")
    freeze = story.good_tick(commands=story.order("approve", by="eve"))
    assert freeze.state.stage_id == "full"
    story = Story(make_policy(twice(put("stages.2.approval", {"by": ["anyone"], "when": "any_time"}))))
    story.run_to("half-medium")
    story.tick(story.audits(1), commands=story.order("approve", by="eve"))
    assert story.state.is_approved

    after = edited_state(story.policy, base(), story.state, story.now_s)

    assert not after.is_approved


def test_a_rollback_after_an_edit_quarantines_every_policy_it_had() -> None:
    """Going back to the bolder policy does not get around the quarantine."""
    story = running()
    first = story.policy.digest
    edit(story, put("advance.min_units", 20))
    second = story.policy.digest
    failed = story.tick(commands=story.order("abort")).state

    assert {item.digest for item in failed.quarantine} == {first, second}
    retried = story.tick(commands=story.order("retry"), after_s=31.0).state
    assert retried.quarantine == ()


def test_a_failed_policy_cannot_be_edited_into() -> None:
    """An edit to a digest that is in quarantine is refused."""
    story = running()
    worse = make_policy(twice(without_approval, put("advance.min_units", 20)))
    state = replace(story.state, quarantine=(Quarantined(worse.digest, "medium"),))

    with pytest.raises(EditError, match=r"in quarantine \(medium failed\)"):
        edited_state(story.policy, worse, state, story.now_s)


def test_what_is_rolled_back_cannot_be_edited() -> None:
    """There is nothing to make safer."""
    story = running()
    story.tick(commands=story.order("abort"))

    with pytest.raises(IllegalEventError, match='"edit" is not possible while the rollout is rolled back'):
        edit(story, put("advance.min_units", 20))


def test_the_table_names_only_fields_that_exist() -> None:
    """A misspelt row would be a field that can never be edited."""
    metric = {"id": "own", "url": "https://p.example.com", "query": "up", "bound": {"max": 1}, "window": "5m"}
    policy = make_policy(put("guardrails.prometheus", [metric]))
    document: Any = policy.model_dump(mode="json", by_alias=True)

    for path in SAFER:
        places = [document]
        for part in path.replace("[*]", ".*").split("."):
            found = (place if part == "*" else [place[part]] for place in places if place is not None)
            places = [inner for items in found for inner in items]
        assert places, path


@pytest.mark.parametrize("stage", ["shadow", "half", "half-medium", "full"])
def test_an_edit_its_revert_and_another_edit_at_any_share(stage: str) -> None:
    """Early or late a safer policy applies, the way back needs a new rollout, a third still applies."""
    story = Story(make_policy(without_approval))
    story.run_to(stage)
    before = [route.share for route in routing(story.policy, story.state).routes]

    edit(story, put("advance.min_units", 20))
    with pytest.raises(EditError, match="min_units: 20 -> 10 may only grow"):
        edited_state(story.policy, make_policy(without_approval), story.state, story.now_s)
    edit(story, put("advance.min_units", 20), put("stages.3.share", 0.8))

    after = [route.share for route in routing(story.policy, story.state).routes]
    assert after == [min(share, 0.8) for share in before]
    assert len(story.state.former_digests) == 2
    assert story.tick().state.phase == "running"
