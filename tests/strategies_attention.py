"""Seeded tensors of attention calls, and masks on another device."""

from __future__ import annotations

from dataclasses import replace

import torch

from sentei.kernels.ops.block_mask import BlockMask, causal_limits, num_blocks
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.rules import Grid


def make_qkv(
    q_len: int,
    past: int = 0,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random q [B, Hq, Tq, D], k and v [B, Hkv, past + Tq, D] of one seed, the same on every device."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((heads[0], q_len), (heads[1], past + q_len), (heads[1], past + q_len))
    tensors = [torch.randn(batch, count, length, dim, generator=generator) for count, length in sizes]
    return [tensor.to(device, dtype) for tensor in tensors]


def move_mask(mask: BlockMask, device: str) -> BlockMask:
    """The same mask on a device."""
    return replace(mask, counts=mask.counts.to(device), indices=mask.indices.to(device))


def make_paged(
    lengths: tuple[int, ...],
    tokens: int,
    *,
    page: int,
    heads: tuple[int, int],
    dim: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    fill: float = 0.0,
) -> tuple[torch.Tensor, PagedCache]:
    """Random q [B, Hq, tokens, D], and a cache with pages dealt out of order, `fill` past each end."""
    generator = torch.Generator().manual_seed(6)
    pages_of = [num_blocks(length, page) for length in lengths]
    order = torch.randperm(sum(pages_of) + 2, generator=generator).to(torch.int32)
    pools = torch.randn(2, order.numel(), heads[1], page, dim, generator=generator)
    table = torch.full((len(lengths), max(pages_of)), -1, dtype=torch.int32)
    dealt = 0
    for i_seq, (length, count) in enumerate(zip(lengths, pages_of, strict=True)):
        table[i_seq, :count] = order[dealt : dealt + count]
        dealt += count
        if length % page:
            pools[:, int(order[dealt - 1]), :, length % page :] = fill
    q = torch.randn(len(lengths), heads[0], tokens, dim, generator=generator)
    keys, values = pools.to(device, dtype)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q.to(device, dtype), PagedCache(keys, values, table.to(device), ends)


def make_lists(
    lengths: tuple[int, ...], heads: int, *, block: int, share: float = 0.4, device: str = "cpu"
) -> BlockLists:
    """Random blocks at about `share` of each sequence, its first and its last always in."""
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(len(lengths), heads, num_blocks(max(lengths), block), generator=generator) < share
    for i_seq, length in enumerate(lengths):
        last = num_blocks(length, block)
        keep[i_seq, :, last:] = False
        if last:
            keep[i_seq, :, 0] = keep[i_seq, :, last - 1] = True
    counts = keep.sum(-1, dtype=torch.int32)
    order = torch.argsort(keep.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    indices = order.masked_fill(torch.arange(keep.shape[-1]) >= counts[..., None], -1)
    return BlockLists(counts.to(device), indices.to(device), block)


def make_scores(
    grid: Grid, heads: int, *, batch: int = 1, levels: int = 10**6, seed: int = 0
) -> torch.Tensor:
    """Log shares [B, H, Q, Kb] of random rows with up to `levels` different values, -inf ahead."""
    generator = torch.Generator().manual_seed(seed)
    rows, blocks = num_blocks(grid.q_len, grid.block_q), num_blocks(grid.kv_len, grid.block_k)
    raw = torch.randn(batch, heads, rows, blocks, generator=generator) * 2
    raw = raw if levels >= 10**6 else torch.randint(levels, raw.shape, generator=generator).float()
    limits = causal_limits(grid.q_len, grid.block_q, grid.block_k, grid.q_offset)
    return raw.masked_fill(torch.arange(blocks) >= limits[:, None], -torch.inf).log_softmax(-1)
