"""One guardrail and its evidence to one verdict: its limits, its two numbers; and the error budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sentei.policies.evidence import (
    RATIO_TILTS,
    BetaBinomial,
    Split,
    events_to_notice,
    hits_to_notice,
    log_threshold,
)
from sentei.policies.intake import new_cell, scaled_bound
from sentei.policies.judge import GuardrailReport, least_served
from sentei.policies.schema.budget import harm_alpha, num_starts, num_tests
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Verdict
from tests.strategies_policy import EXAMPLES, Story, make_policy, without_approval


def with_gates(*gates: dict[str, Any]) -> Policy:
    """A policy with more guardrails."""

    def add(document: dict[str, Any]) -> None:
        document["spec"]["guardrails"]["items"] += list(gates)

    return make_policy(add)


RATIO = {
    "id": "rate",
    "value": "serve.failed",
    "bound": {"ratio": 1.25},
    "test": "event_split",
    "per": "all",
    "action": "rollback",
    "advance": "no_harm",
}
SLO = {
    "id": "slo",
    "value": "serve.ttft_ms",
    "bound": {"over": "2s", "max": "10%"},
    "test": "beta_binomial",
    "per": "slice",
    "action": "rollback_slice",
    "advance": "no_harm",
}
MASS = {
    "id": "mass",
    "value": "audit.dropped_mass_mean",
    "bound": {"max": "10%"},
    "test": "betting",
    "action": "rollback_slice",
}


def report_of(story: Story, gate_id: str, slice_id: str = "mid") -> GuardrailReport:
    """The newest verdict of one guardrail."""
    reports = story.tick(after_s=0.0).verdicts
    return next(item for item in reports if (item.id, item.slice_id) == (gate_id, slice_id))


def test_nothing_observed_is_no_data() -> None:
    """Without a unit there is no verdict, and never SAFE."""
    report = report_of(Story(make_policy()), "agree")

    assert report.verdict is Verdict.NO_DATA
    assert report.mean is None
    assert not report.can_advance
    assert "nothing observed" in report.reason


def test_few_units_are_undecided_and_many_clean_ones_are_safe() -> None:
    """Proof takes units; the reason states the mean, its bound and both evidences with their thresholds."""
    story = Story(make_policy())
    story.tick(story.audits(5, excess=0.02))
    early = report_of(story, "agree")
    story.state = story.tick(story.audits(30, excess=0.02)).state if early.verdict else story.state

    assert early.verdict is Verdict.UNDECIDED
    assert not early.can_advance
    assert "mean 0.02 within bound 0.2, 5 units" in early.reason
    assert "log e safe" in early.reason
    assert early.mean == pytest.approx(0.02)
    assert early.bound == 0.2


def test_harm_is_proven_in_few_units_and_is_not_outvoted() -> None:
    """A disagreement of .6 over a bound of .2 is harm after a handful of sessions."""
    story = Story(make_policy())

    decision = story.tick(story.audits(9, excess=0.6, slices=("mid",)))
    report = next(item for item in decision.verdicts if (item.id, item.slice_id) == ("agree", "mid"))

    assert report.verdict is Verdict.HARM
    assert report.log_e_harm >= report.threshold
    assert "over bound 0.2" in report.reason
    assert "harm proven, log e" in report.reason


def test_a_change_after_a_long_good_past_is_harm_too() -> None:
    """The watch sees what the plain e-process has become blind to."""
    story = Story(make_policy())
    story.tick(story.audits(600, slices=("mid",)))

    decision = story.tick(story.audits(40, excess=0.5, slices=("mid",), value_name="audit.kl"))
    report = next(item for item in decision.verdicts if (item.id, item.slice_id) == ("quality", "mid"))

    assert report.verdict is Verdict.HARM
    assert report.log_e_harm < report.threshold
    assert report.reason.startswith("change detected: the newest ")
    assert " UTC have mean " in report.reason
    assert "within" not in report.reason


def test_missing_audits_are_the_worst_case_for_promotion_and_left_out_for_rollback() -> None:
    """F12: half of the audits missing proves neither harm nor safety, and more than max_share is an ERROR."""
    story = Story(make_policy())
    story.tick(story.audits(30, missing=True))
    all_missing = report_of(story, "agree")
    story.tick(story.audits(30))
    half_missing = report_of(story, "agree")

    assert all_missing.verdict is Verdict.ERROR
    assert "30 of 30 audits missing, 100.0% over 10.0%" in all_missing.reason
    assert half_missing.verdict is Verdict.ERROR
    assert half_missing.log_e_safe < half_missing.threshold_safe
    assert half_missing.log_e_harm == 0.0
    assert not half_missing.can_advance


def test_a_few_missing_audits_and_none_scored_is_no_data() -> None:
    """Below twenty, missing audits are no finding, but not a pass either."""
    story = Story(make_policy())
    story.tick(story.audits(3, missing=True))

    assert "3 audits missing, none scored" in report_of(story, "agree").reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, 1.5])
def test_what_is_no_number_or_out_of_range_counts_as_missing(value: float) -> None:
    """A failed measurement is an error, never a zero."""
    story = Story(make_policy())
    story.tick(story.audits(4, value_name="audit.token_disagreement", value=value))
    report = report_of(story, "agree")

    assert (report.units, report.missing) == (0, 8)


def test_a_missing_floor_makes_the_pair_worthless() -> None:
    """An excess over an unknown floor is unknown."""
    story = Story(make_policy())
    story.tick(story.audits(4, floor=None))

    assert report_of(story, "agree").units == 0


def test_kl_is_capped() -> None:
    """One session of endless KL counts as the cap, so it cannot decide alone."""
    story = Story(make_policy())
    story.tick(story.audits(1, value_name="audit.kl", value=1e9, floor=0.0, slices=("mid",)))
    report = report_of(story, "quality")

    assert report.mean == pytest.approx(2.0)
    assert report.verdict is Verdict.UNDECIDED


def test_a_latency_limit_becomes_a_proportion() -> None:
    """Values over the limit are events, an endless wait is one of them; their share is bounded."""
    story = Story(with_gates(SLO))
    story.run_to("half")
    slow = story.served(3, value_name="serve.ttft_ms", value=math.inf)
    fast = story.served(7, value_name="serve.ttft_ms", value=1999.0)
    story.tick(slow + fast)

    report = report_of(story, "slo", "long")
    assert report.mean == pytest.approx(0.3)
    assert (report.need, report.bound) == ("no_harm", 0.1)
    assert (report.can_advance, report.verdict) == (False, Verdict.UNDECIDED)
    assert "10 of the " in report.reason
    story.tick(story.served(60, value_name="serve.ttft_ms", value=1999.0))
    assert report_of(story, "slo", "long").can_advance


def test_no_harm_of_what_was_served_waits_until_gross_harm_would_have_shown() -> None:
    """At the number it asks for, 95 % of the candidates that grossly fail have been called harmful."""
    rng = np.random.default_rng(5)
    policy = with_gates(SLO)
    gate = next(item for item in policy.spec.guardrails.items if item.id == "slo")
    least, alpha = least_served(policy, gate, 0.5), harm_alpha(policy, gate)
    assert (least_served(policy, gate, 0.0), least > 10) == (0, True)

    noticed = 0
    for is_slow in rng.random((400, least)) < 4 * 0.1:
        evidence = BetaBinomial(0.1, "harm")
        for value in is_slow:
            evidence = evidence.update(float(value))
        noticed += evidence.log_e_max >= log_threshold(alpha)
    assert 0.92 <= noticed / 400 <= 0.99


def test_a_ratio_waits_until_a_candidate_that_the_breaker_would_stop_would_have_shown() -> None:
    """Failures of sparse alone tell less, the more of the traffic sparse has; 95 % have shown by then."""
    policy, alpha = with_gates(RATIO), 0.001
    gate = next(item for item in policy.spec.guardrails.items if item.id == "rate")
    least = [events_to_notice(1.25, share, alpha, 0.5) for share in (0.1, 0.5, 0.95)]
    assert least == sorted(least)
    assert least_served(policy, gate, 0.5) > 1

    rng, noticed = np.random.default_rng(6), 0
    for has_failed in rng.random((400, least[1])) < 0.5:
        evidence = Split.start(RATIO_TILTS).update(int(has_failed.sum()), int(has_failed.sum()), 1.25 / 2.25)
        noticed += evidence.log_e_max >= log_threshold(alpha)
    assert 0.92 <= noticed / 400 <= 1.0


@pytest.mark.parametrize(
    ("name", "asked", "shown", "by_gross"),
    [("fast-staging", 56, 0.50, 120), ("long-context-only", 28, 0.05, 133), ("demo", 23, 0.08, 115)],
)
def test_failures_between_bound_and_breaker_may_pass_unseen(
    name: str, asked: int, shown: float, by_gross: int
) -> None:
    """What docs/statistics.md, F10, says of failures at four times the bound: how many have shown by then."""
    policy = load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    gate = next(item for item in policy.spec.guardrails.items if item.value == "serve.failed")
    assert gate.bound is not None
    assert gate.bound.max is not None
    alpha, chance = harm_alpha(policy, gate), 4 * gate.bound.max
    assert least_served(policy, gate, 0.5) == asked
    assert hits_to_notice(gate.bound.max, chance, alpha) == by_gross

    rng = np.random.default_rng(7)
    noticed = 0
    for has_failed in rng.random((2000, asked)) < chance:
        evidence = BetaBinomial(gate.bound.max, "harm")
        for value in has_failed:
            evidence = evidence.update(float(value))
        noticed += evidence.log_e_max >= log_threshold(alpha)
    assert noticed / 2000 == pytest.approx(shown, abs=0.04)


def test_a_bounded_mean_without_floor_is_judged_against_max() -> None:
    """Dropped mass has no noise floor; its mean itself is bounded."""
    story = Story(with_gates(MASS))
    story.tick(story.audits(60, value_name="audit.dropped_mass_mean", value=0.01, floor=None))

    report = report_of(story, "mass")
    assert report.verdict is Verdict.SAFE
    assert report.mean == pytest.approx(0.01)


def test_two_arms_need_both_arms() -> None:
    """With no dense request seen the ratio is unknown; with both, events decide."""
    story = Story(with_gates(RATIO))
    story.run_to("half")
    story.tick(story.served(15, failed=3))
    one_arm = report_of(story, "rate", "*")
    story.tick(story.served(100, variant="dense", failed=2) + story.served(85))
    both = report_of(story, "rate", "*")
    decision = story.tick(story.served(25, failed=25, value_name="serve.failed"))

    assert one_arm.verdict is Verdict.NO_DATA
    assert "one of the two arms was never observed" in one_arm.reason
    assert both.verdict is Verdict.UNDECIDED
    assert both.can_advance
    assert decision.state.outcome == "rolled_back"


def test_operational_guardrails_are_not_asked_in_shadow() -> None:
    """At share 0 nobody is served by sparse, so failures are not required there, and are afterwards."""
    story = Story(make_policy(without_approval))
    assert not report_of(story, "errors", "*").is_required
    story.run_to("half")

    report = report_of(story, "errors", "*")
    assert report.is_required
    assert report.verdict is Verdict.NO_DATA
    assert not report.can_advance


def test_the_error_budget_is_never_overspent() -> None:
    """All tests of all guardrails, with every fresh start and try, sum to alpha_total (F10)."""
    for policy in (make_policy(), with_gates(RATIO, SLO, MASS)):
        items = policy.spec.guardrails.items
        spent = sum(
            harm_alpha(policy, gate, number) * num_tests(policy, gate) * num_starts(policy, gate)
            for gate in items
            for number in range(1, 40)
        )

        assert spent == pytest.approx(policy.spec.guardrails.alpha_total)


def test_an_own_alpha_is_split_over_its_slices() -> None:
    """The sample-ratio test spends .001 over both slices and all tries, half of it in the first."""
    policy = make_policy()
    srm = policy.spec.guardrails.items[-1]

    assert harm_alpha(policy, srm) == pytest.approx(0.00025)


def test_bounds_are_scaled_to_the_evidence() -> None:
    """KL by its cap, a paired bound by its floor cap, an assignment not at all."""
    policy = with_gates(RATIO)
    gates = {gate.id: gate for gate in policy.spec.guardrails.items}

    assert scaled_bound(policy, gates["quality"]) == pytest.approx((0.2 + 0.1) / 1.1)
    assert scaled_bound(policy, gates["agree"]) == pytest.approx((0.2 + 0.1) / 1.1)
    assert scaled_bound(policy, gates["rate"]) == 1.25
    assert scaled_bound(policy, gates["srm"]) == 0.0
    assert scaled_bound(policy, policy.spec.benefit[0]) == pytest.approx(0.45)
    assert new_cell(policy, gates["srm"], "mid", "").safe is None
