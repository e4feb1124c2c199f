"""The path without a compiler, and the decode path: reads the selected blocks only, and returns the LSE.

Per KV head and query block it copies the selected keys and values side by side, and runs two matrix
products over all query heads that share them. Blocks that nobody selected are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask


@dataclass(frozen=True)
class _Tile:
    """One matrix product: some query heads of one KV head, one query block, one list of key blocks."""

    batch: int
    q_heads: slice
    kv_head: int
    q_block: int
    blocks: list[int]


def attend_gather(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over gathered blocks: (out [B, Hq, Tq, D] in q's dtype, lse [B, Hq, Tq] fp32)."""
    batch, q_heads, q_len, _ = q.shape
    out = q.new_zeros(batch, q_heads, q_len, v.shape[-1])
    lse = torch.full((batch, q_heads, q_len), -torch.inf, device=q.device)
    for tile in _tiles(mask, batch, q_heads, k.shape[1], window):
        rows = slice(tile.q_block * mask.block_q, min((tile.q_block + 1) * mask.block_q, q_len))
        keys = _token_index(tile.blocks, mask, q.device)
        scores = _scores(q[tile.batch, tile.q_heads, rows], k[tile.batch, tile.kv_head], keys, scale)
        _hide(scores, keys, rows, mask, window)
        row_lse = scores.logsumexp(-1)
        weights = scores.sub_(row_lse.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
        values = v[tile.batch, tile.kv_head].index_select(0, keys).float()
        out[tile.batch, tile.q_heads, rows] = (weights @ values).to(q.dtype)
        lse[tile.batch, tile.q_heads, rows] = row_lse
    return out, lse


def _tiles(mask: BlockMask, batch: int, q_heads: int, kv_heads: int, window: int | None) -> list[_Tile]:
    mask_batch, mask_heads, num_q_blocks = mask.counts.shape
    group = q_heads // max(kv_heads, mask_heads)
    counts, indices = mask.counts.tolist(), mask.indices.tolist()
    tiles = []
    for b in range(batch):
        i_batch = b if mask_batch > 1 else 0
        for first in range(0, q_heads, group):
            i_head = first * mask_heads // q_heads
            for block in range(num_q_blocks):
                listed = indices[i_batch][i_head][block][: counts[i_batch][i_head][block]]
                first_key = _first_key(mask, block, window)
                blocks = [j for j in listed if (j + 1) * mask.block_k > first_key]
                if blocks:
                    heads = slice(first, first + group)
                    tiles.append(_Tile(b, heads, first * kv_heads // q_heads, block, blocks))
    return tiles


def _first_key(mask: BlockMask, q_block: int, window: int | None) -> int:
    if window is None:
        return 0
    return mask.q_offset + q_block * mask.block_q - window + 1


def _token_index(blocks: list[int], mask: BlockMask, device: torch.device) -> Tensor:
    starts = torch.tensor(blocks, device=device) * mask.block_k
    keys = (starts[:, None] + torch.arange(mask.block_k, device=device)).flatten()
    overhang = (blocks[-1] + 1) * mask.block_k - mask.kv_len
    return keys[: keys.numel() - overhang] if overhang > 0 else keys


def _scores(q: Tensor, k: Tensor, keys: Tensor, scale: float) -> Tensor:
    return (q.float() * scale) @ k.index_select(0, keys).float().T


def _hide(scores: Tensor, keys: Tensor, rows: slice, mask: BlockMask, window: int | None) -> None:
    first, last = mask.q_offset + rows.start, mask.q_offset + rows.stop - 1
    position = torch.arange(first, last + 1, device=keys.device)[:, None]
    tail = int(torch.searchsorted(keys, first, right=True))
    if tail < keys.numel():
        scores[..., tail:].masked_fill_(keys[tail:] > position, -torch.inf)
    if window is not None:
        scores.masked_fill_(keys <= position - window, -torch.inf)
