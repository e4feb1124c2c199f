"""The exact mass of each block, and what a selection drops of it."""

from __future__ import annotations

import pytest
import torch

from sentei.kernels.ops import block_mass as module
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.block_mass import block_mass, dropped_mass
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.reference import attend_reference
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR, MASS_SUM_ATOL
from tests.strategies_masks import random_mask


def make_qk(q_len: int, past: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q with 4 heads and k with 2."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, q_len, 32, generator=generator)
    return q, torch.randn(1, 2, past + q_len, 32, generator=generator)


@pytest.mark.parametrize(
    ("q_len", "past", "window"), [(1, 0, None), (65, 0, None), (111, 200, None), (200, 40, 70)]
)
@pytest.mark.parametrize("chunk", [3000, 10**6])
def test_mass_equals_softmax_summed_by_block(
    q_len: int, past: int, window: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunk, mass is the softmax's sum over each block, and a row's masses sum to 1."""
    monkeypatch.setattr(module, "_SCORES_MAX", chunk)
    q, k = make_qk(q_len, past)

    lse, mass = block_mass(q, k, scale=0.3, block_k=64, q_offset=past, window=window)

    position = past + torch.arange(q_len)[:, None]
    keys = torch.arange(past + q_len)
    hidden = (keys > position) | (keys <= position - (window or 10**9))
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(hidden, -torch.inf)
    weights = torch.nn.functional.pad(scores.softmax(-1), (0, -(past + q_len) % 64))
    assert torch.allclose(mass, weights.unflatten(-1, (-1, 64)).sum(-1), atol=MASS_SUM_ATOL)
    assert torch.allclose(mass.sum(-1), torch.ones(1, 4, q_len), atol=MASS_SUM_ATOL)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=2 * ERROR_FLOOR[torch.float32])


def test_sampled_rows_are_rows_of_the_whole() -> None:
    """Rows may be sampled in any order."""
    q, k = make_qk(150, 10)
    rows = torch.tensor([149, 3, 70])

    lse, mass = block_mass(q, k, scale=0.3, block_k=64, q_offset=10, rows=rows)

    whole_lse, whole_mass = block_mass(q, k, scale=0.3, block_k=64, q_offset=10)
    assert torch.allclose(lse, whole_lse[:, :, rows], atol=1e-5)
    assert torch.allclose(mass, whole_mass[:, :, rows], atol=1e-6)


def test_dropped_mass_is_what_the_unselected_blocks_hold() -> None:
    """One minus the selected blocks' mass, the token-causal diagonal included."""
    q, k = make_qk(300, 0)
    mask = random_mask(4, 300)

    _, lse_sparse = attend(q, k, k, mask, scale=0.3, return_lse=True, backend="gather")

    lse, mass = block_mass(q, k, scale=0.3, block_k=64)
    kept = (mass * mask.to_dense().repeat_interleave(64, 2)[:, :, :300]).sum(-1)
    assert lse_sparse is not None
    assert torch.allclose(dropped_mass(lse_sparse, lse), 1 - kept, atol=MASS_SUM_ATOL)


def test_dropped_mass_stays_in_bounds() -> None:
    """Nothing selected drops all; everything selected drops nothing, rounding or not."""
    q, k = make_qk(100, 0)
    _, lse = attend_reference(q, k, k, BlockMask.causal(100), Softmax(0.3))

    assert bool((dropped_mass(torch.full_like(lse, -torch.inf), lse) == 1).all())
    assert bool((dropped_mass(lse + 1e-6, lse) == 0).all())


def test_shapes_that_do_not_fit_are_named() -> None:
    """Query rows beyond the keys are refused."""
    q, k = make_qk(100, 0)

    with pytest.raises(ShapeError, match="offset 1"):
        block_mass(q, k, scale=1.0, block_k=64, q_offset=1)
