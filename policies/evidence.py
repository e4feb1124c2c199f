"""Evidence that may be looked at after every unit: e-processes, in log space, one frozen state each.

The base fact (Ville): if E >= 0 starts at 1 and does not grow on average under the null hypothesis, then it
ever reaches 1/a with probability at most a. So each state keeps its running maximum, and a null once
rejected stays rejected. The statistical unit is the session: one value per session, never one per request,
or correlation inside sessions breaks every guarantee (reference/rollout.md 5.1: 32 to 68 % false "safe").

Each state has a constant size, `update` returns a new one, feeding units one by one or in any batches gives
the same bytes, and `log_e_max >= ln(1/a)` is the decision. The vectorised `*_paths` functions do the same
over many simulated streams at once. The formula numbers F1..F15 are those of reference/rollout.md, section
5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaincc, betaln

Direction = Literal["harm", "safe"]
Floats = npt.NDArray[np.float64]

BETTING_CUT = 0.5  # F1: how much of the capital a bet may risk; table 5.1 was made with it
PAIRED_CUT = 0.9  # F13: Z is concentrated, and 0.9 proved 0.015 excess in 243 audits instead of 412
PRIOR_STRENGTH = (
    20.0  # F5: Beta prior worth 20 units with its mean at the bound; 0.022-0.033 false alarms at 0.05
)
SRM_TILTS = (-0.6, -0.3, -0.15, 0.15, 0.3, 0.6)  # F7
RATIO_TILTS = (0.15, 0.3, 0.6, 1.2)  # F6 under a ramp, one-sided; 1.2 is a rate 3.3 times the bound
DETECTOR_BETS = (1.0, 2.0, 4.0, 8.0)  # F14
_FAR = 700.0  # log evidence of what cannot happen under the null; exp(700) is still a float


def log_threshold(alpha: float) -> float:
    """The log evidence that rejects at level alpha: ln(1/alpha)."""
    return -math.log(alpha)


@dataclass(frozen=True, slots=True)
class Betting:
    """F1: betting e-process for a bounded mean, one direction.

    Source: Waudby-Smith and Ramdas 2024 (JRSS-B, arXiv 2010.09686), predictable plug-in bets. Guarantee:
    for values in [0, 1] with conditional mean at most `bound` ("harm"; at least `bound` for "safe"),
    P(log_e ever >= ln(1/a)) <= a, for every a; `alpha` only tunes the size of the bets. `cut` in (0, 1)
    keeps every factor positive.
    """

    bound: float
    direction: Direction
    alpha: float
    cut: float = BETTING_CUT
    units: int = 0
    total: float = 0.0
    spread: float = 0.0  # sum of (x_j - mean_j)^2 with the regularised running mean
    log_e: float = 0.0
    log_e_max: float = 0.0

    def update(self, value: float) -> Betting:
        """Bet on one more unit; the bet is fixed before its value is seen."""
        units = self.units + 1
        log_e = self.log_e + math.log1p(self._bet() * (value - self.bound))
        total = self.total + value
        mean = (0.5 + total) / (units + 1)
        return replace(
            self,
            units=units,
            total=total,
            spread=self.spread + (value - mean) ** 2,
            log_e=log_e,
            log_e_max=max(self.log_e_max, log_e),
        )

    @property
    def mean(self) -> float | None:
        """The plain mean of the units; None before the first."""
        return self.total / self.units if self.units else None

    def _bet(self) -> float:
        variance = (0.25 + self.spread) / (self.units + 1)
        step = self.units + 1
        size = math.sqrt(2 * -math.log(self.alpha) / (variance * step * math.log1p(step)))
        return (
            min(size, self.cut / self.bound)
            if self.direction == "harm"
            else -min(size, self.cut / (1 - self.bound))
        )


@dataclass(frozen=True, slots=True)
class BetaBinomial:
    """F5: one-sided beta-binomial mixture for a proportion against `bound`.

    A truncated Beta(PRIOR_STRENGTH * bound, PRIOR_STRENGTH * (1 - bound)) over the alternatives, in units
    of 0 and 1. Source: reference/rollout.md F5 (Robbins' mixture; Lindon and Malek 2022 for its use).
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
        log_e = _beta_binomial_log_e(hits, units, self.bound, self.direction)
        return replace(self, units=units, hits=hits, log_e=log_e, log_e_max=max(self.log_e_max, log_e))

    @property
    def mean(self) -> float | None:
        """The share of hits; None before the first unit."""
        return self.hits / self.units if self.units else None


def _beta_binomial_log_e(hits: int, units: int, bound: float, direction: Direction) -> float:
    a, b = PRIOR_STRENGTH * bound, PRIOR_STRENGTH * (1 - bound)
    post_a, post_b = a + hits, b + units - hits
    tail = betaincc if direction == "harm" else betainc
    left = float(tail(post_a, post_b, bound))
    if left < 1e-290:  # the units lie so far on the null's side that a float cannot hold how little is left
        return -_FAR
    mixture = float(betaln(post_a, post_b) - betaln(a, b)) + math.log(left / float(tail(a, b, bound)))
    return mixture - hits * math.log(bound) - (units - hits) * math.log1p(-bound)


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
            logs = tuple(log + (_FAR if is_impossible else 0.0) for log in self.logs)
        else:
            logs = tuple(
                log
                + hits * _log_tilted(probability, tilt)
                + (units - hits) * _log_tilted(1 - probability, -tilt)
                for log, tilt in zip(self.logs, self.tilts, strict=True)
            )
        log_e = _log_mean_exp(logs)
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


def _log_tilted(probability: float, tilt: float) -> float:
    """log(q / p) where logit q = logit p + tilt."""
    return tilt - math.log1p(probability * math.expm1(tilt))


@dataclass(frozen=True, slots=True)
class Detector:
    """F14: e-CUSUM, the watch that a long good past does not blind.

    M <- max(M, 1) * (1 + l * (x - bound)), averaged over the bets l in DETECTOR_BETS cut at `cut` / bound.
    Source: Shin, Ramdas, Rinaldo (arXiv 2203.03532). Guarantee: while the conditional mean is at most
    `bound`, the average number of units before M >= A is at least A. Table 5.1: after 2000 good units it
    saw a doubled bound after 39 units, where a plain e-process saw nothing in 3000.
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
        log_e = _log_mean_exp(logs)
        return replace(
            self, logs=logs, units=self.units + 1, log_e=log_e, log_e_max=max(self.log_e_max, log_e)
        )


Evidence = Betting | BetaBinomial | Split  # what a verdict rests on, in one direction
Stream = TypeVar("Stream", Betting, BetaBinomial, Detector)


def update_all(evidence: Stream, values: Iterable[float]) -> Stream:
    """Feed units one after another; the same bytes as feeding them in any batches."""
    for value in values:
        evidence = evidence.update(value)
    return evidence


def paired_excess(value: float, floor: float, floor_cap: float) -> float:
    """F13: value minus its own noise floor, scaled to [0, 1]; value and floor must lie in [0, 1].

    At most `floor_cap` of noise is excused. With floor_cap 1 this is Z = (D + 1) / 2 of F13; a smaller one
    shrinks the range of D to [-floor_cap, 1], which makes harm provable in far fewer units and can only
    make safety harder to prove (D grows). Noise above the cap then counts against the candidate: choose it
    above the floor you see.
    """
    return (value - min(floor, floor_cap) + floor_cap) / (1 + floor_cap)


def paired_bound(excess: float, floor_cap: float) -> float:
    """The bound on `paired_excess` that means `excess` over the floor."""
    return (excess + floor_cap) / (1 + floor_cap)


def betting_paths(
    values: Floats, *, bound: float, direction: Direction, alpha: float, cut: float = BETTING_CUT
) -> Floats:
    """F1 over many streams at once: log_e [streams, units] for values [streams, units]."""
    steps = np.arange(1, values.shape[1] + 1)
    means = (0.5 + np.cumsum(values, axis=1)) / (steps + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2, axis=1)) / (steps + 1)
    before = np.concatenate([np.full((values.shape[0], 1), 0.25), variances[:, :-1]], axis=1)
    sizes = np.sqrt(2 * -math.log(alpha) / (before * steps * np.log1p(steps)))
    sign, cap = (1.0, cut / bound) if direction == "harm" else (-1.0, cut / (1 - bound))
    return np.asarray(np.cumsum(np.log1p(sign * np.minimum(sizes, cap) * (values - bound)), axis=1))


def detector_paths(values: Floats, *, bound: float, cut: float = BETTING_CUT) -> Floats:
    """F14 over many streams at once: log_e [streams, units] for values [streams, units]."""
    bets = np.minimum(np.array(DETECTOR_BETS), cut / bound)
    logs = np.zeros((values.shape[0], len(bets)))
    out = np.empty_like(values)
    for step in range(values.shape[1]):
        logs = np.maximum(logs, 0.0) + np.log1p(bets * (values[:, step, None] - bound))
        out[:, step] = np.logaddexp.reduce(logs, axis=1) - math.log(len(bets))
    return out


def units_to_prove(
    value: float, *, bound: float, direction: Direction, alpha: float, cut: float
) -> int | None:
    """How many units of one constant value reject at alpha; None if they never do (within a million).

    A real stream varies and needs more; the guide's table says how much.
    """
    if (value <= bound) == (direction == "harm"):
        return None
    evidence = Betting(bound, direction, alpha, cut)
    while evidence.log_e < log_threshold(alpha):
        if evidence.units >= 1_000_000:
            return None
        evidence = evidence.update(value)
    return evidence.units


def _log_mean_exp(logs: tuple[float, ...]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs) / len(logs))
