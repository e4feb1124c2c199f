"""Thresholds from scores: bounds hold, rungs are ordered, coarse scorers stay dense."""

import pytest
import torch

from sentei.pipeline.ladder.calibrate import _fill_empty_bins, _fit_bin
from sentei.pipeline.ladder.targets import RungTarget
from sentei.pipeline.measure.needs import Scored, max_head_density, needle_threshold

NOTHING = Scored([], [])


def make_scored(noise: float, seed: int = 0) -> Scored:
    """Two heads in two groups, 6 query blocks of 4 rows over 20 open blocks; estimates blurred by noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 4, 20, generator=generator)
    mass = torch.softmax(logits, dim=-1) * 0.9
    blur = noise * torch.randn(2, 6, 20, generator=generator)
    return Scored([mass.amax(dim=2).log() + blur], [mass])


@pytest.mark.parametrize("missed", [0.0, 0.01, 0.1])
def test_no_more_needles_are_missed_than_allowed(missed: float) -> None:
    """The needle mass under the threshold stays within the allowed share."""
    scored = make_scored(noise=0.5)
    heads = slice(0, 1)

    share = needle_threshold(scored, heads, missed)

    mass, needs = scored.mass[0][heads], scored.needs[0][heads]
    needles = mass * (mass > 0.3)
    lost = needles * (needs <= torch.tensor(share).log())[:, :, None, :]
    assert float(lost.sum() / needles.sum()) <= missed + 1e-6


def test_the_bound_on_dropped_mass_holds_for_every_group() -> None:
    """Where the needles alone would allow more, the mean dropped mass still holds the threshold down."""
    scored = make_scored(noise=0.1)

    shares = _fit_bin(scored, NOTHING, 2, RungTarget("x", 0.5, 0.05), dense_above=1.1)

    for group in range(2):
        assert scored.dropped(slice(group, group + 1), float(shares[group])).mean() <= 0.05


def test_thresholds_rise_from_mild_to_bold() -> None:
    """A bolder target never gets a lower threshold."""
    scored = make_scored(noise=0.3)
    targets = [RungTarget("a", 0.0, 0.05), RungTarget("b", 0.02, 0.1), RungTarget("c", 0.2, 0.4)]

    fitted = [_fit_bin(scored, NOTHING, 2, target, dense_above=1.1) for target in targets]

    assert bool((fitted[0] <= fitted[1]).all())
    assert bool((fitted[1] <= fitted[2]).all())


def test_questions_hold_the_threshold_down_in_every_bin() -> None:
    """A needle that only the asking blocks have is kept also where running text would allow more."""
    scored, asking = make_scored(noise=0.1), make_scored(noise=0.1, seed=1)
    asking.needs[0] -= 3.0
    target = RungTarget("x", 0.1, 1.0)

    alone = _fit_bin(scored, NOTHING, 2, target, dense_above=1.1)
    held = _fit_bin(scored, asking, 2, target, dense_above=1.1)

    assert bool((held < alone).all())


def test_a_group_whose_scorer_is_too_coarse_stays_dense() -> None:
    """With estimates that say nothing, keeping the needles takes nearly all blocks: threshold 0."""
    blind = make_scored(noise=20.0)

    shares = _fit_bin(blind, NOTHING, 2, RungTarget("x", 0.0, 1.0), dense_above=0.6)

    assert shares.tolist() == [0.0, 0.0]
    assert max_head_density(blind, slice(0, 1), 1e-30) == 1.0


def test_a_bin_without_text_takes_its_neighbours_thresholds() -> None:
    """The nearest shorter bin lends its threshold, or the first longer one."""
    nan = float("nan")

    filled = _fill_empty_bins(torch.tensor([[nan, 0.1, nan, 0.3, nan]]))

    torch.testing.assert_close(filled, torch.tensor([[0.1, 0.1, 0.1, 0.3, 0.3]]))
