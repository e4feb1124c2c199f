"""Rungs that are made for a loss or a speed: which of the candidates is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sentei.kernels.hf.ladder import Rung
from sentei.pipeline.ladder.search import TargetError, boldest_within, mildest_reaching
from sentei.pipeline.ladder.targets import (
    CANDIDATES,
    RungTarget,
    candidates_for,
    density_targets,
    nll_targets,
    speed_targets,
)
from sentei.pipeline.measure.scores import PairedDelta

RUNGS = [Rung(f"{density:g}", target_density=density) for density in (0.5, 0.2, 0.1, 0.05)]


def costing(*upper: float) -> tuple[Callable[[Rung], PairedDelta], list[str]]:
    """Losses of the rungs by the upper ends of their intervals, and the rungs that were asked for."""
    asked: list[str] = []

    def cost(rung: Rung) -> PairedDelta:
        asked.append(rung.id)
        high = upper[RUNGS.index(rung)]
        return PairedDelta(high / 2, (0.0, high))

    return cost, asked


def speeding(*speeds: float) -> tuple[Callable[[Rung], float], list[str]]:
    """Speeds of the rungs over dense, and the rungs that were timed."""
    asked: list[str] = []

    def speed(rung: Rung) -> float:
        asked.append(rung.id)
        return speeds[RUNGS.index(rung)]

    return speed, asked


def test_the_boldest_rung_within_a_loss_is_taken_by_the_upper_end_of_its_interval() -> None:
    """The mean of the third is within, its interval is not; what lies beyond it is not run."""
    cost, asked = costing(0.001, 0.01, 0.0101, 0.5)

    assert boldest_within(RUNGS, 0.01, cost).id == "0.2"
    assert asked == ["0.5", "0.2", "0.1"]


def test_the_first_rung_that_costs_too_much_ends_the_search() -> None:
    """A bolder one that seems to cost nothing is chance: asked in order, the first failure is the last."""
    cost, _ = costing(0.001, 0.02, 0.001, 0.001)

    assert boldest_within(RUNGS, 0.01, cost).id == "0.5"


def test_where_every_rung_is_within_the_loss_the_boldest_is_taken() -> None:
    """There is no bolder candidate."""
    assert boldest_within(RUNGS, 0.01, costing(0.0, 0.0, 0.0, 0.01)[0]).id == "0.05"


def test_a_loss_that_no_rung_keeps_is_refused_with_the_mildest_ones() -> None:
    """The message gives target, density, mean and interval."""
    cost, _ = costing(0.02, 0.03, 0.04, 0.05)

    with pytest.raises(TargetError, match=r"at most 0\.001 .*50% of the blocks.*\+0\.0100 \(\+0\.0000 to"):
        boldest_within(RUNGS, 0.001, cost)


@pytest.mark.parametrize(
    ("speed", "expected"), [(1.05, "0.5"), (1.1, "0.5"), (1.3, "0.2"), (1.5, "0.1"), (1.6, "0.05")]
)
def test_the_mildest_rung_that_is_fast_enough_is_taken(speed: float, expected: str) -> None:
    """At its speed or above; no rung is timed twice."""
    measured, asked = speeding(1.1, 1.3, 1.5, 1.6)

    assert mildest_reaching(RUNGS, speed, measured).id == expected
    assert len(asked) == len(set(asked))


def test_a_speed_that_no_rung_reaches_is_refused_with_the_boldest_ones() -> None:
    """The message gives target, density and what was measured."""
    measured, asked = speeding(1.1, 1.2, 1.3, 1.4)

    with pytest.raises(TargetError, match=r"no rung is 2 times .*5% of the blocks, is 1\.40 times"):
        mildest_reaching(RUNGS, 2.0, measured)
    assert asked == ["0.05"]


def test_rungs_are_named_after_their_loss_and_their_speed() -> None:
    """The mildest comes first, whatever the order of the options."""
    assert [(each.id, each.nll) for each in nll_targets([0.01, 0.001])] == [
        ("nll0.001", 0.001),
        ("nll0.01", 0.01),
    ]
    assert [(each.id, each.speed) for each in speed_targets([1.5, 1.25])] == [("x1.25", 1.25), ("x1.5", 1.5)]


@pytest.mark.parametrize("nll", [0.0, -0.01, float("inf"), float("nan")])
def test_a_loss_that_allows_nothing_or_everything_is_refused_by_value(nll: float) -> None:
    """Zero is what dense is for."""
    with pytest.raises(ValueError, match=f"nll {nll:g} is no loss"):
        nll_targets([nll])


@pytest.mark.parametrize("speed", [1.0, 0.5, float("inf"), float("nan")])
def test_a_speed_that_is_no_gain_is_refused_by_value(speed: float) -> None:
    """Dense is as fast as dense."""
    with pytest.raises(ValueError, match=f"speed {speed:g} is no gain"):
        speed_targets([speed])


def test_candidates_are_made_once_for_each_share_of_missed_needles() -> None:
    """Targets that need no search have none; candidates are bold in the order of their densities."""
    targets = (*density_targets([0.2]), *nll_targets([0.01, 0.1]), RungTarget("x", 0.03, speed=1.5))

    found = candidates_for(targets)

    assert [each.density for each in found] == [*CANDIDATES, *CANDIDATES]
    assert [each.missed_needles for each in found] == [1.0] * len(CANDIDATES) + [0.03] * len(CANDIDATES)
    assert len({each.id for each in found}) == len(found)
    assert candidates_for(density_targets([0.2])) == ()
