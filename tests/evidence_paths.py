"""The evidence over many streams at once, by the block formulas that the simulation runs on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from sentei.policies.evidence import BetaBinomial, Betting, Detector, Direction, Interval, log_threshold
from sentei.policies.evidence.base import BETTING_CUT, Floats, log_mean_exp_paths
from sentei.policies.evidence.betting import Moments, betting_steps
from sentei.policies.evidence.counts import beta_binomial_log_e
from sentei.policies.evidence.interval import CS_CUT, INTERVAL_ALPHA
from sentei.policies.evidence.watch import detector_bets, detector_steps, detector_walk

Stream = TypeVar("Stream", Betting, BetaBinomial, Detector, Interval)


def betting_paths(
    values: Floats, *, bound: float, direction: Direction, alpha: float, cut: float = BETTING_CUT
) -> Floats:
    """F1 over many streams at once: log_e [streams, units] for values [streams, units]."""
    is_unit = np.ones(values.shape, dtype=np.bool_)
    _, scale = Moments.start(values.shape[:-1]).advance(values, is_unit)
    steps = betting_steps(values, is_unit, scale, bound=bound, direction=direction, alpha=alpha, cut=cut)
    return np.asarray(np.cumsum(steps, axis=-1))


def detector_paths(values: Floats, *, bound: float, cut: float = BETTING_CUT) -> Floats:
    """F14 over many streams at once: log_e [streams, units] for values [streams, units]."""
    bets = detector_bets(bound, cut)
    is_unit = np.ones(values.shape, dtype=np.bool_)
    steps = detector_steps(values, is_unit, bound=bound, bets=bets)
    paths = detector_walk(np.zeros((len(bets), *values.shape[:-1])), steps)
    return log_mean_exp_paths(np.moveaxis(paths, 0, -1))


def interval_paths(values: Floats, *, alpha: float = INTERVAL_ALPHA) -> tuple[Floats, Floats]:
    """F2 over many streams at once: low and high [streams, units] for values [streams, units]."""
    log_a = log_threshold(alpha / 2)
    step = np.arange(1, values.shape[-1] + 1)
    total = np.cumsum(values, axis=-1)
    spread = np.cumsum((values - (0.5 + total) / (step + 1)) ** 2, axis=-1)
    spread_before, total_before = _shifted(spread), _shifted(total)
    bets = np.minimum(np.sqrt(2 * log_a / ((0.25 + spread_before) * np.log1p(step))), CS_CUT)
    squares = (values - (0.5 + total_before) / step) ** 2
    noise = np.cumsum(squares * (-np.log1p(-bets) - bets), axis=-1)
    weight = np.cumsum(bets, axis=-1)
    middle, half = np.cumsum(bets * values, axis=-1) / weight, (log_a + noise) / weight
    low = np.maximum.accumulate(np.maximum(middle - half, 0.0), axis=-1)
    return low, np.minimum.accumulate(np.minimum(middle + half, 1.0), axis=-1)


def _shifted(values: Floats) -> Floats:
    return np.concatenate([np.zeros((*values.shape[:-1], 1)), values[..., :-1]], axis=-1)


def beta_binomial_paths(is_hit: Floats, *, bound: float, direction: Direction) -> Floats:
    """F5 over many streams at once: log_e [streams, units] for values [streams, units] of 0 and 1."""
    units = np.arange(1, is_hit.shape[-1] + 1)
    hits = np.cumsum(is_hit != 0, axis=-1)
    return beta_binomial_log_e(hits, units, bound=bound, direction=direction)


def update_all(evidence: Stream, values: Iterable[float]) -> Stream:
    """Feed units one after another; the same bytes as feeding them in any batches."""
    for value in values:
        evidence = evidence.update(value)
    return evidence
