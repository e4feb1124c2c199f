"""Fresh random inputs, block lists at a density, a scorer that meets it, and outputs that start as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, causal_limits, num_blocks
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.rules import Grid, Threshold
from sentei.kernels.ops.select import select_lists
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, score_blocks, select_blocks

from .worker import Bench

# Scorers by the name that rows give them: the forms that are distilled, and what lies beside them.
FORMS: dict[str, dict[str, Any]] = {
    "rank 32, 4 as one": {"form": "low_rank", "rank": 32, "pool_tokens": 1, "query_pool": 4},
    "rank 32": {"form": "low_rank", "rank": 32, "pool_tokens": 1, "query_pool": 1},
    "rank 32, 1 of 4": {
        "form": "low_rank",
        "rank": 32,
        "pool_tokens": 1,
        "query_pool": 4,
        "query_reduce": "k_center",
    },
    "rank 16, 4 as one": {"form": "low_rank", "rank": 16, "pool_tokens": 1, "query_pool": 4},
    "means of 16": {"form": "residual", "rank": 64, "pool_tokens": 16},
    "means of 4": {"form": "residual", "rank": 64, "pool_tokens": 4},
}
_SAMPLE = 1 << 20  # scores looked at for a cut-off: one in some, evenly spaced


def draw(bench: Bench, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers of this row's own seed."""
    return torch.randn(shape, generator=bench.generator, device=bench.device, dtype=dtype)


def draw_prompt(bench: Bench, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Hq, T, D], k and v [1, Hkv, T, D] of the timed shape."""
    sizes = bench.sizes
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    q, k, v = (draw(bench, 1, count, tokens, sizes.head_dim) for count in heads)
    return q, k, v


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Every fresh tensor starts as NaN (whole numbers: the largest), so that an unwritten place shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not bool(torch.empty(64, device=device).isnan().all()):
            raise RuntimeError("torch did not fill fresh memory with NaN; answers would not be proof")
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def prompt_grid(bench: Bench, tokens: int) -> Grid:
    """The blocks of a whole prompt."""
    return Grid(tokens, tokens, bench.sizes.block, bench.sizes.block)


def draw_lists(bench: Bench, grid: Grid, lists: int, density: float) -> BlockMask:
    """Random lists at this density of the causal blocks; sink and diagonal are always in."""
    rows, blocks = num_blocks(grid.q_len, grid.block_q), num_blocks(grid.kv_len, grid.block_k)
    noise = torch.rand(1, lists, rows, blocks, generator=bench.generator, device=bench.device)
    cut = torch.tensor(1.0 - open_share(grid, density), device=bench.device)
    return select_lists(noise, Threshold(cut), grid, backend="triton")


def open_share(grid: Grid, density: float) -> float:
    """The share of blocks that are not forced which, with the forced ones, makes up this density."""
    limits = causal_limits(grid.q_len, grid.block_q, grid.block_k, grid.q_offset)
    starts = (grid.q_offset + torch.arange(len(limits)) * grid.block_q) // grid.block_k
    forced = (limits - starts) + (starts > 0)
    causal, kept = float(limits.sum()), float(forced.sum())
    return min(1.0, max(0.0, (density * causal - kept) / max(1.0, causal - kept)))


def cut_for(shares: Tensor, grid: Grid, density: float) -> float:
    """The log share above which this density of the causal blocks lies, read off a sample of the scores."""
    step = max(1, shares.numel() // _SAMPLE) | 1  # odd: an even one would meet the same blocks in each row
    sample = shares.flatten()[::step].float()
    index = torch.arange(0, shares.numel(), step, device=shares.device)
    block, row = index % shares.shape[-1], index // shares.shape[-1] % shares.shape[-2]
    own = (grid.q_offset + row * grid.block_q) // grid.block_k
    sample = sample[(block > 0) & (block < own)]
    rank = min(sample.numel(), max(1, round((1.0 - open_share(grid, density)) * sample.numel())))
    return float(sample.kthvalue(rank).values) if sample.numel() else 0.0


@dataclass(frozen=True, slots=True)
class Scoring:
    """The whole way from queries and keys to lists: pooling, encoding, scoring, selecting."""

    scorer: BlockScorer
    table: RotaryTable
    thresholds: Thresholds
    grid: Grid

    def shares(self, q: Tensor, k: Tensor, pools: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log shares [B, Hq, Q, Kb], and where query blocks start; without their pools keys are encoded."""
        with torch.no_grad():
            return score_blocks(
                self.scorer,
                q,
                k,
                self.pools(k) if pools is None else pools,
                table=self.table,
                block_q=self.grid.block_q,
                backend="triton",
            )

    def pools(self, k: Tensor) -> Tensor:
        """Encoded pools of all keys."""
        return PooledCache(self.scorer, "triton").update(k, k.shape[2], self.table)

    def __call__(self, q: Tensor, k: Tensor) -> BlockMask:
        """Choose blocks from nothing but queries and keys."""
        return self.choose(*self.shares(q, k))

    def choose(self, shares: Tensor, starts: Tensor) -> BlockMask:
        """Lists from scores."""
        grid = self.grid
        return select_blocks(
            shares,
            self.thresholds,
            starts=starts,
            q_len=grid.q_len,
            kv_len=grid.kv_len,
            q_offset=grid.q_offset,
            block_q=grid.block_q,
            block_k=grid.block_k,
        )


def make_scorer(bench: Bench, form: str) -> BlockScorer:
    """A scorer of the timed heads with random weights, none of them zero, so that scores differ."""
    sizes = bench.sizes
    shape = ScorerShape(sizes.heads, sizes.kv_heads, sizes.head_dim, block_tokens=sizes.block, **FORMS[form])
    return with_random_weights(bench, BlockScorer(shape, sizes.head_dim**-0.5))


def with_random_weights(bench: Bench, scorer: BlockScorer) -> BlockScorer:
    """The scorer on the bench's device with weights of this row's seed, about as large as trained ones."""
    scorer = scorer.to(bench.device).eval().requires_grad_(False)
    for weight in (scorer.query_map, scorer.distance_bias, scorer.log_gain):
        weight.add_(0.3 * torch.randn(weight.shape, generator=bench.generator, device=bench.device))
    return scorer


def make_scoring(bench: Bench, q: Tensor, k: Tensor, density: float, form: str | None = None) -> Scoring:
    """A scorer with random weights, and the one threshold that meets the density."""
    sizes, grid = bench.sizes, prompt_grid(bench, q.shape[2])
    scorer = make_scorer(bench, form or sizes.forms[0])
    unset = Scoring(scorer, rotary_table(bench, q.shape[2]), Thresholds(torch.zeros(1, 1), ()), grid)
    cut = cut_for(unset.shares(q, k)[0], grid, density)
    thresholds = Thresholds(torch.full((sizes.kv_heads, 1), cut, device=bench.device), ())
    return Scoring(scorer, unset.table, thresholds, grid)


def rotary_table(bench: Bench, tokens: int) -> RotaryTable:
    """Angles as a model with a base of 10,000 has them."""
    positions = torch.arange(tokens, device=bench.device, dtype=torch.float32)[:, None]
    angles = positions * 1e-4 ** torch.linspace(0, 1, bench.sizes.head_dim // 2, device=bench.device)
    angles = torch.cat((angles, angles), dim=-1)
    return RotaryTable(angles.cos(), angles.sin())


def paged_cache(
    bench: Bench, keys: Tensor, values: Tensor, lengths: Tensor, page: int, *, fill: float = torch.nan
) -> PagedCache:
    """The same tokens [B, Hkv, T, D] in pages dealt at random; what is no token is `fill`."""
    batch, heads, tokens, _ = keys.shape
    width = num_blocks(tokens, page)
    order = torch.randperm(batch * width + 2, generator=bench.generator, device=bench.device)
    table = order[: batch * width].view(batch, width)
    is_token = torch.arange(width * page, device=bench.device) < lengths[:, None]
    pools = []
    for source in (keys, values):
        pool = source.new_full((order.numel(), heads, page, source.shape[3]), fill)
        padded = torch.nn.functional.pad(source, (0, 0, 0, width * page - tokens))
        padded = padded.masked_fill(~is_token[:, None, :, None], fill)
        pool[table.flatten()] = padded.unflatten(2, (width, page)).transpose(1, 2).flatten(0, 1)
        pools.append(pool)
    return PagedCache(pools[0], pools[1], table.to(torch.int32), lengths)


def draw_step_lists(bench: Bench, batch: int, tokens: int, lists: int, density: float) -> BlockLists:
    """Random lists of one new token per sequence, all of the same length."""
    block = bench.sizes.block
    blocks = num_blocks(tokens, block)
    noise = torch.rand(batch, lists, 1, blocks, generator=bench.generator, device=bench.device)
    grid = Grid(1, tokens, block, block, tokens - 1)
    cut = torch.tensor(1.0 - open_share(grid, density), device=bench.device)
    width = min(blocks, max(4, round(2 * density * blocks)))
    mask = select_lists(noise, Threshold(cut), grid, width=width, backend="triton")
    return BlockLists(mask.counts[:, :, 0], mask.indices[:, :, 0], block)
