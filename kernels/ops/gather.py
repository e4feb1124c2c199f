"""Selected blocks side by side, then two matrix products: needs no compiler, serves decode, returns the LSE.

Query blocks of one KV head are taken in the order of how much they read, a few at a time; each batch copies
its keys and values together. Blocks that nobody selected are never read. All arithmetic
is fp32: on a CPU without bf16 instructions a bf16 product is 10 to 100 times slower (AVX2, 256 x 832 x 256:
0.9 ms against 104 ms), and casting costs less than one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.rules import Softmax

# Scores held at once, in elements: 8 MiB in fp32, so that they and their keys stay in a shared cache.
_SCORES_MAX = 2 * 2**20


@dataclass(frozen=True)
class _Tiles:
    """Query blocks (`rows` [N], ascending in reads) of query heads that share one KV head and its lists."""

    batch: int
    heads: slice
    kv_head: int
    rows: Tensor
    counts: list[int]
    blocks: Tensor


def attend_gather(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax) -> tuple[Tensor, Tensor]:
    """Attention over gathered blocks: (out [B, Hq, Tq, D] in q's dtype, lse [B, Hq, Tq] fp32)."""
    mask = mask.within(how.window)
    batch, q_heads, q_len, dim = q.shape
    block_q = min(mask.block_q, q_len)
    padded = num_blocks(q_len, block_q) * block_q
    queries = torch.nn.functional.pad(q, (0, 0, 0, padded - q_len)) if padded > q_len else q
    queries = queries.reshape(batch, q_heads, -1, block_q, dim)
    out = q.new_zeros(batch, q_heads, padded // block_q, block_q, v.shape[-1])
    lse = torch.full((batch, q_heads, padded // block_q, block_q), -torch.inf, device=q.device)
    if mask.counts.sum() > k.shape[2] // mask.block_k:
        k, v = k.float(), v.float()
    for tiles in _batches(mask, (batch, q_heads, k.shape[1]), block_q):
        keys = _token_index(tiles.blocks, mask)
        part = queries[tiles.batch, tiles.heads].index_select(1, tiles.rows).float()
        weights, row_lse = _weigh(part, k[tiles.batch, tiles.kv_head], keys, tiles, mask, how=how)
        values = v[tiles.batch, tiles.kv_head].index_select(0, keys.flatten()).float()
        result = torch.bmm(weights, values.view(*keys.shape, -1)).view(
            len(tiles.counts), -1, block_q, v.shape[-1]
        )
        out[tiles.batch, tiles.heads].index_copy_(1, tiles.rows, result.transpose(0, 1).to(q.dtype))
        lse[tiles.batch, tiles.heads].index_copy_(1, tiles.rows, row_lse.transpose(0, 1))
    out, lse = out.flatten(2, 3)[:, :, :q_len], lse.flatten(2, 3)[:, :, :q_len]
    return (out, lse) if how.sinks is None else _with_sinks(out, lse, how.sinks)


def _batches(mask: BlockMask, shape: tuple[int, int, int], block_q: int) -> Iterator[_Tiles]:
    """Cut the lists into batches of query blocks with nearly equal reads, and leave out those with none."""
    batch, q_heads, kv_heads = shape
    mask_batch, mask_heads, _ = mask.counts.shape
    group = q_heads // max(kv_heads, mask_heads)
    sorted_counts, order = mask.counts.sort(dim=-1, stable=True)
    counts_of = sorted_counts.tolist()
    for b in range(batch):
        i_batch = b if mask_batch > 1 else 0
        for first in range(0, q_heads, group):
            i_head = first * mask_heads // q_heads
            counts: list[int] = counts_of[i_batch][i_head]
            stop = len(counts)
            while stop > 0 and counts[stop - 1] > 0:
                widest = counts[stop - 1]
                start = max(0, stop - max(1, _SCORES_MAX // (group * block_q * widest * mask.block_k)))
                start += sum(count == 0 for count in counts[start:stop])
                rows = order[i_batch, i_head, start:stop]
                blocks = mask.indices[i_batch, i_head].index_select(0, rows)[:, :widest]
                heads = slice(first, first + group)
                yield _Tiles(b, heads, first * kv_heads // q_heads, rows, counts[start:stop], blocks)
                stop = start


def _token_index(blocks: Tensor, mask: BlockMask) -> Tensor:
    """Tokens of each listed block, [N, n * block_k] int64; padding repeats the first block."""
    starts = torch.where(blocks < 0, blocks[:, :1], blocks).long() * mask.block_k
    keys = starts[..., None] + torch.arange(mask.block_k, device=blocks.device)
    return keys.flatten(1).clamp_(max=mask.kv_len - 1)


def _weigh(
    part: Tensor, k: Tensor, keys: Tensor, tiles: _Tiles, mask: BlockMask, *, how: Softmax
) -> tuple[Tensor, Tensor]:
    """Softmax weights [N, G * bq, n] and LSE [N, G, bq]; rows that see nothing weigh 0."""
    group, num, block_q, dim = part.shape
    gathered = k.index_select(0, keys.flatten()).float().view(num, -1, dim)
    rows = part.transpose(0, 1).reshape(num, group * block_q, dim)
    scores = torch.baddbmm(rows.new_empty(1), rows, gathered.transpose(1, 2), beta=0.0, alpha=how.scale)
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_().mul_(how.softcap)
    start, hidden = _hidden(tiles, mask, how.window, block_q)
    by_row = scores.view(num, group, block_q, -1)
    by_row[..., start:].masked_fill_(hidden[:, None], -torch.inf)
    peak = scores.amax(-1)
    weights = torch.softmax(scores, -1)
    lse = (peak - weights.amax(-1).log()).view(num, group, block_q)
    if start == 0:
        blind = hidden.all(-1)
        weights.view(num, group, block_q, -1).masked_fill_(blind[:, None, :, None], 0.0)
        lse.masked_fill_(blind[:, None], -torch.inf)
    return weights, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit per head in each row's sum: it takes its share of the weights and carries no value."""
    logit = sinks.float()[:, None]
    kept = torch.sigmoid(lse - logit)
    return (out.float() * kept[..., None]).to(out.dtype), torch.logaddexp(lse, logit)


def _hidden(tiles: _Tiles, mask: BlockMask, window: int | None, block_q: int) -> tuple[int, Tensor]:
    """The first column that a row may not see, and what is hidden from there on: bool [N, bq, n]."""
    device = tiles.blocks.device
    crossing = -(-block_q // mask.block_k) + 1
    start = 0 if window is not None else max(0, tiles.counts[0] - crossing)
    blocks = tiles.blocks[:, start:]
    keys = blocks[..., None] * mask.block_k + torch.arange(mask.block_k, device=device)
    keys = torch.where(blocks[..., None] < 0, mask.kv_len, keys).flatten(1)[:, None]
    position = (mask.q_offset + tiles.rows[:, None] * mask.block_q + torch.arange(block_q, device=device))[
        ..., None
    ]
    hidden = (keys > position) | (keys >= mask.kv_len)
    if window is not None:
        hidden |= keys <= position - window
    return start * mask.block_k, hidden
