"""F1 and F13: proof about the mean of bounded values by betting, one value per session."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from sentei.policies.evidence.base import BETTING_CUT, Bools, Direction, Floats, log_threshold

PAIRED_CUT = 0.9  # F13: Z is concentrated, and 0.9 proved 0.015 excess in 243 audits instead of 412
_SEARCH_BLOCK = 4096
NOTICED = 0.95
NOTICE_STREAMS = 400
NOTICE_BLOCK = 256
NOTICE_LEAST = 1e-3  # below it nothing is drawn: it takes more than NOTICE_LIMIT
NOTICE_LIMIT = 5_120  # units; a bound so tight is beyond what no_harm can watch
SEARCH_LIMIT = 1_000_000  # units after which a constant stream is said to prove nothing


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

    def units_left(self, threshold: float) -> int | None:
        """How many more units of the mean so far would lift log_e to the threshold; None: none ever would.

        For readers: the bet is taken to stay as it is now, and the units to come to be like those before.
        """
        growth = 0.0 if self.mean is None else math.log1p(self._bet() * (self.mean - self.bound))
        left = threshold - self.log_e
        return None if growth <= 0 or left / growth > SEARCH_LIMIT else max(0, math.ceil(left / growth))

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
class Moments:
    """Units, sum and spread of many streams at once: all that the size of the next bet depends on."""

    units: Floats
    total: Floats
    spread: Floats

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> Moments:
        """No units yet, in each of so many streams."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def advance(self, values: Floats, is_unit: Bools) -> tuple[Moments, Floats]:
        """Add a block [..., units]; also variance x step x ln(1 + step) as each bet finds it.

        Places where `is_unit` is False are no units: they change nothing.
        """
        units = self.units[..., None] + np.cumsum(is_unit, axis=-1)
        total = _cumulate(np.where(is_unit, values, 0.0), self.total)
        gap = values - (0.5 + total) / (units + 1)
        spread = _cumulate(np.where(is_unit, gap * gap, 0.0), self.spread)
        spread_before = np.concatenate([self.spread[..., None], spread[..., :-1]], axis=-1)
        step = np.maximum(units, 1.0)  # of a unit, the units before it are step - 1
        scale = (0.25 + spread_before) * np.log1p(step)  # variance before has 1/step, which cancels
        return Moments(units[..., -1], total[..., -1], spread[..., -1]), scale


def betting_steps(
    values: Floats,
    is_unit: Bools,
    scale: Floats,
    *,
    bound: float,
    direction: Direction,
    alpha: float,
    cut: float,
) -> Floats:
    """F1 over a block: what each unit adds to log_e, given `scale` of Moments.advance."""
    sizes = np.sqrt(2 * log_threshold(alpha) / scale)
    sign, cap = (1.0, cut / bound) if direction == "harm" else (-1.0, cut / (1 - bound))
    grown = np.log1p(sign * np.minimum(sizes, cap) * (values - bound))
    return np.asarray(np.where(is_unit, grown, 0.0))


def paired_excess(value: float, floor: float, floor_cap: float) -> float:
    """F13: value minus its own noise floor, scaled to [0, 1]; value and floor must lie in [0, 1].

    At most `floor_cap` of noise is excused. With floor_cap 1 this is Z = (D + 1) / 2 of F13; a smaller one
    shrinks the range of D to [-floor_cap, 1], which makes harm provable in far fewer units and can only
    make safety harder to prove (D grows). Noise above the cap then counts against the candidate: choose it
    above the floor you see. Source: docs/statistics.md F13. Guarantee: that of `Betting` for the mean of
    the difference inside each pair, as its bound is a fixed number and no estimated floor.
    """
    return (value - min(floor, floor_cap) + floor_cap) / (1 + floor_cap)


def paired_bound(excess: float, floor_cap: float) -> float:
    """The bound on `paired_excess` that means `excess` over the floor."""
    return (excess + floor_cap) / (1 + floor_cap)


def units_to_prove(
    value: float, *, bound: float, direction: Direction, alpha: float, cut: float
) -> int | None:
    """How many units of one constant value reject at alpha; None if they never do (within a million).

    A real stream varies and needs more; the guide's table says how much.
    """
    if (value <= bound) == (direction == "harm"):
        return None
    moments, log_e, units = Moments.start((1,)), 0.0, 0
    while units < SEARCH_LIMIT:
        values, is_unit = np.full((1, _SEARCH_BLOCK), value), np.ones((1, _SEARCH_BLOCK), dtype=np.bool_)
        moments, scale = moments.advance(values, is_unit)
        steps = betting_steps(values, is_unit, scale, bound=bound, direction=direction, alpha=alpha, cut=cut)
        path = log_e + np.cumsum(steps[0])
        if path.max() >= log_threshold(alpha):
            return units + int(np.argmax(path >= log_threshold(alpha))) + 1
        log_e, units = float(path[-1]), units + _SEARCH_BLOCK
    return None


@lru_cache(maxsize=256)
def units_to_notice(excess: float, *, floor_cap: float | None, alpha: float, cut: float) -> int:
    """After how many units 95 % of the candidates that stand at twice the bound have been called harmful.

    Units vary as a Beta distribution of that mean and a concentration of 20 does. `excess` is the bound
    itself, over the floor where there is a `floor_cap`. At most NOTICE_LIMIT, which then means "more".
    """
    if excess < NOTICE_LEAST:
        return NOTICE_LIMIT
    cap = floor_cap or 0.0
    bound, mean = (excess + cap) / (1 + cap), min(2 * excess, 0.99)
    rng = np.random.default_rng(0)  # always the same streams: a policy is refused today as tomorrow
    moments, log_e = Moments.start((NOTICE_STREAMS,)), np.zeros(NOTICE_STREAMS)
    crossed = np.full(NOTICE_STREAMS, NOTICE_LIMIT)
    for begin in range(0, NOTICE_LIMIT, NOTICE_BLOCK):
        values = (rng.beta(20 * mean, 20 * (1 - mean), (NOTICE_STREAMS, NOTICE_BLOCK)) + cap) / (1 + cap)
        is_unit = np.ones(values.shape, dtype=np.bool_)
        moments, scale = moments.advance(values, is_unit)
        steps = betting_steps(values, is_unit, scale, bound=bound, direction="harm", alpha=alpha, cut=cut)
        path = log_e[:, None] + np.cumsum(steps, axis=-1)
        is_over = path >= log_threshold(alpha)
        first = np.where(is_over.any(axis=-1), begin + is_over.argmax(axis=-1) + 1, NOTICE_LIMIT)
        crossed, log_e = np.minimum(crossed, first), path[:, -1]
        if (crossed < NOTICE_LIMIT).mean() >= NOTICED:
            break
    return int(np.sort(crossed)[math.ceil(NOTICED * NOTICE_STREAMS) - 1])


def _cumulate(values: Floats, before: Floats) -> Floats:
    """Running sums that go on from `before`, added in the order of the units."""
    values[..., 0] += before
    return np.asarray(np.cumsum(values, axis=-1))
