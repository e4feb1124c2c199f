"""Evidently behind one function: does the newest window of a column differ from its reference?

The score is a distance: higher means further away (Evidently's p-value methods point the other way and
are not used). The threshold is that of a permutation test: the largest distance after window and reference
were shuffled NUM_SHUFFLES times, as if nothing differed but the excess that the policy's guardrail allows.
A window whose mean is worse by no more than that is clear, whatever its shape.
While nothing more differs the window as it came is the furthest with probability at most 1 in
NUM_SHUFFLES + 1, whatever the values are: also where nearly all are equal, of which resampling the reference
knows too little.
No answer is never a pass: an exception or a value that is no number is "error", too little data "no_data".

Evidently takes about 3 s to import and holds the GIL, so it loads on first use; run the check in a
thread.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from sentei.monitors.records import DriftResult
from sentei.monitors.store import Store
from sentei.monitors.window import DriftWindow, read_window
from sentei.policies.signals import DriftSignal

METHOD = (
    "wasserstein"  # normalised by the reference's standard deviation, at least MIN_SCALE (Evidently's rule)
)
MIN_SCALE = 0.001
MIN_REFERENCE_UNITS = 5
NUM_SHUFFLES = 499  # at most one false alarm in 500 windows
_CHUNK = 1 << 22  # numbers of one batch of shuffles in memory
HIGHER_IS_WORSE = frozenset({"kl", "token_disagreement", "dropped_mass_mean", "dropped_mass_p99"})

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DriftSpec:
    """One signal of the policy; `allowed_excess` is in the column's own unit."""

    signal_id: str
    column: str
    window_units: int
    allowed_excess: float | None = (
        None  # None: nothing bounds it, so it is compared with its own first windows
    )


def run_drift(
    store: Store, rollout_id: str, specs: Iterable[DriftSpec], *, folder: Path, now_s: float
) -> list[DriftResult]:
    """Check each signal that has a new full window, save its HTML report, and write the result down."""
    judged = {result.signal_id: result.window_id for _, result in store.read_drift(rollout_id)}
    results = []
    for spec in specs:
        window = read_window(
            store,
            rollout_id,
            spec.column,
            window_units=spec.window_units,
            has_dense_reference=spec.allowed_excess is not None,
        )
        if window.window_id <= judged.get(spec.signal_id, 0):
            continue
        html_path = folder / f"{spec.signal_id}-{window.window_id:04d}.html"
        signal = check_drift(spec, window, html_path=html_path)
        result = _result(signal, rollout_id, now_s, html_path if html_path.exists() else None)
        store.add_drift(result)
        results.append(result)
    return results


def check_drift(spec: DriftSpec, window: DriftWindow, *, html_path: Path | None = None) -> DriftSignal:
    """Compare one window with its reference; whatever goes wrong is the status "error", never a pass."""
    if not window.window_id or len(window.reference) < MIN_REFERENCE_UNITS:
        detail = f"{len(window.current)} current and {len(window.reference)} reference units"
        return _signal(spec, window, "no_data", detail=detail)
    current, reference = np.asarray(window.current), np.asarray(window.reference)
    broken = int((~np.isfinite(current)).sum()), int((~np.isfinite(reference)).sum())
    if any(broken):
        detail = f"{broken[0]} of the window's and {broken[1]} of the reference's values are no numbers"
        return _signal(spec, window, "error", detail=detail)
    try:
        threshold = calibrate_threshold(reference, current, spec.allowed_excess or 0.0)
        score = _evidently_score(spec.column, current, reference, threshold=threshold, html_path=html_path)
    except Exception as error:  # Evidently raises whatever pandas, scipy or its own checks raise
        return _signal(spec, window, "error", detail=f"{type(error).__name__}: {error}")
    if not np.isfinite(score):
        return _signal(spec, window, "error", score=None, threshold=threshold, detail="score is not finite")
    # A mean excess that the guardrail allows is no drift, however it is spread. Shuffling knows only one that
    # is the same for all; sparse attention differs in a few answers, and in most not at all.
    allowed = spec.allowed_excess or 0.0
    is_worse = spec.column not in HIGHER_IS_WORSE or current.mean() > reference.mean() + allowed
    # Equal up to rounding is not over: two sums of the same numbers need not agree in their last bit.
    is_over = score > threshold * (1 + 1e-9)
    status = "drift" if is_over and is_worse else "clear"
    detail = (
        f"{spec.column} mean {current.mean():.4g} against {reference.mean():.4g}, "
        f"{METHOD} {score:.3g} over {threshold:.3g}"
        if status == "drift"
        else f"{spec.column} mean {current.mean():.4g} against {reference.mean():.4g}"
    )
    return _signal(spec, window, status, score=score, threshold=threshold, detail=detail)


def calibrate_threshold(reference: Floats, current: Floats, allowed_excess: float, *, seed: int = 0) -> float:
    """Return the largest distance of shuffled windows, each moved by the excess, from what is left."""
    generator = np.random.default_rng(seed)
    # Without its excess, as far as that is allowed, the window may be shuffled into its reference.
    excess = float(np.clip(current.mean() - reference.mean(), 0.0, allowed_excess))
    pooled = np.concatenate([reference, current - excess])
    size = max(1, _CHUNK // (2 * len(pooled)))
    largest = 0.0
    for begin in range(0, NUM_SHUFFLES, size):
        rows = min(size, NUM_SHUFFLES - begin)
        order = generator.permuted(np.tile(np.arange(len(pooled)), (rows, 1)), axis=1)
        in_window = np.zeros((rows, len(pooled)), dtype=np.bool_)
        np.put_along_axis(in_window, order[:, : len(current)], True, axis=1)
        largest = max(largest, float(_distances(pooled, in_window, allowed_excess).max()))
    return largest


def _distances(pooled: Floats, in_window: npt.NDArray[np.bool_], excess: float) -> Floats:
    """`distance` of each row: the values outside the window, and those inside it moved by `excess`.

    The area between two distribution functions, over the sorted values of both, all rows at once.
    """
    values = np.concatenate([pooled, pooled + excess])
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order])
    num_current = int(in_window[0].sum())
    num_reference = len(pooled) - num_current
    outside, inside = ~in_window / num_reference, in_window / num_current
    signed = np.concatenate([outside, -inside], axis=1)[:, order]
    areas = (np.abs(np.cumsum(signed, axis=1)[:, :-1]) * gaps).sum(axis=1)
    centred = pooled - pooled.mean()
    means = outside @ centred
    variances = (outside * (centred - means[:, None]) ** 2).sum(axis=1)
    return np.asarray(areas / np.maximum(np.sqrt(variances), MIN_SCALE))


def distance(reference: Floats, current: Floats) -> float:
    """Return the distance that Evidently computes for METHOD; a test holds the two together."""
    return float(wasserstein_distance(reference, current) / max(float(np.std(reference)), MIN_SCALE))


def _evidently_score(
    column: str, current: Floats, reference: Floats, *, threshold: float, html_path: Path | None
) -> float:
    """Return Evidently's distance; its page judges by our threshold, as the signal does."""
    os.environ["DO_NOT_TRACK"] = "true"
    with warnings.catch_warnings():
        # Import-time deprecations of its dependencies (litestar, numpy.core); ours stay errors elsewhere.
        warnings.simplefilter("ignore")
        import pandas
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift

        columns = DataDefinition(numerical_columns=[column])
        frames = [
            Dataset.from_pandas(pandas.DataFrame({column: values}), data_definition=columns)
            for values in (current, reference)
        ]
        snapshot = Report([ValueDrift(column=column, method=METHOD, threshold=threshold)]).run(*frames)
        score = float(snapshot.dict()["metrics"][0]["value"])
        if html_path is not None:
            html_path.parent.mkdir(parents=True, exist_ok=True)
            snapshot.save_html(str(html_path))
    return score


def _signal(
    spec: DriftSpec,
    window: DriftWindow,
    status: str,
    *,
    score: float | None = None,
    threshold: float | None = None,
    detail: str = "",
) -> DriftSignal:
    return DriftSignal(
        id=spec.signal_id,
        status=status,
        score=score,
        threshold=threshold,
        window_units=spec.window_units,
        window_id=window.window_id,
        detail=detail,
    )


def _result(signal: DriftSignal, rollout_id: str, now_s: float, html_path: Path | None) -> DriftResult:
    return DriftResult(
        rollout_id=rollout_id,
        signal_id=signal.id,
        at_s=now_s,
        status=signal.status,
        score=signal.score,
        threshold=signal.threshold,
        window_units=signal.window_units,
        window_id=signal.window_id,
        detail=signal.detail,
        html_path=str(html_path) if html_path else "",
    )
