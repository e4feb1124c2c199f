"""Triton's prefill answers to the definition, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.attention import attend, attend_packed
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.layouts import PackedMask
from sentei.kernels.ops.reference import attend_reference, token_mask
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR, allowed_error
from tests.strategies_attention import make_qkv, move_mask
from tests.strategies_masks import block_masks, random_mask

pytestmark = pytest.mark.gpu
FLOOR = ERROR_FLOOR[torch.float32]

# (rows, past, head size, (query heads, KV heads, mask heads), (block_q, block_k), options)
CASES: list[tuple[int, int, int, tuple[int, int, int], tuple[int, int], dict[str, Any]]] = [
    (1, 0, 60, (2, 1, 1), (64, 64), {}),
    (1, 130, 32, (8, 2, 2), (64, 64), {"sinks": True}),
    (63, 0, 100, (3, 1, 1), (64, 64), {}),
    (65, 0, 32, (4, 2, 4), (16, 16), {"softcap": 5.0}),
    (65, 46, 256, (2, 1, 1), (64, 64), {}),
    (111, 0, 64, (4, 2, 2), (32, 64), {"window": 40, "sinks": True}),
    (111, 50, 128, (2, 2, 1), (128, 32), {"window": 1}),
    (100, 77, 32, (5, 1, 1), (48, 128), {"window": 60, "softcap": 2.0}),
    (130, 0, 32, (2, 1, 1), (64, 48), {}),
    (1000, 0, 32, (1, 1, 1), (128, 128), {}),
]


def compare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, options: dict[str, Any]
) -> None:
    """Output and LSE lie within the fp32 bound of the reference."""
    out, lse = attend(q, k, v, mask, return_lse=True, backend="triton", **options)
    exact, exact_lse = attend(q, k, v, mask, return_lse=True, backend="reference", **options)
    plain, _ = attend(q, k, v, mask, backend="gather", **options)

    assert lse is not None
    assert exact_lse is not None
    assert float((out - exact).abs().max()) <= allowed_error(plain, exact)
    assert torch.allclose(lse, exact_lse, rtol=0, atol=2 * FLOOR)


@pytest.mark.parametrize(("q_len", "past", "dim", "heads", "blocks", "options"), CASES)
def test_output_and_lse_equal_the_definition(
    q_len: int,
    past: int,
    dim: int,
    heads: tuple[int, int, int],
    blocks: tuple[int, int],
    options: dict[str, Any],
    device: str,
) -> None:
    """Awkward lengths, head sizes, groups, blocks, windows, caps and sinks agree with the reference."""
    q, k, v = make_qkv(q_len, past, heads=heads[:2], dim=dim, device=device)
    mask = random_mask(heads[2], q_len, q_offset=past, block_q=blocks[0], block_k=blocks[1])
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-1, 3, heads[0], device=device)}

    compare(q, k, v, move_mask(mask, device), options)


@settings(max_examples=6)
@given(mask=block_masks(max_rows=90, max_past=70))
def test_any_legal_mask_agrees(device: str, mask: BlockMask) -> None:
    """Masks of any lengths, offsets, block sizes, heads and batches agree with the reference."""
    batch, heads = mask.counts.shape[:2]
    q, k, v = make_qkv(mask.q_len, mask.q_offset, heads=(heads * 2, heads), batch=batch, device=device)

    compare(q, k, v, move_mask(mask, device), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_low_precision_error_is_at_most_twice_torchs_own(dtype: torch.dtype, dim: int, device: str) -> None:
    """Against fp32, half-width inputs may lose at most twice what torch's own operator loses."""
    q, k, v = make_qkv(111, heads=(2, 1), dim=dim, device=device, dtype=dtype)
    mask = move_mask(random_mask(1, 111), device)

    out, _ = attend(q, k, v, mask, backend="triton")

    allowed = token_mask(mask.to_dense()[0, 0], mask, None)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    exact, _ = attend_reference(q.float(), k.float(), v.float(), mask, Softmax(dim**-0.5))
    assert float((out.float() - exact).abs().max()) <= allowed_error(plain, exact)


@pytest.mark.parametrize("q_len", [65, 111])
def test_everything_selected_is_dense(q_len: int, device: str) -> None:
    """A mask that selects all blocks is torch's causal attention, whatever the memory order of its inputs."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in make_qkv(q_len, device=device))

    out, _ = attend(q, k, v, BlockMask.causal(q_len, device=device), backend="triton")

    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert float((out - dense).abs().max()) < FLOOR


def test_nothing_selected_gives_zeros(device: str) -> None:
    """Rows without a block give zeros and an LSE of minus infinity, or its sink's logit."""
    q, k, v = make_qkv(100, device=device)
    empty = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask = move_mask(BlockMask.from_dense(empty, q_len=100, kv_len=100), device)
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0], device=device)

    out, lse = attend(q, k, v, mask, return_lse=True, backend="triton")
    out_sink, lse_sink = attend(q, k, v, mask, sinks=sinks, return_lse=True, backend="triton")

    assert lse is not None
    assert lse_sink is not None
    assert not out.any()
    assert not out_sink.any()
    assert bool((lse == -torch.inf).all())
    assert torch.allclose(lse_sink, sinks[:, None].expand(4, 100), atol=FLOOR)


def test_unselected_blocks_are_never_touched(device: str) -> None:
    """NaN in every block that no list names does not reach the output."""
    q, k, v = make_qkv(200, device=device)
    mask = random_mask(1, 200, share=0.0)
    dense = mask.to_dense()
    dense[..., 2, 0] = dense[..., 3, 0] = False
    dense[..., 1, 1] = dense[..., 0, 0] = False
    mask = BlockMask.from_dense(dense, q_len=200, kv_len=200)
    unread = ~dense[0, 0].any(0).repeat_interleave(64)[:200]
    k[:, :, unread.to(device)], v[:, :, unread.to(device)] = torch.nan, torch.nan

    out, lse = attend(q, k, v, move_mask(mask, device), return_lse=True, backend="triton")

    assert lse is not None
    assert bool(unread.any())
    assert bool(out.isfinite().all())
    assert not bool(lse.isnan().any())


@pytest.mark.parametrize("mask_heads", [1, 4])
def test_packed_sequences_equal_each_alone(mask_heads: int, device: str) -> None:
    """Sequences laid end to end, one with a cached prefix, give what the reference gives for each."""
    lengths = ((1, 0), (63, 20), (70, 0))
    parts = [make_qkv(q_len, past, device=device) for q_len, past in lengths]
    masks = [random_mask(mask_heads, q_len, q_offset=past, seed=past) for q_len, past in lengths]
    packed = PackedMask.pack([move_mask(mask, device) for mask in masks])
    q, k, v = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))

    out, lse = attend_packed(q, k, v, packed, window=50, backend="triton")

    exact, exact_lse = attend_packed(q, k, v, packed, window=50, backend="reference")
    assert float((out - exact).abs().max()) < FLOOR
    assert torch.allclose(lse, exact_lse, rtol=0, atol=2 * FLOOR)
