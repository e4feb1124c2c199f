"""What is timed: shapes, random tensors and causal masks, and a scorer whose threshold meets a density."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import (
    Thresholds,
    block_starts,
    forced_blocks,
    score_blocks,
    select_blocks,
)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Of the timed scorers, as distilled by default: over means of tokens, and over single ones.
RANK, RANK_OF_TOKENS, QUERY_POOL = 64, 32, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call: a prompt of `tokens`, or as many keys of a KV cache."""

    tokens: int
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    block: int = 64
    query_block: int | None = None  # rows that choose together; None: as many as a key block holds
    batch: int = 1
    dtype: torch.dtype = torch.float32
    shares_lists: bool = False  # one list of blocks per KV group instead of one per query head

    @property
    def block_q(self) -> int:
        """Rows of a query block."""
        return self.block if self.query_block is None else self.query_block

    @property
    def lists(self) -> int:
        """Lists of blocks per sequence and query block."""
        return self.kv_heads if self.shares_lists else self.heads


def make_tensors(shape: Shape, *, q_len: int | None = None, seed: int = 0) -> Tensors:
    """Return q [B, Hq, Tq, D] and k, v [B, Hkv, T, D]; `q_len` is the whole prompt if None."""
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, tokens: int) -> torch.Tensor:
        values = torch.randn(shape.batch, heads, tokens, shape.head_dim, generator=generator)
        return values.to(shape.dtype)

    k, v = make(shape.kv_heads, shape.tokens), make(shape.kv_heads, shape.tokens)
    return make(shape.heads, shape.tokens if q_len is None else q_len), k, v


def make_mask(shape: Shape, density: float, *, q_len: int | None = None, seed: int = 0) -> BlockMask:
    """Return a random causal mask for each list; sink and diagonal are kept, the rest meets the density."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape.tokens if q_len is None else q_len
    starts = block_starts(rows, shape.block_q, shape.tokens - rows, torch.device("cpu"))
    num = -(-shape.tokens // shape.block)
    noise = torch.rand(shape.batch, shape.lists, len(starts), num, generator=generator).log()
    return _select(shape, noise, starts, rows, density)


@dataclass(frozen=True, slots=True)
class TimedScorer:
    """The whole way from queries and keys to a mask: pooling, encoding, scoring, selecting."""

    shape: Shape
    scorer: BlockScorer
    table: RotaryTable
    thresholds: Thresholds

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> BlockMask:
        """Choose blocks for one prompt, from nothing but its queries and keys."""
        shares, starts = _score(self.shape, self.scorer, self.table, q, k)
        return _choose(self.shape, shares, starts, q.shape[2], self.thresholds)


def make_scorer(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, density: float, pool_tokens: int
) -> TimedScorer:
    """Return a scorer with random weights and the one threshold that gives this density on q and k."""
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    if pool_tokens == 1:  # single tokens are too many for all of D
        sizes = ScorerShape(*heads, RANK_OF_TOKENS, 1, shape.block, "low_rank", QUERY_POOL)
    else:
        sizes = ScorerShape(*heads, RANK, pool_tokens, shape.block)
    scorer = BlockScorer(sizes, shape.head_dim**-0.5)
    if not sizes.is_residual:
        scorer.start_from(q[0], k[0])
    angles = torch.arange(shape.tokens)[:, None] * 1e-4 ** torch.linspace(0, 1, shape.head_dim)
    table = RotaryTable(angles.cos(), angles.sin())
    shares, starts = _score(shape, scorer, table, q, k)
    return TimedScorer(shape, scorer, table, _meet(shape, shares, starts, q.shape[2], density))


def _score(
    shape: Shape, scorer: BlockScorer, table: RotaryTable, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        keys = PooledCache(scorer).update(k, k.shape[2], table)
        return score_blocks(scorer, q, k, keys, table=table, block_q=shape.block_q)


def _select(shape: Shape, scores: torch.Tensor, starts: torch.Tensor, rows: int, density: float) -> BlockMask:
    own = starts // shape.block
    open_scores = scores.masked_fill(torch.arange(scores.shape[-1]) > own[:, None], -torch.inf)
    return _choose(shape, open_scores, starts, rows, _meet(shape, open_scores, starts, rows, density))


def _meet(shape: Shape, scores: torch.Tensor, starts: torch.Tensor, rows: int, density: float) -> Thresholds:
    """One threshold over all heads and rows that keeps `density` of the causal blocks, forced ones too."""
    forced = forced_blocks(
        starts, scores.shape[-1], q_end=shape.tokens, block_q=shape.block_q, block_k=shape.block
    )
    own = (shape.tokens - rows + (torch.arange(len(starts)) + 1) * shape.block_q - 1) // shape.block
    causal = float((own.clamp(max=scores.shape[-1] - 1) + 1).sum())
    heads = scores.shape[0] * scores.shape[1]
    budget = round((density * causal - float(forced.sum())) * heads)
    ranked = scores.masked_fill(forced, -torch.inf).flatten()
    ranked = ranked[ranked > -torch.inf]
    if budget <= 0:
        cut = torch.inf
    elif budget >= ranked.numel():
        cut = -torch.inf
    else:
        cut = float(ranked.kthvalue(ranked.numel() - budget).values)
    return Thresholds(torch.full((shape.kv_heads, 1), cut), ())


def _choose(
    shape: Shape, scores: torch.Tensor, starts: torch.Tensor, rows: int, thresholds: Thresholds
) -> BlockMask:
    return select_blocks(
        scores,
        thresholds,
        starts=starts,
        q_len=rows,
        kv_len=shape.tokens,
        q_offset=shape.tokens - rows,
        block_q=shape.block_q,
        block_k=shape.block,
    )
