"""From scores to a block mask: a query block keeps what its neediest row needs.

Sink block and diagonal are always kept, and their mass is computed exactly, so that the estimate of every
other block's share has a sound denominator. Rows are handled in chunks: no matrix of tokens by tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from sentei.kernels.ops.block_mask import DEFAULT_BLOCK, BlockMask
from sentei.kernels.ops.registry import attempt, is_native_usable, takes_triton
from sentei.kernels.ops.rules import Grid, Threshold
from sentei.kernels.ops.select import select_lists
from sentei.kernels.scorer.byte_keys import EncodedKeys, byte_maps
from sentei.kernels.scorer.features import Rotary, RotaryTable, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerError
from sentei.kernels.scorer.rows import rows_that_differ

# 2 MB of fp32. Swept on one AVX2 core with 32 MB of cache at 0.25M, 0.5M, 1M, 2M and 4M:
# 286, 279, 318, 379 and 416 ms with heads 4:1 of 256 at 8192 tokens (SDPA: 2370 ms);
# 60, 59, 73, 77 and 92 ms with heads 4:2 of 64 at 4096.
MAX_SCORES_PER_CHUNK = 500_000
TRITON_SCORES = (
    "triton scores"  # the name under which the scoring kernels are given up, apart from attention's
)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Log of the smallest mass share worth keeping: [KV groups, length bins]; bins end at these positions."""

    log_share: torch.Tensor
    bin_edges: tuple[int, ...]
    _placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def at(self, position: int, query_heads: int, device: torch.device) -> torch.Tensor:
        """Return the threshold of one query block that starts at a position: [Hq, 1]."""
        log_share, _ = self.on(device)
        i_bin = min(bisect_right(self.bin_edges, position), log_share.shape[1] - 1)
        per_group = log_share[:, i_bin : i_bin + 1]
        return per_group.repeat_interleave(query_heads // per_group.shape[0], dim=0)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log shares and the bins' ends on a device: brought there at the first call alone."""
        if device not in self._placed:
            edges = torch.tensor(self.bin_edges, dtype=torch.int64, device=device)
            self._placed[device] = (self.log_share.to(device), edges)
        return self._placed[device]


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """Query rows in blocks: q and q_plain [B, Hq, n, rows, D], the position of each block's first row [n].

    A row stands for `row_tokens` neighbouring tokens and is their mean.
    """

    q: torch.Tensor
    q_plain: torch.Tensor
    starts: torch.Tensor
    row_tokens: int = 1

    @property
    def block_tokens(self) -> int:
        """How many tokens a block's rows stand for."""
        return self.q.shape[3] * self.row_tokens

    @property
    def last_positions(self) -> torch.Tensor:
        """The position of the last token that each row stands for: [n, rows]."""
        ends = (torch.arange(self.q.shape[3], device=self.starts.device) + 1) * self.row_tokens
        return self.starts[:, None] + ends - 1

    def pool(self, size: int) -> QueryBlocks:
        """Return blocks whose rows are means of `size` rows of these."""
        if size == 1:
            return self
        B, H, n, rows, D = self.q.shape
        q, plain = (x.reshape(B, H, n, rows // size, size, D).mean(dim=4) for x in (self.q, self.q_plain))
        return QueryBlocks(q, plain, self.starts, self.row_tokens * size)


def cut_queries(
    q: torch.Tensor, table: RotaryTable, *, block_q: int, q_offset: int, query_pool: int = 1
) -> QueryBlocks:
    """Cut q [B, Hq, T, D] into blocks of pooled rows; copies of the last row fill up the last one."""
    B, H, T, D = q.shape
    rows, size = padded_rows(block_q, T, query_pool)
    num = -(-T // rows)
    index = torch.arange(num * rows, device=q.device).clamp_max(T - 1)
    padded = q if num * rows == T else q[:, :, index]
    plain = unrotate(padded, index + q_offset, table)
    starts = torch.arange(num, device=q.device) * rows + q_offset
    blocks = QueryBlocks(padded.reshape(B, H, num, rows, D), plain.reshape(B, H, num, rows, D), starts)
    return blocks.pool(size)


def padded_rows(block_q: int, q_len: int, query_pool: int) -> tuple[int, int]:
    """Return the rows of a query block, whole pools of them, and the size of a pool."""
    rows = min(block_q, q_len)
    size = min(query_pool, rows)
    return -(-rows // size) * size, size


def forced_lse(
    blocks: QueryBlocks, k: torch.Tensor, *, scale: float, block_tokens: int, q_len_end: int, lead: int
) -> torch.Tensor:
    """Return the exact log of the summed weights of sink and diagonal blocks: [B, Hq, n, rows].

    A pooled row sees what the last of its tokens sees. `lead` is the most that a query block begins behind
    the start of its key block (`most_lead`): no device is asked for it.
    """
    B, Hq, n, rows, _ = blocks.q.shape
    Hkv, kv_len = k.shape[1], k.shape[2]
    firsts = blocks.starts.div(block_tokens, rounding_mode="floor") * block_tokens
    width = lead + blocks.block_tokens
    local = firsts[:, None] + torch.arange(width, device=k.device)
    positions = blocks.last_positions.clamp_max(q_len_end - 1)
    grouped = blocks.q.reshape(B, Hkv, Hq // Hkv, n, rows, -1)
    near = k[:, :, local.clamp_max(kv_len - 1)]
    scores = torch.einsum("bhgnrd,bhnwd->bhgnrw", grouped, near).float() * scale
    scores = scores.masked_fill(local[:, None, :] > positions[:, :, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    sink = k[:, :, : min(block_tokens, kv_len)]
    far = torch.logsumexp(torch.einsum("bhgnrd,bhwd->bhgnrw", grouped, sink).float() * scale, dim=-1)
    has_own_sink = (firsts > 0)[:, None]
    return torch.where(has_own_sink, torch.logaddexp(lse, far), lse).reshape(B, Hq, n, rows)


def most_lead(first: int, step: int, num: int, block_tokens: int) -> int:
    """Return how far at most query blocks begin behind the start of their key block, in tokens.

    They begin at positions `first`, `first + step`, ..., `num` of them; the leads repeat after a key block.
    """
    return max((first + i * step) % block_tokens for i in range(min(num, block_tokens)))


def choose_rows(
    blocks: QueryBlocks, lse: torch.Tensor, one_in: int, q_len_end: int
) -> tuple[QueryBlocks, torch.Tensor, torch.Tensor]:
    """Leave of each query block the rows that are scored for all of them, one in so many.

    Args:
        lse: exact logs of the forced blocks [B, Hq, n, rows].
        q_len_end: the position behind the last row; what fills up the last block asks for nothing.

    Returns:
        Blocks of the chosen rows, their logs, and of each row the place of the one that stands for it.
    """
    chosen, places = rows_that_differ(blocks.q, one_in)
    lse = lse.masked_fill(blocks.last_positions >= q_len_end, torch.inf)
    at = chosen[..., None].expand(*chosen.shape, blocks.q.shape[-1])
    left = replace(blocks, q=blocks.q.gather(3, at), q_plain=blocks.q_plain.gather(3, at))
    return left, lse.gather(3, chosen), places


def log_shares(
    scorer: BlockScorer, blocks: QueryBlocks, keys: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the estimated log share of attention of every block a row may choose, and of the forced ones.

    Args:
        keys: encoded pooled keys [B, Hkv, P, E].
        lse: exact logs of the forced blocks [B, Hq, n, rows].

    Returns:
        [B, Hq, n, rows, blocks], -inf for sink, diagonal and what lies ahead; [B, Hq, n, rows].
    """
    B, Hq, n, rows, _ = blocks.q.shape
    encoded = scorer.encode_queries(blocks.q.flatten(2, 3), blocks.q_plain.flatten(2, 3))
    logits = scorer.block_logits(encoded, keys).view(B, Hq, n, rows, -1)
    own = blocks.starts.div(scorer.shape.block_tokens, rounding_mode="floor")
    index = torch.arange(logits.shape[-1], device=own.device)
    distances = own[:, None] - index
    logits = logits + scorer.bias(distances)[None, :, :, None, :]
    closed = (index < 1) | (distances < 1)
    logits = logits.masked_fill(closed[:, None, :], float("-inf"))
    total = torch.logaddexp(torch.logsumexp(logits, dim=-1), lse)
    return logits - total[..., None], lse - total


def score_blocks(
    scorer: BlockScorer,
    q: torch.Tensor,
    k: torch.Tensor,
    keys: EncodedKeys,
    *,
    table: Rotary,
    block_q: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neediest row's estimated log share per query block and key block, and the blocks' starts.

    Args:
        q: the newest queries [B, Hq, Tq, D]; the last one sits on the last key.
        k: all keys [B, Hkv, Tk, D].
        keys: their encoded pools [B, Hkv, P, E], or the bytes of full blocks, where `has_byte_scores`.
        block_q: rows of a query block; as long as a key block if None.
        backend: auto, triton or torch; auto takes triton on a GPU, our own program on a CPU.

    Returns:
        [B, Hq, n, blocks] and [n]. A NaN is a ScorerError on a CPU; on a GPU nobody waits to look for one: it
        stays where it is (`nan_where_broken`).
    """
    block = scorer.shape.block_tokens
    block_q = block if block_q is None else block_q
    if block_q % scorer.shape.row_tokens:
        raise ScorerError(
            f"query blocks of {block_q} rows are no multiple of query_pool {scorer.shape.query_pool}"
        )
    B, Hq, q_len, _ = q.shape
    kv_len = k.shape[2]
    q_offset = kv_len - q_len
    starts = block_starts(q_len, block_q, q_offset, q.device)
    rows = table.between(q_offset, kv_len)
    if isinstance(keys, torch.Tensor) and scorer.has_native_program and takes_triton(backend, q.device):
        from sentei.kernels.scorer.launches import score_rows

        work = partial(score_rows, scorer, q, k, keys, rows, block_q)
        found = attempt(TRITON_SCORES, work, must_work=backend != "auto")
        if found is not None:
            return found, starts
    result = torch.empty(B, Hq, len(starts), -(-kv_len // block), device=q.device)
    is_native = scorer.has_native_program and backend == "auto" and is_native_usable(q.device.type, block)
    if is_native or not isinstance(keys, torch.Tensor):
        is_broken = _fill_native(scorer, q, k, keys, rows, result, block_q)
    else:
        _fill_chunks(scorer, q, k, keys, rows, starts, result.fill_(float("-inf")), block_q)
        is_broken = result.device.type == "cpu" and bool(torch.isnan(result).any())
    if is_broken:
        raise ScorerError(
            "the scorer gave NaN; queries, keys or adapter weights hold NaN or infinite values: "
            "serve dense and check the adapter"
        )
    return result, starts


def nan_where_broken(shares: torch.Tensor) -> torch.Tensor | None:
    """Return 0, or NaN where any share is NaN, without dimensions and on the shares' device; None on a CPU.

    Added to what attention gives, it reaches the logits, which are read and refused in any case.
    """
    if shares.device.type == "cpu":
        return None  # `score_blocks` has raised
    return torch.zeros((), device=shares.device).masked_fill_(torch.isnan(shares).any(), torch.nan)


def _fill_chunks(
    scorer: BlockScorer,
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor,
    table: RotaryTable,
    starts: torch.Tensor,
    result: torch.Tensor,
    block_q: int,
) -> None:
    block = scorer.shape.block_tokens
    per_block = block // scorer.shape.pool_tokens
    keys = keys.to(q.dtype)  # beside pages they are kept in fp32
    q_offset = k.shape[2] - q.shape[2]
    per_pair = q.shape[0] * q.shape[1] * block_q * block_q * per_block * scorer.scores_per_pool
    room = int(MAX_SCORES_PER_CHUNK * block / per_pair)
    first = 0
    while first < len(starts):
        row = first * block_q
        last = min(first + _chunk_blocks(q_offset // block_q + first, room), len(starts))
        visible = (q_offset + (last - 1) * block_q) // block
        if visible > 1:  # else only sink and diagonal are in sight
            rows = q[:, :, row : last * block_q]
            blocks = cut_queries(
                rows,
                table,
                block_q=block_q,
                q_offset=q_offset + row,
                query_pool=scorer.shape.row_tokens,
            )
            lse = forced_lse(
                blocks,
                k,
                scale=scorer.scale,
                block_tokens=block,
                q_len_end=k.shape[2],
                lead=most_lead(q_offset + row, blocks.block_tokens, last - first, block),
            )
            if scorer.shape.chooses_rows:
                blocks, lse, _ = choose_rows(blocks, lse, scorer.shape.query_pool, k.shape[2])
            shares, _ = log_shares(scorer, blocks, keys[:, :, : visible * per_block], lse)
            result[:, :, first:last, : shares.shape[-1]] = shares.amax(dim=3)
        first = last


@torch.no_grad()
def _fill_native(
    scorer: BlockScorer,
    q: torch.Tensor,
    k: torch.Tensor,
    keys: EncodedKeys,
    table: RotaryTable,
    result: torch.Tensor,
    block_q: int,
) -> bool:
    """Fill all of `result`, and return whether any of it is NaN."""
    from sentei.kernels.ops.native.calls import (
        ScorerWeights,
        best_shares_native,
        byte_shares_native,
    )

    cos, sin = table.rows(k.shape[2] - q.shape[2], k.shape[2])
    distances = 1 << result.shape[-1].bit_length()  # seldom another number while a context grows
    weights = ScorerWeights(
        maps=scorer.frozen("maps", lambda: scorer.scaled_query_map().float().contiguous()),
        gains=scorer.frozen("gains", lambda: scorer.query_gains().float().contiguous()),
        bias=scorer.frozen(
            f"bias {distances}", lambda: scorer.bias(torch.arange(distances)).float().contiguous()
        ),
        cos=cos,
        sin=sin,
        scale=scorer.scale,
        block=scorer.shape.block_tokens,
        pool_tokens=scorer.shape.pool_tokens,
        row_tokens=scorer.shape.row_tokens,
        one_in=scorer.shape.query_pool if scorer.shape.chooses_rows else 1,
    )
    if isinstance(keys, torch.Tensor):
        return best_shares_native(q, k, keys, weights, result, block_q)
    return byte_shares_native(q, k, keys, byte_maps(scorer), weights, result, block_q)


def _chunk_blocks(before: int, room: int) -> int:
    """Return how many query blocks fit, n (n + before) <= room: later blocks see more pools."""
    return max(1, int((math.sqrt(before * before + 4 * room) - before) / 2))


def pick_query_block(device_type: str) -> int:
    """Return how many rows should choose together: fewer share fewer needs, and lose less (docs/adr/0012).

    On CPUs tiles of 16 rows take no longer than tiles of 64; a GPU's matrix units want the larger ones.
    """
    return 16 if device_type == "cpu" else DEFAULT_BLOCK


def block_starts(q_len: int, block_q: int, q_offset: int, device: torch.device) -> torch.Tensor:
    """Return the position of each query block's first row."""
    return torch.arange(-(-q_len // block_q), device=device) * block_q + q_offset


def select_blocks(
    shares: torch.Tensor,
    thresholds: Thresholds,
    *,
    starts: torch.Tensor,
    q_len: int,
    kv_len: int,
    q_offset: int,
    block_q: int,
    block_k: int,
) -> BlockMask:
    """Keep every block whose share passes the threshold, plus sink and diagonal."""
    if shares.shape[2] == 1:
        cut = thresholds.at(q_offset, shares.shape[1], shares.device)
    else:
        cut = per_head_thresholds(thresholds, starts, shares.shape[1])[..., 0]
    grid = Grid(q_len=q_len, kv_len=kv_len, block_q=block_q, block_k=block_k, q_offset=q_offset)
    return select_lists(shares, Threshold(cut), grid)


def keep_before(shares: torch.Tensor, starts: torch.Tensor, break_even_tokens: int) -> torch.Tensor:
    """Let query blocks whose first row sees fewer tokens than the break-even keep everything.

    So what a block keeps depends on where it lies, and not on how long the prompt or the piece of it is.
    """
    is_short = (starts + 1 < break_even_tokens)[:, None]
    return shares.masked_fill(is_short, float("inf"))


def per_head_thresholds(thresholds: Thresholds, starts: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Return the log threshold for each query head and query block: [Hq, n, 1]."""
    log_share, edges = thresholds.on(starts.device)
    bins = torch.bucketize(starts, edges, right=True).clamp_max(log_share.shape[1] - 1)
    per_group = log_share[:, bins]
    return per_group.repeat_interleave(query_heads // per_group.shape[0], dim=0)[:, :, None]


def forced_blocks(
    starts: torch.Tensor, num_blocks: int, *, q_end: int, block_q: int, block_k: int
) -> torch.Tensor:
    """Return [n, blocks], true for the sink block and the blocks that a query block's own rows lie in."""
    index = torch.arange(num_blocks, device=starts.device)
    first = starts.div(block_k, rounding_mode="floor")[:, None]
    last = (starts + block_q - 1).clamp_max(q_end - 1).div(block_k, rounding_mode="floor")[:, None]
    return (index == 0) | ((index >= first) & (index <= last))
