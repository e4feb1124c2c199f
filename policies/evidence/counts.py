"""F5, F6 and F7: proof about proportions, about two arms, and about who was sent where."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
from scipy.special import betainc, betaincc, betaln

from sentei.policies.evidence.base import FAR, Direction, Floats, Ints, log_mean_exp

PRIOR_STRENGTH = 20.0  # F5: Beta prior worth 20 units with its mean at the bound
SRM_TILTS = (-0.6, -0.3, -0.15, 0.15, 0.3, 0.6)  # F7
_LOST = 1e-290  # the units lie so far on the null's side that a float cannot hold how little is left
RATIO_TILTS = (0.15, 0.3, 0.6, 1.2)  # F6 under a ramp, one-sided; 1.2 is a rate 3.3 times the bound


@dataclass(frozen=True, slots=True)
class BetaBinomial:
    """F5: one-sided beta-binomial mixture for a proportion against `bound`.

    A truncated Beta(PRIOR_STRENGTH * bound, PRIOR_STRENGTH * (1 - bound)) over the alternatives, in units
    of 0 and 1. Source: Robbins 1970, the mixture; Lindon and Malek 2022, its use (docs/statistics.md).
    Guarantee: as `Betting`, for each unit's conditional probability at most ("harm") or at least ("safe")
    `bound`. A latency SLO becomes a proportion: "p95 <= L" is "P(latency > L) <= 5 %".
    """

    bound: float
    direction: Direction
    units: int = 0
    hits: int = 0
    log_e: float = 0.0
    log_e_max: float = 0.0

    def update(self, value: float) -> BetaBinomial:
        """Count one more unit, a hit if the value is not 0."""
        units, hits = self.units + 1, self.hits + int(value != 0)
        log_e = _log_e_of_one(hits, units, self.bound, self.direction)
        return replace(self, units=units, hits=hits, log_e=log_e, log_e_max=max(self.log_e_max, log_e))

    @property
    def mean(self) -> float | None:
        """The share of hits; None before the first unit."""
        return self.hits / self.units if self.units else None


def _log_e_of_one(hits: int, units: int, bound: float, direction: Direction) -> float:
    """`beta_binomial_log_e` of one stream, without the cost of arrays."""
    a, b = PRIOR_STRENGTH * bound, PRIOR_STRENGTH * (1 - bound)
    post_a, post_b = a + hits, b + units - hits
    tail = betaincc if direction == "harm" else betainc
    left = float(tail(post_a, post_b, bound))
    if left < _LOST:
        return -FAR
    mixture = float(betaln(post_a, post_b) - betaln(a, b)) + math.log(left / float(tail(a, b, bound)))
    return mixture - hits * math.log(bound) - (units - hits) * math.log1p(-bound)


def beta_binomial_log_e(hits: Any, units: Any, *, bound: float, direction: Direction) -> Floats:
    """F5 after so many hits in so many units; numbers or arrays of them."""
    a, b = PRIOR_STRENGTH * bound, PRIOR_STRENGTH * (1 - bound)
    post_a, post_b = np.asarray(a + hits), np.asarray(b + units - hits)
    tail = betaincc if direction == "harm" else betainc
    left = tail(post_a, post_b, bound)
    is_lost = left < _LOST
    mixture = betaln(post_a, post_b) - betaln(a, b)
    mixture = mixture + np.log(np.where(is_lost, 1.0, left)) - math.log(float(tail(a, b, bound)))
    log_e = mixture - hits * math.log(bound) - (units - hits) * math.log1p(-bound)
    return np.asarray(np.where(is_lost, -FAR, log_e))


@lru_cache(maxsize=32)
def beta_binomial_boundary(*, bound: float, direction: Direction, threshold: float, max_units: int) -> Ints:
    """How many hits reject after 0 to max_units units: at least so many for "harm", at most for "safe".

    log_e is monotone in the hits, so the boundary says all; -1 and max_units + 1 mean that no number does.
    """
    units = np.arange(max_units + 1)
    low, high = np.full(max_units + 1, -1), units + 1  # of "harm": low does not reject, high does or is n + 1
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        log_e = beta_binomial_log_e(np.clip(middle, 0, units), units, bound=bound, direction=direction)
        is_rejecting = (log_e >= threshold) & (units > 0)
        goes_down = is_rejecting if direction == "harm" else ~is_rejecting
        is_open = high - low > 1
        high = np.where(is_open & goes_down, middle, high)
        low = np.where(is_open & ~goes_down, middle, low)
    boundary = np.where(high > units, max_units + 1, high) if direction == "harm" else low
    boundary.setflags(write=False)  # it is shared by all who ask
    return boundary


@dataclass(frozen=True, slots=True)
class Split:
    """F6 and F7: did units go to the candidate as often as they should, when the intended share moves?

    Each unit is a coin with its own null probability p; the evidence averages likelihood ratios whose odds
    are tilted by exp(c) for each c in `tilts`. With SRM_TILTS it is the ramp-aware sample-ratio test
    (two-sided, F7). With RATIO_TILTS and p = share*r / (share*r + 1 - share) it tests, given an event,
    whether the candidate's event rate exceeds r times the control's, without denominators (F6; Lindon,
    Sanden, Shirikian et al., arXiv 2205.14762); negated tilts prove the opposite. Guarantee: as `Betting`,
    whatever the ramp, as p is fixed before each unit.
    """

    tilts: tuple[float, ...]
    logs: tuple[float, ...]
    units: int = 0
    hits: int = 0
    expected: float = 0.0
    log_e: float = 0.0
    log_e_max: float = 0.0

    @classmethod
    def start(cls, tilts: tuple[float, ...]) -> Self:
        """No units yet."""
        return cls(tilts, (0.0,) * len(tilts))

    def update(self, hits: int, units: int, probability: float) -> Split:
        """Add `units` coins of one null probability, `hits` of which fell on the candidate."""
        if probability in (0.0, 1.0):
            is_impossible = hits > 0 if probability == 0.0 else hits < units
            logs = tuple(log + (FAR if is_impossible else 0.0) for log in self.logs)
        else:
            logs = tuple(
                log
                + hits * _log_tilted(probability, tilt)
                + (units - hits) * _log_tilted(1 - probability, -tilt)
                for log, tilt in zip(self.logs, self.tilts, strict=True)
            )
        log_e = log_mean_exp(logs)
        return replace(
            self,
            logs=logs,
            units=self.units + units,
            hits=self.hits + hits,
            expected=self.expected + units * probability,
            log_e=log_e,
            log_e_max=max(self.log_e_max, log_e),
        )

    @property
    def mean(self) -> float | None:
        """The share of units that fell on the candidate; None before the first."""
        return self.hits / self.units if self.units else None


def split_logs(hits: Floats, units: Floats, probability: Floats, tilts: tuple[float, ...]) -> Floats:
    """F6 and F7 over many streams: what `units` coins, `hits` on the candidate, add to each tilt."""
    is_sure = (probability <= 0) | (probability >= 1)
    is_impossible = np.where(probability <= 0, hits > 0, hits < units) & is_sure
    known, place = np.unique(np.where(is_sure, 0.5, probability), return_inverse=True)  # a ramp has few
    tilt, p = np.array(tilts), known[:, None]
    on = (tilt - np.log1p(p * np.expm1(tilt)))[place.reshape(probability.shape)]
    off = (-tilt - np.log1p((1 - p) * np.expm1(-tilt)))[place.reshape(probability.shape)]
    added = hits[..., None] * on + (units - hits)[..., None] * off
    return np.asarray(np.where(is_sure[..., None], FAR * is_impossible[..., None], added))


def _log_tilted(probability: float, tilt: float) -> float:
    """log(q / p) where logit q = logit p + tilt."""
    return tilt - math.log1p(probability * math.expm1(tilt))
