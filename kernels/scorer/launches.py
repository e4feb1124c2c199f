"""A scorer's work on a GPU: encoding, scoring and selecting as launches that never wait for the device.

What `selection` and `pages` do with torch elsewhere; those are the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.rules import Grid
from sentei.kernels.ops.triton.encode import Encoding, Near, encode_keys_triton, encode_queries_triton
from sentei.kernels.ops.triton.scores import Features, score_triton
from sentei.kernels.ops.triton.select import select_step_triton
from sentei.kernels.ops.triton.step_scores import step_logits_triton
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.rows import RUN_ROWS, rows_that_differ


@torch.no_grad()
def encode_pools(scorer: BlockScorer, k: Tensor, first: int | Tensor, table: RotaryTable) -> Tensor:
    """Features [B, Hkv, P, F] of the full pools of k [B, Hkv, T, D].

    `first` is the position of its first token, or the number of tokens [B] of which k holds the newest.
    """
    maps = scorer.frozen(f"key map {k.dtype}", lambda: scorer.key_map.to(k.dtype))
    return encode_keys_triton(k, Encoding(maps, table.cos, table.sin, scorer.shape.pool_tokens), first=first)


@torch.no_grad()
def score_rows(
    scorer: BlockScorer, q: Tensor, k: Tensor, pools: Tensor, table: RotaryTable, block_q: int
) -> Tensor:
    """Log shares of the neediest row, [B, Hq, n, blocks]; arguments as in `selection.score_blocks`.

    Rows that differ are chosen in query blocks of whole runs alone; in others all rows are scored.

    A NaN stays one: nobody waits to look for it.
    """
    shape = scorer.shape
    grid = Grid(q.shape[2], k.shape[2], block_q, shape.block_tokens, k.shape[2] - q.shape[2])
    pool = min(shape.row_tokens, q.shape[2])
    near = Near(k, scorer.scale, block_q, shape.block_tokens)
    rows, forced = encode_queries_triton(
        q, _query_encoding(scorer, q.dtype, table, pool), near, first=grid.q_offset
    )
    if shape.chooses_rows and min(block_q, q.shape[2]) % RUN_ROWS == 0:
        rows, forced, pool = *_choose_rows(q, rows, forced, shape.query_pool), shape.query_pool
    bias = _bias_table(scorer, num_blocks(grid.kv_len, grid.block_k), q.device)
    features = Features(rows, pools.to(q.dtype), forced, bias, shape.pool_tokens, pool)
    if q.shape[2] > 1:
        return score_triton(features, grid)
    lengths = torch.full((q.shape[0],), grid.kv_len, dtype=torch.int32, device=q.device)
    width = num_blocks(grid.kv_len, grid.block_k)
    logits = step_logits_triton(features, lengths, block_k=grid.block_k, width=width)
    total = torch.logaddexp(logits.logsumexp(-1), forced[..., 0])[..., None]
    return torch.where(logits == -torch.inf, logits, logits - total)[:, :, None]


@torch.no_grad()
def choose_step(
    scorer: BlockScorer,
    q: Tensor,
    cache: PagedCache,
    pooled: Tensor,
    table: RotaryTable,
    limits: Tensor,
) -> tuple[BlockLists, Tensor]:
    """Lists per KV group of one new token per sequence, and which of them had NaN [B, Hkv], int32.

    q [B, Hq, 1, D]; pooled [P, Hkv, pools, F or more] lies beside the pages of `cache`; limits [B, Hq] are
    log shares. A group reads what any of its heads wants: its keys are loaded once for all of them.
    """
    shape = scorer.shape
    near = Near(cache.keys, scorer.scale, shape.block_tokens, shape.block_tokens, cache.page_table)
    how = _query_encoding(scorer, q.dtype, table, 1)
    rows, forced = encode_queries_triton(q, how, near, first=cache.lengths, dtype=pooled.dtype)
    width = cache.page_table.shape[1]
    bias = _bias_table(scorer, width, q.device)
    features = Features(rows, pooled, forced, bias, shape.pool_tokens)
    logits = step_logits_triton(
        features, cache.lengths, block_k=shape.block_tokens, page_table=cache.page_table, width=width
    )
    counts, indices, is_odd = select_step_triton(
        logits,
        forced[..., 0],
        limits,
        cache.lengths,
        lists=shape.kv_heads,
        block_k=shape.block_tokens,
        width=width,
    )
    return BlockLists(counts, indices, shape.block_tokens), is_odd


def _choose_rows(q: Tensor, rows: Tensor, forced: Tensor, one_in: int) -> tuple[Tensor, Tensor]:
    """Leave of rows [B, Hq, R, F] and their logs [B, Hq, R], whole runs of q, those that are scored.

    Copies of the last row, which fill up its query block, ask for nothing.
    """
    token = torch.arange(rows.shape[2], device=q.device)
    chosen, _ = rows_that_differ(q[:, :, token.clamp_max(q.shape[2] - 1)], one_in)
    forced = forced.masked_fill(token >= q.shape[2], torch.inf)
    return rows.gather(2, chosen[..., None].expand(*chosen.shape, rows.shape[-1])), forced.gather(2, chosen)


def _query_encoding(scorer: BlockScorer, dtype: torch.dtype, table: RotaryTable, pool: int) -> Encoding:
    maps = scorer.frozen(f"query map {dtype}", lambda: scorer.scaled_query_map().to(dtype))
    gains = None
    if scorer.shape.is_residual:
        gains = scorer.frozen("gains", lambda: scorer.query_gains().float().contiguous())
    return Encoding(maps, table.cos, table.sin, pool, gains)


def _bias_table(scorer: BlockScorer, blocks: int, device: torch.device) -> Tensor:
    """The bias for every distance in `blocks`, [Hq, distances]; seldom another size while a context grows."""
    distances = 1 << blocks.bit_length()

    def make() -> Tensor:
        return scorer.bias(torch.arange(distances, device=device)).float().contiguous()

    return scorer.frozen(f"bias {distances} {device}", make)
