"""The definition of selection: what each rule keeps, beside sink and diagonal."""

from __future__ import annotations

import pytest
import torch

from sentei.kernels.ops.errors import BackendError, ShapeError
from sentei.kernels.ops.rules import Grid, Threshold, TopK, TopP
from sentei.kernels.ops.select import select_lists
from tests.strategies_attention import make_scores

GRID = Grid(q_len=1, kv_len=384, block_q=64, block_k=64, q_offset=383)
SCORES = torch.tensor([0.1, 0.3, 0.05, 0.05, 0.4, 0.1]).log()[None, None, None]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Threshold(torch.tensor(0.2).log()), [0, 1, 4, 5]),
        (Threshold(torch.tensor(0.0)), [0, 5]),
        (TopP(0.85), [0, 1, 4, 5]),
        (TopP(0.95), [0, 1, 2, 3, 4, 5]),
        (TopP(0.1), [0, 5]),
        (TopK(1), [0, 5]),
        (TopK(3), [0, 4, 5]),
        (TopK(5), [0, 1, 2, 4, 5]),
    ],
)
def test_rules_keep_what_they_say(rule: Threshold | TopP | TopK, kept: list[int]) -> None:
    """Threshold is strict, top-p drops at most its rest with equals together, top-k counts forced blocks."""
    mask = select_lists(SCORES, rule, GRID)

    assert mask.validate().indices[0, 0, 0, : mask.counts[0, 0, 0]].tolist() == kept


def test_width_bounds_the_lists() -> None:
    """Beyond the width the lowest scores go, whatever the rule; forced blocks stay."""
    grid = Grid(300, 365, 64, 32, 65)
    scores = make_scores(grid, 2)

    mask = select_lists(scores, Threshold(torch.tensor(-20.0)), grid, width=5).validate()

    assert int(mask.counts.max()) == 5
    assert torch.equal(mask.to_dense(), select_lists(scores, TopK(5), grid).to_dense())


def test_misfits_are_named() -> None:
    """Scores of another grid, a width too small for the forced blocks, an unknown backend."""
    with pytest.raises(ShapeError, match=r"needs \[B, H, 1, 6\]"):
        select_lists(SCORES[..., :5], TopK(3), GRID)
    with pytest.raises(ShapeError, match="width is 2; sink and diagonal alone can take 3"):
        select_lists(SCORES, TopK(3), GRID, width=2)
    with pytest.raises(BackendError, match="'numpy' is unknown"):
        select_lists(SCORES, TopK(3), GRID, backend="numpy")
