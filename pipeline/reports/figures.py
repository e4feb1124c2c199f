"""What a rollout saved and what it cost: figures per slice from the records, dense beside sparse.

Sessions are assigned by chance within a slice, so dense and sparse may be compared there. Totals weigh
each slice by all its traffic; adding up the arms would compare long prompts with short ones.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sentei.monitors.records import FAILED_OUTCOMES, AuditStatus, Outcome

Row = Mapping[str, Any]
MIN_REQUESTS = (
    20  # fewer answers than this in an arm: said to be few, and the slowest stands for the 95th pct.
)


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One variant in one slice, over the requests that were assigned to it; latency of answered ones."""

    requests: int
    answered: int
    failed: int
    fallbacks: int  # failed in sparse, answered by dense
    prompt_tokens_mean: float | None
    ttft_ms_p50: float | None
    ttft_ms_p95: float | None  # of fewer than MIN_REQUESTS answers the slowest
    tpot_ms_p50: float | None  # None also where every answer was a single token
    total_ms_p50: float | None
    compute_s_per_1k_tokens: float | None
    density: float | None  # mean share of the causal blocks that the prefills kept, where the engine says it

    @property
    def is_few(self) -> bool:
        """Whether there are answers, and so few that their times say little."""
        return 0 < self.answered < MIN_REQUESTS


@dataclass(frozen=True, slots=True)
class QualityFigures:
    """Audited sessions of one slice at one rung; means over answers."""

    slice_id: str
    rung_id: str
    scored: int
    missing: int
    kl: float | None
    kl_floor: float | None
    token_disagreement: float | None
    token_disagreement_floor: float | None
    dropped_mass_mean: float | None
    dropped_mass_p99: float | None
    diverged_share: float | None  # answers with at least one other token
    compute_ratio: float | None  # sparse over dense seconds, same requests
    dense_compute_s_mean: float | None  # of one request
    sparse_compute_s_mean: float | None
    tokens: int  # prompts and replayed answers, where the prompt's length was recorded


@dataclass(frozen=True, slots=True)
class SliceFigures:
    """Both arms of one slice."""

    slice_id: str
    requests: int
    dense: ArmFigures
    sparse: ArmFigures


@dataclass(frozen=True, slots=True)
class Savings:
    """Changes of sparse against dense, weighted by the traffic of slices that had both; -0.3: 30 % less.

    The paired one is of the newest rung that was audited in each slice: milder ones before it are history.
    """

    ttft_p50_change: float | None
    paired_compute_change: float | None  # the same requests through both, from the audits
    tpot_p50_change: float | None
    slices_compared: int
    is_few: bool  # an arm of a slice that was compared has fewer than MIN_REQUESTS answers


@dataclass(frozen=True, slots=True)
class AuditOverhead:
    """What watching costs."""

    chosen: int
    scored: int
    missing: int
    errors: int
    compute_s: float
    serving_compute_s: float

    @property
    def share(self) -> float | None:
        """Audit seconds over serving seconds."""
        return self.compute_s / self.serving_compute_s if self.serving_compute_s else None


def slice_figures(requests: Sequence[Row], slice_ids: Sequence[str]) -> tuple[SliceFigures, ...]:
    """Return the figures of each slice, in the order of the policy."""
    by_slice: defaultdict[str, list[Row]] = defaultdict(list)
    for row in requests:
        by_slice[row["slice_id"]].append(row)
    return tuple(
        SliceFigures(
            slice_id=slice_id,
            requests=len(by_slice[slice_id]),
            dense=_arm([r for r in by_slice[slice_id] if r["variant_assigned"] == "dense"]),
            sparse=_arm([r for r in by_slice[slice_id] if r["variant_assigned"] == "sparse"]),
        )
        for slice_id in slice_ids
    )


def quality_figures(audits: Sequence[Row]) -> tuple[QualityFigures, ...]:
    """Return the audited quality of each slice and rung; the one whose score came last comes last."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in audits:
        key = (row["slice_id"], row["rung_id"])
        rows = groups.setdefault(key, [])
        rows.append(row)
        if row["status"] == AuditStatus.SCORED:
            groups[key] = groups.pop(key)
    return tuple(_quality(slice_id, rung_id, rows) for (slice_id, rung_id), rows in groups.items())


def newest_quality(quality: Sequence[QualityFigures]) -> tuple[QualityFigures, ...]:
    """Return the newest group with a score of each slice, in their order: the last is of the reached rung."""
    newest: dict[str, QualityFigures] = {}
    for item in quality:
        if item.scored:
            newest.pop(item.slice_id, None)
            newest[item.slice_id] = item
    return tuple(newest.values())


def paired_quality(newest: Sequence[QualityFigures]) -> tuple[QualityFigures, ...]:
    """Return the groups whose requests have the model time of both: only these compare the same requests."""
    return tuple(item for item in newest if item.compute_ratio is not None)


def savings(figures: Sequence[SliceFigures], newest: Sequence[QualityFigures]) -> Savings:
    """Return what sparse saves, compared slice by slice; `newest` is that of newest_quality()."""
    compared = [f for f in figures if f.dense.answered and f.sparse.answered]
    paired = paired_quality(newest)
    dense = mean_of_audits(paired, lambda item: item.dense_compute_s_mean)
    sparse = mean_of_audits(paired, lambda item: item.sparse_compute_s_mean)
    return Savings(
        ttft_p50_change=_change(compared, lambda arm: arm.ttft_ms_p50),
        paired_compute_change=sparse / dense - 1 if dense and sparse else None,
        tpot_p50_change=_change(compared, lambda arm: arm.tpot_ms_p50),
        slices_compared=len(compared),
        is_few=any(arm.is_few for item in compared for arm in (item.dense, item.sparse)),
    )


def audit_overhead(requests: Sequence[Row], audits: Sequence[Row]) -> AuditOverhead:
    """Return what the audits took beside serving."""
    statuses = Counter(row["status"] for row in audits)
    return AuditOverhead(
        chosen=sum(bool(row["chosen_for_audit"]) for row in requests),
        scored=statuses[AuditStatus.SCORED],
        missing=statuses[AuditStatus.MISSING],
        errors=statuses[AuditStatus.ERROR],
        compute_s=sum(row["dense_compute_s"] + row["sparse_compute_s"] for row in audits),
        serving_compute_s=sum(row["compute_s"] for row in requests),
    )


def _arm(rows: Sequence[Row]) -> ArmFigures:
    answered = [row for row in rows if row["outcome"] == Outcome.OK]
    tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in answered)
    compute_s = sum(row["compute_s"] for row in answered)
    return ArmFigures(
        requests=len(rows),
        answered=len(answered),
        failed=sum(row["outcome"] in FAILED_OUTCOMES for row in rows),
        fallbacks=sum(row["outcome"] in (Outcome.FALLBACK_BEFORE, Outcome.FALLBACK_MID) for row in rows),
        prompt_tokens_mean=_mean(row["prompt_tokens"] for row in rows),
        ttft_ms_p50=_quantile((row["ttft_ms"] for row in answered), 0.5),
        ttft_ms_p95=_quantile(
            (row["ttft_ms"] for row in answered), 0.95 if len(answered) >= MIN_REQUESTS else 1
        ),
        tpot_ms_p50=_quantile((row["tpot_ms"] for row in answered), 0.5),
        total_ms_p50=_quantile((row["total_ms"] for row in answered), 0.5),
        compute_s_per_1k_tokens=1000 * compute_s / tokens if tokens and compute_s else None,
        density=_mean(_density(row) for row in answered),
    )


def _density(row: Row) -> float | None:
    """What a request's prefill kept, from the engine's account of its attention."""
    kept = row.get("attention") or ""
    return json.loads(kept).get("prefill_density") if kept else None


def _quality(slice_id: str, rung_id: str, rows: Sequence[Row]) -> QualityFigures:
    scored = [row for row in rows if row["status"] == AuditStatus.SCORED]
    dense_s = sum(row["dense_compute_s"] for row in scored)
    sparse_s = sum(row["sparse_compute_s"] for row in scored)
    means = {
        name: _mean(row[name] for row in scored)
        for name in (
            "kl",
            "kl_floor",
            "token_disagreement",
            "token_disagreement_floor",
            "dropped_mass_mean",
            "dropped_mass_p99",
        )
    }
    return QualityFigures(
        slice_id=slice_id,
        rung_id=rung_id,
        scored=len(scored),
        missing=len(rows) - len(scored),
        **means,
        diverged_share=_mean(float(row["first_divergence"] is not None) for row in scored),
        compute_ratio=sparse_s / dense_s if dense_s and sparse_s else None,
        dense_compute_s_mean=dense_s / len(scored) if dense_s else None,
        sparse_compute_s_mean=sparse_s / len(scored) if sparse_s else None,
        tokens=sum(row["prompt_tokens"] + row["tokens"] for row in scored if row.get("prompt_tokens")),
    )


def mean_of_arms(
    figures: Sequence[SliceFigures], value_of: Callable[[ArmFigures], float | None]
) -> tuple[float, float] | None:
    """Return dense's and sparse's mean over slices where both have a value, weighted by all their traffic."""
    both = [
        (item.requests, before, after)
        for item in figures
        if (before := value_of(item.dense)) is not None and (after := value_of(item.sparse)) is not None
    ]
    dense = _weighted([(num, before) for num, before, _ in both])
    sparse = _weighted([(num, after) for num, _, after in both])
    return None if dense is None or sparse is None else (dense, sparse)


def mean_of_audits(
    quality: Sequence[QualityFigures], value_of: Callable[[QualityFigures], float | None]
) -> float | None:
    """Return the mean over the groups that have a value, weighted by their scored audits."""
    return _weighted([(item.scored, value) for item in quality if (value := value_of(item)) is not None])


def _weighted(values: Sequence[tuple[int, float]]) -> float | None:
    total = sum(weight for weight, _ in values)
    return sum(weight * value for weight, value in values) / total if total else None


def find_rung(evaluation: Mapping[str, Any] | None, rung_id: str) -> Mapping[str, Any] | None:
    """Return what the document of `sentei evaluate` says of a rung, if there is one and it knows the rung."""
    rungs = evaluation.get("rungs", []) if evaluation is not None else []
    return next((item for item in rungs if item.get("rung") == rung_id), None)


def _change(figures: Sequence[SliceFigures], value_of: Callable[[ArmFigures], float | None]) -> float | None:
    means = mean_of_arms(figures, value_of)
    return means[1] / means[0] - 1 if means is not None and means[0] else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _quantile(values: Iterable[float | None], q: float) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.quantile(known, q)) if known else None
