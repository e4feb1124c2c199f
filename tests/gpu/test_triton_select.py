"""Triton's selection gives the lists that the definition in torch gives, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.kernels.ops.rules import Grid, Rule, Threshold, TopK, TopP
from sentei.kernels.ops.select import select_lists
from tests.strategies_attention import make_scores

pytestmark = pytest.mark.gpu

GRIDS = [
    Grid(1, 1, 64, 64),
    Grid(1, 1000, 64, 64, 999),
    Grid(200, 265, 64, 32, 65),
    Grid(90, 200, 16, 48, 110),
    Grid(111, 1111, 128, 16, 1000),
]


def compare(scores: torch.Tensor, rule: Rule, grid: Grid, width: int | None = None) -> None:
    """Counts and entries are those of the definition, and the lists keep the mask's contract."""
    mask = select_lists(scores, rule, grid, width=width, backend="triton").validate()
    exact = select_lists(scores, rule, grid, width=width, backend="torch").validate()

    assert torch.equal(mask.counts, exact.counts)
    assert torch.equal(mask.to_dense(), exact.to_dense())


@pytest.mark.parametrize("grid", GRIDS, ids=range(len(GRIDS)))
@pytest.mark.parametrize(
    ("rule", "width"),
    [
        (Threshold(torch.tensor([[[-3.0], [-2.0]]])), None),
        (Threshold(torch.tensor(-9.0)), 12),
        (TopP(0.9), None),
        (TopP(0.97), 14),
        (TopK(1), None),
        (TopK(15), None),
    ],
    ids=range(6),
)
def test_lists_equal_the_definition(rule: Rule, width: int | None, grid: Grid, device: str) -> None:
    """Each rule, with and without a bound on the width, on chunks, decode steps and unequal blocks."""
    if isinstance(rule, Threshold):
        rule = Threshold(rule.log_share.to(device))

    compare(make_scores(grid, 2).to(device), rule, grid, width)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 2, 5, 1000]),
    rule=st.builds(TopK, st.integers(1, 30)) | st.builds(TopP, st.floats(0.05, 0.995)),
)
def test_equal_scores_are_no_trouble(device: str, seed: int, levels: int, rule: Rule) -> None:
    """With many equal scores top-k takes the first and top-p takes or leaves them together."""
    grid = Grid(33, 433, 16, 16, 400)
    scores = make_scores(grid, 1, levels=levels, seed=seed)

    compare(scores.to(device), rule, grid)


def test_nan_is_never_chosen_and_ahead_is_never_read(device: str) -> None:
    """NaN scores count as the lowest; scores past the diagonal may be anything."""
    grid = Grid(256, 256, 64, 64)
    scores = torch.full((1, 1, 4, 4), torch.nan, device=device)
    scores[0, 0, 3, 2] = 0.0

    mask = select_lists(scores, Threshold(torch.tensor(-1.0, device=device)), grid, backend="triton")

    assert mask.indices[0, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, -1, -1], [0, 2, 3, -1]]
