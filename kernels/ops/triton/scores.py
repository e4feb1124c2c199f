"""Log shares in Triton: features in, the neediest row's share of every key block out; no matrix of tokens.

A program owns the rows of a few query blocks of as many heads of a KV group as its tile holds, and walks over
the key blocks once. It keeps one logsumexp per row and block in a scratch of its own, because a row's total
is known only at the end; then it takes off the total and takes the rows' maximum. Making products and
exponentials a second time would double the work; the scratch moves 8 bytes for 64 of them (ADR 0026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.rules import Grid
from sentei.kernels.ops.triton.launch import (
    Arguments,
    Launch,
    largest,
    pick_precision,
    pick_target,
    product,
    stride_arguments,
    tile_size,
)

# Programs that a multiprocessor holds at a time: each has a scratch.
_PROGRAMS_PER_UNIT = 2


@dataclass(frozen=True, eq=False)
class Features:
    """Encoded rows [B, Hq, R, F] and pools [B, Hkv, P, F] of `pool_tokens`, and what is added by distance.

    `forced` [B, Hq, R] is the log weight of what a row always reads; `bias` [Hq, distances] counts blocks. A
    row stands for `query_pool` tokens.
    """

    rows: Tensor
    pools: Tensor
    forced: Tensor
    bias: Tensor
    pool_tokens: int
    query_pool: int = 1


def score_triton(features: Features, grid: Grid) -> Tensor:
    """Log shares [B, Hq, Q, Kb], -inf for sink, diagonal and ahead; a row's NaN is its query block's."""
    rows = features.rows
    shape = (*rows.shape[:2], num_blocks(grid.q_len, grid.block_q), num_blocks(grid.kv_len, grid.block_k))
    out = torch.empty(shape, device=rows.device)
    scores_launch(features, grid, out).run()
    return out


def scores_launch(features: Features, grid: Grid, out: Tensor, *, target: str | None = None) -> Launch:
    """The launch that fills `out` [B, Hq, Q, Kb] fp32, contiguous."""
    rows, pools = features.rows, features.pools
    target = target or pick_target(rows.device)
    group = rows.shape[1] // pools.shape[1]
    per_block = grid.block_k // features.pool_tokens
    block_rows = num_blocks(min(grid.block_q, grid.q_len), features.query_pool)
    width = num_features_parts(rows.shape[3])
    shape = _pick_shape(sum(width), block_rows, group, out.shape[2], rows.dtype)
    num_tiles = (
        num_blocks(out.shape[2], shape["Q_BLOCKS"])
        * rows.shape[0]
        * pools.shape[1]
        * num_blocks(group, shape["HEADS"])
    )
    programs = min(num_tiles, _num_programs(rows.device))
    tile_rows = shape["HEADS"] * shape["Q_BLOCKS"] * shape["ROWS_TILE"]
    pools_tile, columns = _pick_columns(per_block, rows.dtype, sum(width))
    scratch = torch.empty(
        programs, num_blocks(out.shape[3], columns) * columns, tile_rows, device=rows.device
    )
    arguments: Arguments = {
        "q": rows,
        "k": pools,
        "bias": features.bias,
        "forced": features.forced,
        "out": out,
        "scratch": scratch,
        "num_tiles": num_tiles,
        "num_rows": rows.shape[2],
        "q_blocks": out.shape[2],
        "k_blocks": out.shape[3],
        "num_heads": rows.shape[1],
        "num_groups": pools.shape[1],
        "num_batch": rows.shape[0],
        "q_offset": grid.q_offset,
        "log_pool": math.log2(features.pool_tokens),
        "stride_p": scratch.stride(0),
        **stride_arguments("bht", k=pools),
        "stride_d": features.bias.stride(0),
    }
    constants = {
        **shape,
        "GROUP": group,
        "TILES_PER_GROUP": num_blocks(group, shape["HEADS"]),
        "ROWS": block_rows,
        "BLOCK_Q": grid.block_q,
        "BLOCK_K": grid.block_k,
        "POOLS": per_block,
        "POOLS_TILE": pools_tile,
        "COLUMNS": columns,
        "FEATURES": rows.shape[3],
        "DIM_A": width[0],
        "DIM_B": width[1],
        "READ": min(32, triton.next_power_of_2(out.shape[3])),
        "PRECISION": pick_precision(rows.dtype, target),
    }
    warps, stages = _pick_warps(tile_rows, sum(width), target)
    return Launch(_scores_kernel, (programs,), arguments, constants, warps, stages)


def num_features_parts(features: int) -> tuple[int, int]:
    """Two tiles that hold the features: 192 are 128 and 64, and not 256; the second may be empty."""
    first = tile_size(features)
    if first == features or features <= 16:
        return first, 0
    return first // 2, tile_size(features - first // 2)


def _num_programs(device: torch.device) -> int:
    """What the device runs side by side; few in the interpreter, so that one has several tiles there, too."""
    if device.type != "cuda":
        return 3 if device.type == "cpu" else _PROGRAMS_PER_UNIT * 132
    return _PROGRAMS_PER_UNIT * torch.cuda.get_device_properties(device).multi_processor_count


def _pick_shape(width: int, block_rows: int, group: int, q_blocks: int, dtype: torch.dtype) -> dict[str, int]:
    """Heads of a KV group, query blocks and rows of a tile: wide tiles load features of pools less often."""
    rows_tile = triton.next_power_of_2(block_rows)
    room = 128 if width <= 192 and dtype != torch.float32 else 64
    heads = min(triton.next_power_of_2(group), max(1, room // rows_tile))
    blocks = max(1, min(room // (heads * rows_tile), triton.next_power_of_2(q_blocks)))
    while heads * blocks * rows_tile < 16:
        blocks *= 2
    return {"HEADS": heads, "Q_BLOCKS": blocks, "ROWS_TILE": rows_tile}


def _pick_warps(tile_rows: int, width: int, target: str) -> tuple[int, int]:
    """Warps and stages: wide features leave room for two programs; on sm_100 4 warps spilled at 320."""
    if target == "gfx942":
        return 4, 1
    return 8 if tile_rows >= 128 or (target == "sm_100" and width > 192) else 4, 3 if width <= 64 else 2


def _pick_columns(per_block: int, dtype: torch.dtype, width: int) -> tuple[int, int]:
    """Pools of a block in a tile, and blocks of a tile: 64 pools in all, 32 where features are wide."""
    pools_tile = triton.next_power_of_2(per_block)
    room = 32 if dtype == torch.float32 or width > 192 else 64
    return pools_tile, max(1, room // pools_tile)


@triton.jit
def feature_tile(base, is_place, dims, FEATURES: tl.constexpr):
    """Features of some rows, [rows, dims]; zero where there is none."""
    return tl.load(base + dims[None, :], mask=is_place[:, None] & (dims < FEATURES)[None, :], other=0.0)


@triton.jit
def block_logits(
    rows_a, rows_b, base, is_pool, is_part, M: tl.constexpr, COLUMNS: tl.constexpr, POOLS: tl.constexpr,
    POOLS_TILE: tl.constexpr, FEATURES: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logsumexp over the pools of COLUMNS blocks, [M, COLUMNS], base 2; `base` [N] points at features."""
    dims = tl.arange(0, DIM_A)
    is_read = is_pool[None, :] & (dims < FEATURES)[:, None]
    pools = tl.load(base[None, :] + dims[:, None], mask=is_read, other=0.0)
    scores = product(rows_a, pools, None, PRECISION)
    if DIM_B > 0:
        more = DIM_A + tl.arange(0, DIM_B)
        is_read = is_pool[None, :] & (more < FEATURES)[:, None]
        pools = tl.load(base[None, :] + more[:, None], mask=is_read, other=0.0)
        scores = product(rows_b, pools, scores, PRECISION)
    if POOLS != POOLS_TILE:
        scores = tl.where(is_part[None, :], scores, float("-inf"))
    if COLUMNS == 1:
        peak = largest(scores, 1, PRECISION) * 1.4426950408889634
        base_2 = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        total = tl.sum(tl.exp2(scores * 1.4426950408889634 - base_2[:, None]), 1)
        logits = (base_2 + tl.log2(total))[:, None]
    else:
        parts = tl.reshape(scores, [M, COLUMNS, POOLS_TILE])
        peak = largest(parts, 2, PRECISION) * 1.4426950408889634
        base_2 = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        total = tl.sum(tl.exp2(parts * 1.4426950408889634 - base_2[:, :, None]), 2)
        logits = base_2 + tl.log2(total)
    return logits


@triton.jit
def _add_exponentials(peak, total, logits, PRECISION: tl.constexpr):
    """Fold [M, N] logits, base 2, into a running maximum and sum per row."""
    new_peak = tl.maximum(peak, largest(logits, 1, PRECISION))
    base = tl.where(tl.abs(new_peak) == float("inf"), 0.0, new_peak)
    return new_peak, total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)


@triton.jit(do_not_specialize=["num_tiles", "num_rows", "q_blocks", "k_blocks", "q_offset"])
def _scores_kernel(
    q, k, bias, forced, out, scratch, num_tiles, num_rows, q_blocks, k_blocks, num_heads, num_groups,
    num_batch, q_offset, log_pool, stride_p, stride_kb, stride_kh, stride_kt, stride_d,
    HEADS: tl.constexpr, Q_BLOCKS: tl.constexpr, ROWS_TILE: tl.constexpr, GROUP: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    POOLS: tl.constexpr, POOLS_TILE: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
    DIM_A: tl.constexpr, DIM_B: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = HEADS * Q_BLOCKS * ROWS_TILE
    LISTS: tl.constexpr = HEADS * Q_BLOCKS
    tile = tl.arange(0, M)
    i_row = tile % ROWS_TILE
    column = tl.arange(0, COLUMNS * POOLS_TILE)
    is_part = column % POOLS_TILE < POOLS
    in_chunk = tl.arange(0, COLUMNS)
    read = tl.arange(0, READ)
    kept = scratch + tl.program_id(0).to(tl.int64) * stride_p
    side_by_side = num_batch * num_groups * TILES_PER_GROUP
    q_tiles = tl.cdiv(q_blocks, Q_BLOCKS)
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        # Late query blocks see most: they come first, of all sequences and heads.
        i_first = (q_tiles - 1 - i_tile // side_by_side) * Q_BLOCKS
        batch = (i_tile % side_by_side // (num_groups * TILES_PER_GROUP)).to(tl.int64)
        h_kv = i_tile // TILES_PER_GROUP % num_groups
        in_group = i_tile % TILES_PER_GROUP * HEADS + tile // (ROWS_TILE * Q_BLOCKS)
        head = h_kv * GROUP + in_group
        i_block = i_first + tile // ROWS_TILE % Q_BLOCKS
        row = i_block * ROWS + i_row
        is_row = (i_row < ROWS) & (i_block < q_blocks) & (row < num_rows) & (in_group < GROUP)
        own = tl.where(is_row, (q_offset + i_block * BLOCK_Q) // BLOCK_K, 0)
        end = tl.max(own, 0)
        place = (batch * num_heads + head) * num_rows + row
        rows_a = feature_tile(q + place[:, None] * FEATURES, is_row, tl.arange(0, DIM_A), FEATURES)
        rows_b = rows_a
        if DIM_B > 0:
            rows_b = feature_tile(
                q + place[:, None] * FEATURES, is_row, DIM_A + tl.arange(0, DIM_B), FEATURES
            )
        pools = k + batch * stride_kb + h_kv.to(tl.int64) * stride_kh

        peak = tl.full([M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([M], dtype=tl.float32)
        for i in tl.range(1 // COLUMNS, tl.cdiv(end, COLUMNS)):
            block = i * COLUMNS + column // POOLS_TILE
            pool = block * POOLS + column % POOLS_TILE
            logits = block_logits(
                rows_a, rows_b, pools + pool.to(tl.int64) * stride_kt, is_part & (block < end), is_part,
                M, COLUMNS, POOLS, POOLS_TILE, FEATURES, DIM_A, DIM_B, PRECISION,
            )  # fmt: skip
            block = i * COLUMNS + in_chunk
            distance = own[:, None] - block[None, :]
            is_open = (distance > 0) & (block > 0)[None, :]
            extra = tl.load(bias + head[:, None] * stride_d + distance, mask=is_open, other=0.0)
            logits = tl.where(is_open, logits + log_pool + extra * 1.4426950408889634, float("-inf"))
            tl.store(kept + block[None, :] * M + tile[:, None], logits)
            peak, total = _add_exponentials(peak, total, logits, PRECISION)
        seen = tl.load(forced + place, mask=is_row, other=0.0) * 1.4426950408889634
        top = tl.maximum(peak, seen)
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        all_seen = top + tl.log2(total * tl.exp2(peak - top) + tl.exp2(seen - top))

        tl.debug_barrier()  # the scratch is read in another order than it was written
        first_list = tl.arange(0, LISTS)
        list_head = i_tile % TILES_PER_GROUP * HEADS + first_list // Q_BLOCKS
        list_block = i_first + first_list % Q_BLOCKS
        is_list = (list_head < GROUP) & (list_block < q_blocks)
        list_own = (q_offset + list_block * BLOCK_Q) // BLOCK_K
        target = out + ((batch * num_heads + h_kv * GROUP + list_head) * q_blocks + list_block) * k_blocks
        for start in tl.range(0, k_blocks, READ):
            block = start + read
            is_kept = (block > 0) & (block < end)
            logits = tl.load(
                kept + block[:, None] * M + tile[None, :], mask=is_kept[:, None], other=float("-inf")
            )
            shares = (logits - all_seen[None, :]) * 0.6931471805599453
            shares = tl.where(is_row[None, :], shares, float("-inf"))
            rows = tl.reshape(shares, [READ, LISTS, ROWS_TILE])
            best = largest(rows, 2, PRECISION)
            is_nan = tl.max((rows != rows).to(tl.int32), 2) > 0
            best = tl.where(is_nan, float("nan"), best)
            is_open = (block > 0)[:, None] & (block[:, None] < list_own[None, :])
            best = tl.where(is_open, best, float("-inf"))
            tl.store(
                target[None, :] + block[:, None], best, mask=is_list[None, :] & (block < k_blocks)[:, None]
            )
        tl.debug_barrier()  # before the next tile's logits replace them
