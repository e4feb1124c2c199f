"""F14: the watch that a long good past does not blind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sentei.policies.evidence.base import BETTING_CUT, Bools, Floats, log_mean_exp

DETECTOR_BETS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Detector:
    """F14: e-CUSUM, the watch that a long good past does not blind.

    M <- max(M, 1) * (1 + l * (x - bound)), averaged over the bets l in DETECTOR_BETS cut at `cut` / bound.
    Source: Shin, Ramdas, Rinaldo (arXiv 2203.03532). Guarantee: while the conditional mean is at most
    `bound`, the average number of units before M >= A is at least A. Measured: after 2000 good units it
    saw a doubled bound after 38 more in the median, where a plain e-process saw nothing in 1000.
    """

    bound: float
    cut: float = BETTING_CUT
    logs: tuple[float, ...] = (0.0,) * len(DETECTOR_BETS)
    units: int = 0
    log_e: float = 0.0
    log_e_max: float = 0.0

    def update(self, value: float) -> Detector:
        """Watch one more unit."""
        logs = tuple(
            max(log, 0.0) + math.log1p(min(bet, self.cut / self.bound) * (value - self.bound))
            for log, bet in zip(self.logs, DETECTOR_BETS, strict=True)
        )
        log_e = log_mean_exp(logs)
        return replace(
            self, logs=logs, units=self.units + 1, log_e=log_e, log_e_max=max(self.log_e_max, log_e)
        )


def detector_bets(bound: float, cut: float) -> Floats:
    """The bets of one bound."""
    return np.asarray(np.minimum(np.array(DETECTOR_BETS), cut / bound))


def detector_steps(values: Floats, is_unit: Bools, *, bound: float, bets: Floats) -> Floats:
    """F14 over a block: what each unit adds to log M of each bet, [bets, ..., units]."""
    shaped = bets.reshape(-1, *(1,) * values.ndim)
    return np.asarray(np.where(is_unit, np.log1p(shaped * (values - bound)), 0.0))


def detector_walk(logs: Floats, steps: Floats) -> Floats:
    """F14 over a block: log M of each bet after each unit, [bets, ..., units], going on from `logs`.

    max(M, 1) * z, unit after unit, is the running sum of log z plus the largest drop before it.
    """
    sums = np.cumsum(steps, axis=-1)
    drops = np.concatenate([np.maximum(logs, 0.0)[..., None], -sums[..., :-1]], axis=-1)
    return np.asarray(sums + np.maximum.accumulate(drops, axis=-1))
