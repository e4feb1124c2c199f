"""One guardrail or benefit, one slice and its evidence to one verdict with both numbers.

The error budget (F10): rollback is any-of, so every guardrail x slice x arm, and every time its evidence of
harm starts afresh (a new rung for quality, a new stage for operational values), gets its own part of what
the try may spend: over all tries a healthy candidate is rolled back with probability at most alpha_total.
Promotion is all-of, so each proof of safety is tested at the whole of what the try may spend.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from sentei.policies.evidence import GROSS, Betting, Split, events_to_notice, hits_to_notice, log_threshold
from sentei.policies.intake import own_mean, own_move, own_range
from sentei.policies.schema.budget import harm_alpha, no_gain_alpha, try_alpha
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Benefit, Guardrail
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import Verdict
from sentei.policies.state import Cell

MIN_MISSING = 20  # below so many audits the share of missing ones is no finding


@dataclass(frozen=True, slots=True)
class GuardrailReport:
    """The verdict on one guardrail, or one benefit, in one slice.

    mean, low, high and bound are in the metric's own unit. Of a benefit, "harm" is that the gain is absent
    and "safe" that it is there.
    """

    id: str
    slice_id: str  # "*" for a guardrail over all slices
    rung_id: str  # "" where the rung does not matter
    verdict: Verdict
    reason: str
    log_e_harm: float
    log_e_safe: float
    log_e_watch: float  # the e-CUSUM, against ln(detector_arl)
    units: int
    missing: int
    mean: float | None
    low: float | None  # the mean lies in [low, high] at all times with 95 %: for readers, not for verdicts
    high: float | None
    bound: float
    threshold: float  # log_e_harm at or above it proves harm
    threshold_safe: float  # log_e_safe at or above it proves safety
    action: str  # what a proven breach does
    need: str  # "all_safe" or "no_harm", of a benefit "proven" or "not_disproved": what this stage asks of it
    is_required: bool  # whether this stage asks anything of it
    lacking: int = 0  # units of sparse before which no_harm of what was served says nothing

    @property
    def can_advance(self) -> bool:
        """Whether this lets the stage end; what must be proven and is unseen never does."""
        if not self.is_required or self.verdict in (Verdict.SAFE, Verdict.GAIN):
            return True
        if self.need == "not_disproved":
            return self.verdict is not Verdict.NO_GAIN
        return self.need == "no_harm" and self.verdict is Verdict.UNDECIDED and self.lacking == 0


def own_bound(policy: Policy, guardrail: Guardrail) -> float:
    """The bound in the metric's own unit."""
    bound = guardrail.bound
    if bound is None:
        return harm_alpha(policy, guardrail)
    return next(v for v in (bound.max, bound.excess_over_floor, bound.ratio) if v is not None)


@dataclass(frozen=True, slots=True)
class View:
    """Where and when a guardrail or a benefit is judged; what follows `is_stale` is of guardrails alone."""

    slice_id: str  # "*" for a guardrail over all slices
    rung_id: str
    need: str
    try_number: int = 1
    is_stale: bool = False
    share: float = 0.0  # of the sessions that sparse really serves
    recent_from: int = 0  # the oldest part of the window in which missing audits count
    is_left: bool = False  # the stage leaves its proof to a later one, in so many words


def judge(policy: Policy, guardrail: Guardrail, cell: Cell | None, view: View) -> GuardrailReport:
    """Map the evidence to one verdict; harm beats error beats staleness beats safety."""
    threshold = log_threshold(harm_alpha(policy, guardrail, view.try_number))
    threshold_safe = log_threshold(try_alpha(policy, view.try_number))
    mean, limits = own_mean(policy, guardrail, cell), own_range(policy, guardrail, cell)
    verdict, why = _weigh(
        policy, guardrail, cell, Limits(threshold, threshold_safe, view.recent_from, view.need)
    )
    if view.is_stale and verdict in (Verdict.SAFE, Verdict.UNDECIDED):
        verdict, why = Verdict.STALE, "no news, so the past does not count"
    bound = own_bound(policy, guardrail)
    units = _num_units(cell, view.need)
    lacking = 0
    if verdict is Verdict.UNDECIDED and view.need == "no_harm" and not view.is_left:
        least = least_served(policy, guardrail, view.share, view.try_number)
        lacking = max(0, least - _num_candidates(cell))
        why += f"; {least - lacking} of the {least} sparse units in which gross harm shows" if lacking else ""
    return GuardrailReport(
        id=guardrail.id,
        slice_id=view.slice_id,
        rung_id=view.rung_id,
        verdict=verdict,
        reason=_explain(guardrail, mean, bound, units, why),
        log_e_harm=cell.harm.log_e_max if cell else 0.0,
        log_e_safe=cell.safe.log_e_max if cell and cell.safe else 0.0,
        log_e_watch=cell.watch.log_e_max if cell and cell.watch else 0.0,
        units=units,
        missing=cell.missing if cell else 0,
        mean=mean,
        low=limits[0] if limits else None,
        high=limits[1] if limits else None,
        bound=bound,
        threshold=threshold,
        threshold_safe=threshold_safe,
        action=guardrail.action,
        need=view.need,
        is_required=guardrail.metric.family == "quality" or view.share > 0,
        lacking=lacking,
    )


def judge_gain(
    policy: Policy, benefit: Benefit, cells: tuple[Cell | None, ...], view: View, *, is_required: bool
) -> GuardrailReport:
    """Whether sparse pays in one slice (F17): a gain by the first of the arms, its absence by any of them.

    It stops growth, it never takes anybody off sparse; so what is stale is no reason to say less than that.
    """
    lost = log_threshold(no_gain_alpha(policy, view.try_number))
    proven = log_threshold(try_alpha(policy, view.try_number))
    absent = [cell for cell in cells if cell is not None and cell.harm.log_e_max >= lost]
    cell = absent[0] if absent else cells[0]
    units, missing = (cell.phase_units, cell.missing) if cell is not None else (0, 0)
    log_e_safe = cell.safe.log_e_max if cell is not None and cell.safe is not None else 0.0
    log_e_harm = cell.harm.log_e_max if cell is not None else 0.0
    mean, limits = own_mean(policy, benefit, cell), own_range(policy, benefit, cell)
    low, high = limits if limits is not None else (None, None)
    bound = benefit.want.max
    if absent:
        verdict = Verdict.NO_GAIN
        low, high = (None if value is None else max(value, bound) for value in (low, high))
    elif units == 0:
        verdict = Verdict.NO_DATA
    elif view.is_stale:
        verdict = Verdict.STALE
    elif log_e_safe >= proven:
        verdict = Verdict.GAIN
        low, high = (None if value is None else min(value, bound) for value in (low, high))
    else:
        verdict = Verdict.UNDECIDED
    measured = _measured(mean, low, high, units)
    return GuardrailReport(
        id=benefit.id,
        slice_id=view.slice_id,
        rung_id=view.rung_id,
        verdict=verdict,
        reason=_explain_gain(verdict, measured, bound, cell, (lost, proven)),
        log_e_harm=log_e_harm,
        log_e_safe=log_e_safe,
        log_e_watch=0.0,
        units=units,
        missing=missing,
        mean=mean,
        low=low,
        high=high,
        bound=bound,
        threshold=lost,
        threshold_safe=proven,
        action="held",
        need=view.need,
        is_required=is_required,
    )


def _measured(mean: float | None, low: float | None, high: float | None, units: int) -> str:
    if mean is None:
        return "no model time compared yet"
    text = f"{mean:.3g} times dense's model time"
    text += "" if low is None or high is None else f" ({low:.3g} to {high:.3g} with 95%)"
    return f"{text} in {units} sessions"


def _explain_gain(
    verdict: Verdict, measured: str, bound: float, cell: Cell | None, thresholds: tuple[float, float]
) -> str:
    lost, proven = thresholds
    if verdict is Verdict.NO_GAIN:
        return f"no gain: {measured}, proven above {bound:.3g}"
    if verdict is Verdict.GAIN:
        return f"{measured}, gain proven: below {bound:.3g}"
    if verdict is Verdict.NO_DATA or cell is None:
        return f"{measured}; at most {bound:.3g} must be proven"
    if verdict is Verdict.STALE:
        return f"{measured}; no news, so the past does not count"
    safe = cell.safe.log_e_max if cell.safe is not None else 0.0
    text = f"{measured}; at most {bound:.3g} is not proven, log e {safe:.2f} of {proven:.2f}"
    text += f", its absence {cell.harm.log_e_max:.2f} of {lost:.2f}"
    sides = ((cell.safe, proven), (cell.harm, lost))
    left = [side.units_left(limit) for side, limit in sides if isinstance(side, Betting)]
    needed = min((units for units in left if units is not None), default=None)
    return text if needed is None else f"{text}; about {needed} more sessions like these decide"


def least_served(policy: Policy, guardrail: Guardrail, share: float, try_number: int = 1) -> int:
    """How many units of sparse a stage must see before `no_harm` of a served value lets it end (F10).

    0 for quality, whose `min_units` the loader holds to a floor of its own, and where nobody is served.
    Failures that are rarer than the breaker's share may not have shown by then.
    """
    if guardrail.metric.family != "operational" or share == 0 or guardrail.bound is None:
        return 0
    alpha = harm_alpha(policy, guardrail, try_number)
    failing = policy.spec.breaker.variant.failure_share
    if guardrail.bound.ratio is not None:
        return events_to_notice(guardrail.bound.ratio, share, alpha, failing)
    bound = guardrail.bound.max or 0.0
    gross = max(GROSS * bound, failing if guardrail.value == "serve.failed" else 0.0)
    return hits_to_notice(bound, min(gross, 0.99), alpha)


def _num_candidates(cell: Cell | None) -> int:
    if cell is None:
        return 0
    return cell.candidate_units if isinstance(cell.harm, Split) else cell.units


def _num_units(cell: Cell | None, need: str) -> int:
    """Of proof the units of this phase; where only harm must be absent, all that could have shown it."""
    if cell is None:
        return 0
    if isinstance(cell.harm, Split):
        return cell.candidate_units + cell.control_units
    return cell.phase_units if need == "all_safe" else cell.units


@dataclass(frozen=True, slots=True)
class Limits:
    """What the log evidence is held against, since when missing audits count, and what is asked."""

    harm: float
    safe: float
    recent_from: int
    need: str


def _weigh(policy: Policy, guardrail: Guardrail, cell: Cell | None, limits: Limits) -> tuple[Verdict, str]:
    threshold, threshold_safe = limits.harm, limits.safe
    if cell is None or (cell.units == 0 and cell.missing == 0 and cell.candidate_units == 0):
        return Verdict.NO_DATA, "nothing observed"
    is_assignment = guardrail.metric.family == "assignment"
    if guardrail.test == "event_split" and not (cell.control_units and cell.candidate_units):
        return Verdict.NO_DATA, "one of the two arms was never observed"
    harm = cell.harm.log_e_max
    if harm >= threshold:
        word = "sample ratio mismatch" if is_assignment else "harm proven"
        return (
            Verdict.SRM if is_assignment else Verdict.HARM
        ), f"{word}, log e {harm:.2f} over {threshold:.2f}"
    if cell.watch is not None:
        watch, limit = cell.watch.log_e_max, log_threshold(1 / policy.spec.guardrails.detector_arl)
        if watch >= limit:
            why = f"{_describe_move(policy, guardrail, cell)}, log e-CUSUM {watch:.2f} over {limit:.2f}"
            return Verdict.HARM, why
    if fault := _find_missing(policy, cell, limits.recent_from):
        return Verdict.ERROR, fault
    if _num_units(cell, limits.need) == 0 and guardrail.test != "event_split":
        what = "none scored" if cell.units == 0 else "none scored in this phase"
        return Verdict.NO_DATA, f"{cell.missing} audits missing, {what}"
    safe = cell.safe.log_e_max if cell.safe else 0.0
    if cell.safe is not None and safe >= threshold_safe:
        return Verdict.SAFE, f"safety proven, log e {safe:.2f} over {threshold_safe:.2f}"
    if is_assignment:
        return Verdict.UNDECIDED, f"no mismatch, log e {harm:.2f} of {threshold:.2f}"
    return (
        Verdict.UNDECIDED,
        f"log e safe {safe:.2f} of {threshold_safe:.2f}, harm {harm:.2f} of {threshold:.2f}",
    )


def _find_missing(policy: Policy, cell: Cell, recent_from: int) -> str | None:
    """Whether too many of the audits that were chosen lately have no score, and why they have none."""
    parts = [part for part in cell.recent if part.number >= recent_from]
    chosen, missing = sum(part.chosen for part in parts), sum(part.missing for part in parts)
    rule = policy.spec.audit.missing
    if chosen < MIN_MISSING or missing / chosen <= rule.max_share:
        return None
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(dict(part.reasons))
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    share = f"{missing / chosen:.1%} over {rule.max_share:.1%} in {format_duration(rule.window)}"
    return f"{missing} of {chosen} audits missing, {share} ({why})"


def _describe_move(policy: Policy, guardrail: Guardrail, cell: Cell) -> str:
    """What has changed, and since when: the mean over all units may still lie within the bound."""
    watch, mean = cell.watch, own_move(policy, guardrail, cell)
    if watch is None or mean is None:
        return "change detected"
    begin = watch.peak_begin_s
    since = "" if begin is None else f" since {datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"change detected: the newest {watch.peak_run} units{since} have mean {mean:.3g}"


def _explain(guardrail: Guardrail, mean: float | None, bound: float, units: int, why: str) -> str:
    if guardrail.bound is None:
        share = "" if mean is None else f"{mean:.3g} went to the candidate, "
        return f"{share}{units} units: {why}"
    if guardrail.test == "event_split":
        return f"rate ratio bound {bound:.3g}, {units} units: {why}"
    if mean is None:
        return f"no mean yet, bound {bound:.3g}, {units} units: {why}"
    if why.startswith("change detected"):
        return f"{why}; bound {bound:.3g}, mean of all {units} units {mean:.3g}"
    relation = "over" if mean > bound else "within"
    return f"mean {mean:.3g} {relation} bound {bound:.3g}, {units} units: {why}"
