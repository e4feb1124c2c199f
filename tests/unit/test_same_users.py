"""The same few users all along: what they prove, in each stage, after a retry, and once it is promoted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.policies.engine import Decision
from sentei.policies.evidence import Betting, log_threshold, paired_excess
from sentei.policies.intake import new_cell
from sentei.policies.schema.budget import try_alpha
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, make_audit, make_request

PERIOD_S = 600.0
RETRY = POLICY + "  rollback: {retry: {max: 3, cool_off: 0s}}\n"
BOUND = 0.10  # of POLICY


class Days:
    """A rollout whose audits are all of the same users."""

    def __init__(self, store: Store, users: int) -> None:
        start_rollout(store, RETRY, now_s=0.0, rollout_id="r1")
        self.runner = RolloutRunner.open(store, "r1", RunnerOptions("one"))
        self.store, self.users, self.now_s, self.number = store, users, 0.0, 0

    def round(self, disagreement: float, *, after_s: float = 5.0) -> Decision:
        """Each user asks once and is audited, by sparse wherever it serves; then a tick."""
        self.now_s += after_s
        state = self.runner.state()
        variant = "dense" if state is None or state.stage_id == "shadow" else "sparse"
        for user in range(self.users):
            self.number += 1
            who = {"request_id": f"q{self.number}", "session_id": f"user{user}", "at_s": self.now_s}
            self.store.add_request(make_request(0, **who, variant_assigned=variant, variant_served=variant))
            self.store.add_audit(
                make_audit(0, **who, variant_served=variant, token_disagreement=disagreement)
            )
        return self.tick(after_s=0.5)

    def tick(self, after_s: float) -> Decision:
        """One tick."""
        self.now_s += after_s
        result = self.runner.tick(self.now_s)
        assert result.decision is not None, result.error
        return result.decision


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


@pytest.mark.parametrize(("try_number", "least", "takes"), [(1, 36, 39), (2, 42, 46)])
def test_clean_users_prove_no_sooner_than_any_test_may(try_number: int, least: int, takes: int) -> None:
    """A variant that ruins one answer of ten is clean for `least` users with less than the try may spend.

    So no valid test proves by fewer; ours takes three or four more. Three stages of a first try need 108
    users whatever the test, and 40 within one period cannot prove a second try: docs/statistics.md.
    """
    policy = load_policy(RETRY)
    (gate,) = policy.spec.guardrails.items
    alpha = try_alpha(policy, try_number)
    assert (1 - BOUND) ** least <= alpha < (1 - BOUND) ** (least - 1)

    safe = new_cell(policy, gate, "long", "medium", try_number=try_number).safe
    assert isinstance(safe, Betting)
    log_e = []
    while safe.log_e_max < log_threshold(alpha):
        safe = safe.update(paired_excess(0.0, 0.0, BOUND))
        log_e.append(safe.log_e_max)

    assert len(log_e) == takes
    if try_number == 2:
        assert (round(log_e[39], 2), round(log_threshold(alpha), 2)) == (3.81, 4.38)


def test_forty_eight_users_prove_each_stage_and_are_seen_when_they_come_back(store: Store) -> None:
    """Promoted by the same people in each stage; four times a hundred answers later it would be too late."""
    days = Days(store, users=48)
    for _ in range(4):
        state = days.round(0.0).state
    assert state.outcome == "promoted"

    state = days.round(1.0, after_s=PERIOD_S).state
    assert (state.outcome, state.by) == ("rolled_back", "agree")


def test_the_same_forty_users_prove_a_second_try_in_their_second_period(store: Store) -> None:
    """Each try has evidence of its own, of everybody; 40 clean units are too few for it, 80 are not."""
    days = Days(store, users=40)
    assert days.round(0.6).state.outcome == "rolled_back"
    store.add_command("r1", "retry", by="ann", at_s=days.now_s)
    days.tick(after_s=1.0)

    for _ in range(5):
        first = days.round(0.0)
    assert (first.state.stage_id, first.verdicts[0].units) == ("shadow", 40)
    assert first.verdicts[0].log_e_safe < first.verdicts[0].threshold_safe
    assert days.round(0.0, after_s=PERIOD_S).state.stage_id == "half"


def test_an_auditor_that_dies_is_heard_of_and_ends_the_rollout(store: Store) -> None:
    """Promoted, requests go on, none is scored: an alert after `grace`, dense after `after`."""
    days = Days(store, users=48)
    for _ in range(4):
        days.round(0.0)
    heard, begin_s = [], days.now_s
    for number in range(40):
        who = {"request_id": f"late{number}", "session_id": f"user{number}", "at_s": days.now_s}
        store.add_request(make_request(0, **who, share=0.95))
        decision = days.tick(after_s=10.0)
        heard += [(action.kind, days.now_s - begin_s) for action in decision.actions]

    assert [kind for kind, _ in heard] == ["alert", "rollback"]
    assert 60.0 < heard[0][1] <= 80.0
    assert 300.0 < heard[1][1] <= 320.0
