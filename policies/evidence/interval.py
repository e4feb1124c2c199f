"""F2: how large the mean is, at any time, for reports; decisions rest on the e-processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sentei.policies.evidence.base import log_threshold

CS_CUT = 0.5  # F2: the largest bet
INTERVAL_ALPHA = 0.05  # of the intervals in reports: 95 %, at all times together


@dataclass(frozen=True, slots=True)
class Interval:
    """F2: predictable plug-in empirical-Bernstein confidence sequence for a bounded mean.

    Source: Waudby-Smith and Ramdas 2024 (JRSS-B, arXiv 2010.09686), in closed form, both sides at alpha / 2.
    Guarantee: for values in [0, 1] of constant conditional mean, [low, high] holds that mean at all times
    together with probability at least 1 - alpha, so it may be read after every unit and only ever shrinks.
    If the mean moves, it tells of the past average; `Detector` tells of the move.
    """

    alpha: float = INTERVAL_ALPHA
    units: int = 0
    total: float = 0.0
    spread: float = 0.0  # as in Betting: sets the next weight
    weight: float = 0.0  # sum of l
    weighted: float = 0.0  # sum of l * x
    noise: float = 0.0  # sum of (x - mean before)^2 * psi(l)
    low: float = 0.0
    high: float = 1.0

    @property
    def mean(self) -> float | None:
        """The plain mean of the units; None before the first."""
        return self.total / self.units if self.units else None

    def update(self, value: float) -> Interval:
        """Weigh one more unit; its weight is fixed before its value is seen."""
        step = self.units + 1
        log_a = log_threshold(self.alpha / 2)
        variance = (0.25 + self.spread) / step
        bet = min(math.sqrt(2 * log_a / (variance * step * math.log1p(step))), CS_CUT)
        before = (0.5 + self.total) / step
        total = self.total + value
        weight, weighted = self.weight + bet, self.weighted + bet * value
        noise = self.noise + (value - before) ** 2 * (-math.log1p(-bet) - bet)
        middle, half = weighted / weight, (log_a + noise) / weight
        return replace(
            self,
            units=step,
            total=total,
            spread=self.spread + (value - (0.5 + total) / (step + 1)) ** 2,
            weight=weight,
            weighted=weighted,
            noise=noise,
            low=max(self.low, middle - half),
            high=min(self.high, middle + half),
        )
