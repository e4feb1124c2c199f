"""Hypothesis strategies and seeded makers of block masks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sentei.kernels.ops.block_mask import BlockMask, causal_limits, num_blocks


def random_mask(
    heads: int,
    q_len: int,
    *,
    share: float = 0.3,
    q_offset: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    batch: int = 1,
    seed: int = 0,
) -> BlockMask:
    """Random causal blocks at about `share`, sink and diagonal always in, as a selector would give them."""
    kv_len = q_offset + q_len
    rows, keys = num_blocks(q_len, block_q), num_blocks(kv_len, block_k)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(batch, heads, rows, keys, generator=generator) < share
    limits = causal_limits(q_len, block_q, block_k, q_offset)
    slots = torch.arange(keys)
    dense[..., 0] = True
    dense |= (slots < limits[:, None]) & (
        (slots + 1) * block_k > q_offset + torch.arange(rows)[:, None] * block_q
    )
    dense &= slots < limits[:, None]
    sizes = {"block_q": block_q, "block_k": block_k, "q_offset": q_offset}
    return BlockMask.from_dense(dense, q_len=q_len, kv_len=kv_len, **sizes)


@st.composite
def block_masks(draw: st.DrawFn, max_rows: int = 400, max_past: int = 300) -> BlockMask:
    """Legal masks of all kinds of lengths, offsets, block sizes and heads."""
    return random_mask(
        draw(st.integers(1, 4)),
        draw(st.integers(1, max_rows)),
        share=draw(st.floats(0.0, 1.0)),
        q_offset=draw(st.integers(0, max_past)),
        block_q=draw(st.sampled_from([16, 48, 64, 128])),
        block_k=draw(st.sampled_from([16, 32, 64, 128])),
        batch=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**31)),
    )
