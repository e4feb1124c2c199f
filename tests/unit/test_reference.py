"""The definition itself, against attention written with torch's own operator."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.attention import attend, dense_attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import MaskError, ShapeError
from sentei.kernels.ops.reference import attend_reference, token_mask
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR
from tests.strategies_masks import random_mask

FLOOR = ERROR_FLOOR[torch.float32]


def make_qkv(
    q_len: int, *, past: int = 0, heads: tuple[int, int] = (4, 2), dim: int = 32, batch: int = 1
) -> list[torch.Tensor]:
    """Random q, k, v of one seed."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((heads[0], q_len), (heads[1], past + q_len), (heads[1], past + q_len))
    return [torch.randn(batch, count, length, dim, generator=generator) for count, length in sizes]


@pytest.mark.parametrize("q_len", [1, 63, 65, 111])
def test_everything_selected_is_dense(q_len: int) -> None:
    """A mask that selects all blocks is torch's causal attention."""
    q, k, v = make_qkv(q_len)

    out, lse = attend_reference(q, k, v, BlockMask.causal(q_len), Softmax(0.2))

    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.2)
    assert float((out - dense).abs().max()) < FLOOR
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_nothing_selected_gives_zeros(backend: str) -> None:
    """Rows without a block give zeros and an LSE of minus infinity, never NaN."""
    q, k, v = make_qkv(100)
    mask = BlockMask.from_dense(torch.zeros(1, 2, 2, 2, dtype=torch.bool), q_len=100, kv_len=100)

    out, lse = attend(q, k, v, mask, return_lse=True, backend=backend)

    assert lse is not None
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_window_and_mask_meet() -> None:
    """The window hides keys inside selected blocks too."""
    mask = random_mask(1, 130, share=0.5)

    allowed = token_mask(mask.to_dense()[0, 0], mask, 10)

    assert int(allowed.sum(-1).max()) == 10
    assert bool(allowed.diagonal().all())


@pytest.mark.parametrize(
    ("q_len", "past", "window"), [(1, 90, None), (5, 90, 30), (3, 2, None), (70, 0, None)]
)
def test_dense_baseline_on_torch_agrees(q_len: int, past: int, window: int | None) -> None:
    """dense_attend by SDPA folds heads and windows without changing the answer."""
    q, k, v = make_qkv(q_len, past=past)

    out = dense_attend(q, k, v, q_offset=past, window=window, backend="sdpa")

    mask = BlockMask.causal(q_len, past + q_len, q_offset=past)
    exact, _ = attend_reference(q, k, v, mask, Softmax(32**-0.5, window))
    assert float((out - exact).abs().max()) < FLOOR


def test_misfits_are_named() -> None:
    """Tensors, mask and window that do not fit are refused with their values."""
    q, k, v = make_qkv(100)
    mask = BlockMask.causal(100)

    with pytest.raises(MaskError, match="99 x 99"):
        attend(q, k, v, BlockMask.causal(99))
    with pytest.raises(MaskError, match="3 heads"):
        attend(q, k, v, random_mask(3, 100))
    with pytest.raises(ShapeError, match="window is 0"):
        attend(q, k, v, mask, window=0)
    with pytest.raises(ShapeError, match="pass one dtype"):
        attend(q.bfloat16(), k, v, mask)
    with pytest.raises(ShapeError, match="do not fit"):
        attend(q, k[..., :3], v, mask)
    with pytest.raises(ShapeError, match="4 heads, k has 1 and 3"):
        attend(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1), mask)
