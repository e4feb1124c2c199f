"""The path without a compiler answers to the definition, and touches nothing it was not told to."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops import gather
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.reference import attend_reference, token_mask
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR, allowed_error
from tests.strategies_masks import random_mask


def make_qkv(q_len: int, past: int, dim: int, batch: int = 1) -> list[torch.Tensor]:
    """Random q with 4 heads, k and v with 2."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((4, q_len), (2, past + q_len), (2, past + q_len))
    return [torch.randn(batch, heads, length, dim, generator=generator) for heads, length in sizes]


@pytest.mark.parametrize(
    ("q_len", "past", "dim"),
    [
        (1, 0, 60),
        (63, 0, 100),
        (65, 0, 32),
        (111, 0, 60),
        (1000, 0, 32),
        (1, 999, 32),
        (5, 123, 256),
        (100, 311, 32),
    ],
)
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 50])
def test_output_and_lse_equal_the_definition(
    q_len: int, past: int, dim: int, mask_heads: int, window: int | None
) -> None:
    """Awkward lengths, chunks with a past, windows and each kind of mask heads agree with the reference."""
    q, k, v = make_qkv(q_len, past, dim)
    mask = random_mask(mask_heads, q_len, q_offset=past)

    out, lse = attend(q, k, v, mask, window=window, return_lse=True, backend="gather")

    exact, exact_lse = attend_reference(q, k, v, mask, Softmax(dim**-0.5, window))
    assert lse is not None
    assert float((out - exact).abs().max()) < ERROR_FLOOR[torch.float32]
    assert torch.allclose(lse, exact_lse, rtol=0, atol=ERROR_FLOOR[torch.float32] * 2)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 64), (64, 16), (128, 32), (48, 128)])
def test_block_sizes_may_differ(block_q: int, block_k: int) -> None:
    """Blocks of 16 to 128 work in any pairing, over two batch rows with masks of their own."""
    q, k, v = make_qkv(150, 77, 32, batch=2)
    mask = random_mask(2, 150, q_offset=77, block_q=block_q, block_k=block_k, batch=2)

    out, _ = attend(q, k, v, mask, backend="gather")

    exact, _ = attend_reference(q, k, v, mask, Softmax(32**-0.5))
    assert float((out - exact).abs().max()) < ERROR_FLOOR[torch.float32]


def test_rows_that_see_nothing_give_zeros_beside_rows_that_do() -> None:
    """A query block of 64 rows that reads only key block 1 of 16 leaves its first 16 rows empty."""
    q, k, v = make_qkv(64, 0, 32)
    dense = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    dense[..., 1] = True
    mask = BlockMask.from_dense(dense, q_len=64, kv_len=64, block_k=16)

    out, lse = attend(q, k, v, mask, return_lse=True, backend="gather")

    exact, exact_lse = attend_reference(q, k, v, mask, Softmax(32**-0.5))
    assert lse is not None
    assert not out[:, :, :16].any()
    assert float((out - exact).abs().max()) < ERROR_FLOOR[torch.float32]
    assert torch.allclose(lse, exact_lse, rtol=0, atol=ERROR_FLOOR[torch.float32] * 2)


@pytest.mark.parametrize("window", [None, 50])
def test_softcap_and_sinks_equal_the_definition(window: int | None) -> None:
    """Capped scores and a logit without a value change output and LSE as the reference says."""
    q, k, v = make_qkv(100, 30, 32)
    mask, sinks = random_mask(2, 100, q_offset=30), torch.tensor([-1.0, 0.0, 1.0, 4.0])

    out, lse = attend(q, k, v, mask, window=window, softcap=2.0, sinks=sinks, return_lse=True)

    exact, exact_lse = attend_reference(q, k, v, mask, Softmax(32**-0.5, window, softcap=2.0, sinks=sinks))
    assert lse is not None
    assert float((out - exact).abs().max()) < ERROR_FLOOR[torch.float32]
    assert torch.allclose(lse, exact_lse, rtol=0, atol=ERROR_FLOOR[torch.float32] * 2)


@pytest.mark.parametrize(("q_len", "past"), [(1, 1000), (200, 0)])
def test_unselected_blocks_are_never_touched(q_len: int, past: int) -> None:
    """NaN in every block that no list names does not reach the output."""
    q, k, v = make_qkv(q_len, past, 32)
    mask = random_mask(1, q_len, share=0.0, q_offset=past)
    unread = ~mask.to_dense()[0, 0].any(0).repeat_interleave(64)[: past + q_len]
    k[:, :, unread], v[:, :, unread] = torch.nan, torch.nan

    out, lse = attend(q, k, v, mask, return_lse=True, backend="gather")

    assert lse is not None
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query block at a time gives what many at a time give."""
    q, k, v = make_qkv(500, 0, 32)
    mask = random_mask(2, 500)
    many, _ = attend(q, k, v, mask, backend="gather")

    monkeypatch.setattr(gather, "_SCORES_MAX", 1)
    one, _ = attend(q, k, v, mask, backend="gather")

    assert float((many - one).abs().max()) < ERROR_FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_torchs_own(dtype: torch.dtype) -> None:
    """Against fp32, half-width inputs may lose at most twice what torch's own operator loses."""
    q, k, v = (tensor.to(dtype) for tensor in make_qkv(111, 0, 32))
    mask = random_mask(1, 111)
    allowed = token_mask(mask.to_dense()[0, 0], mask, None)

    out, _ = attend(q, k, v, mask, backend="gather")

    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    exact, _ = attend_reference(q.float(), k.float(), v.float(), mask, Softmax(32**-0.5))
    assert float((out.float() - exact).abs().max()) <= allowed_error(plain, exact)
