"""Scores of a decode step in Triton: one row per sequence against the features of all its full blocks.

The blocks of a sequence are dealt to several programs; each leaves the log weights of its blocks, not yet
shares. What a row's shares are divided by is found by the selection (`select.select_step_triton`), which
reads them all. Shapes alone say how many programs there are; lengths stay on the device, so that a CUDA graph
serves every step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.triton.launch import (
    Arguments,
    Launch,
    pick_precision,
    pick_target,
    stride_arguments,
)
from sentei.kernels.ops.triton.scores import Features, block_logits, feature_tile, num_features_parts

# Programs per multiprocessor that hide each other's waiting, and tiles of 64 pools that are worth one.
_PROGRAMS_PER_UNIT = 4
_TILES_MIN = 4


def step_logits_triton(
    features: Features, lengths: Tensor, *, block_k: int, page_table: Tensor | None = None, width: int
) -> Tensor:
    """Log weights [B, Hq, width] of blocks 1 to the last full one before each newest token; the rest -inf."""
    rows = features.rows
    out = torch.full((*rows.shape[:2], width), -torch.inf, device=rows.device)
    step_launch(features, lengths, out, block_k=block_k, page_table=page_table).run()
    return out


def step_launch(
    features: Features,
    lengths: Tensor,
    out: Tensor,
    *,
    block_k: int,
    page_table: Tensor | None = None,
    target: str | None = None,
) -> Launch:
    """The launch that fills the open blocks of `out` [B, Hq, W] fp32, contiguous; rows are [B, Hq, 1, F].

    Pools are [B, Hkv, P, F], or pages [P, Hkv, pools of a block, F or more] with a page table [B, W].
    """
    rows, pools = features.rows, features.pools
    target = target or pick_target(rows.device)
    group = rows.shape[1] // pools.shape[1]
    per_block = block_k // features.pool_tokens
    width = num_features_parts(rows.shape[3])
    heads = min(max(16, triton.next_power_of_2(group)), 64)
    pools_tile = triton.next_power_of_2(per_block)
    columns = max(1, (32 if sum(width) > 192 or rows.dtype == torch.float32 else 64) // pools_tile)
    tiles = num_blocks(group, heads)
    chunks = num_blocks(out.shape[2], columns)
    programs = rows.shape[0] * pools.shape[1] * tiles
    splits = min(num_blocks(_PROGRAMS_PER_UNIT * _num_units(rows.device), programs), chunks // _TILES_MIN)
    arguments: Arguments = {
        "q": rows,
        "k": pools,
        "bias": features.bias,
        "page_table": page_table,
        "lengths": lengths,
        "out": out,
        "k_blocks": out.shape[2],
        "log_pool": math.log2(features.pool_tokens),
        **stride_arguments("bht", k=pools),
        "stride_d": features.bias.stride(0),
        "stride_tb": 0 if page_table is None else page_table.stride(0),
    }
    constants = {
        "GROUP": group,
        "TILES_PER_GROUP": tiles,
        "HEADS": heads,
        "BLOCK_K": block_k,
        "POOLS": per_block,
        "POOLS_TILE": pools_tile,
        "COLUMNS": columns,
        "FEATURES": rows.shape[3],
        "DIM_A": width[0],
        "DIM_B": width[1],
        "PRECISION": pick_precision(rows.dtype, target),
    }
    grid = (max(1, splits), pools.shape[1] * tiles, rows.shape[0])
    return Launch(_step_kernel, grid, arguments, constants, 4, 1 if target == "gfx942" else 3)


def _num_units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["k_blocks"])
def _step_kernel(
    q, k, bias, page_table, lengths, out, k_blocks, log_pool, stride_kb, stride_kh, stride_kt, stride_d,
    stride_tb,
    GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr,
    POOLS: tl.constexpr, POOLS_TILE: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
    DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    h_kv = tl.program_id(1) // TILES_PER_GROUP
    batch = tl.program_id(2).to(tl.int64)
    in_group = tl.program_id(1) % TILES_PER_GROUP * HEADS + tl.arange(0, HEADS)
    is_head = in_group < GROUP
    num_heads = (tl.num_programs(1) // TILES_PER_GROUP) * GROUP
    head = h_kv * GROUP + in_group
    own = tl.minimum((tl.load(lengths + batch) - 1) // BLOCK_K, k_blocks)
    place = batch * num_heads + head
    rows_a = feature_tile(q + place[:, None] * FEATURES, is_head, tl.arange(0, DIM_A), FEATURES)
    rows_b = rows_a
    if DIM_B > 0:
        rows_b = feature_tile(q + place[:, None] * FEATURES, is_head, DIM_A + tl.arange(0, DIM_B), FEATURES)
    k += h_kv.to(tl.int64) * stride_kh
    if page_table is None:
        k += batch * stride_kb

    column = tl.arange(0, COLUMNS * POOLS_TILE)
    is_part = column % POOLS_TILE < POOLS
    in_chunk = tl.arange(0, COLUMNS)
    chunks = tl.cdiv(tl.maximum(own, 0), COLUMNS)
    share = tl.cdiv(chunks, tl.num_programs(0))
    for i in tl.range(split * share, tl.minimum((split + 1) * share, chunks)):
        block = i * COLUMNS + column // POOLS_TILE
        is_pool = is_part & (block < own)
        if page_table is None:
            base = k + (block * POOLS + column % POOLS_TILE).to(tl.int64) * stride_kt
        else:
            page = tl.load(page_table + batch * stride_tb + block, mask=is_pool, other=0).to(tl.int64)
            base = k + page * stride_kb + (column % POOLS_TILE) * stride_kt
        logits = block_logits(
            rows_a, rows_b, base, is_pool, is_part,
            HEADS, COLUMNS, POOLS, POOLS_TILE, FEATURES, DIM_A, DIM_B, PRECISION,
        )  # fmt: skip
        block = i * COLUMNS + in_chunk
        is_open = is_head[:, None] & ((block > 0) & (block < own))[None, :]
        extra = tl.load(bias + head[:, None] * stride_d + (own - block)[None, :], mask=is_open, other=0.0)
        logits = (logits + log_pool) * 0.6931471805599453 + extra
        tl.store(out + place[:, None] * k_blocks + block[None, :], logits, mask=is_open)
