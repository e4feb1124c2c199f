"""Block mass in Triton: each row's LSE first, then exp(s - LSE) summed per key block; scores are made twice.

Nothing beside the result is kept in memory. A program owns some rows, in any order, of the query heads of one
KV group, and both passes run inside it, so that its queries are loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.triton.launch import (
    LOG2_E,
    Arguments,
    Launch,
    pick_precision,
    pick_target,
    product,
    stride_arguments,
    tile_size,
    with_unit_stride,
)


def block_mass_triton(
    q: Tensor, k: Tensor, rows: Tensor, *, scale: float, block_k: int, q_offset: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Mass of the rows `rows` [R] of q: (lse [B, Hq, R], mass [B, Hq, R, Kb]), fp32."""
    lse = torch.empty(*q.shape[:2], rows.numel(), device=q.device)
    mass = torch.zeros(*lse.shape, num_blocks(k.shape[2], block_k), device=q.device)
    mass_launch(q, k, rows, lse, mass, scale=scale, block_k=block_k, q_offset=q_offset, window=window).run()
    return lse, mass


def mass_launch(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    scale: float,
    block_k: int,
    q_offset: int,
    window: int | None,
    target: str | None = None,
) -> Launch:
    """The launch that fills `lse` [B, Hq, R] and the visible part of `mass` [B, Hq, R, Kb]; contiguous."""
    target = target or pick_target(q.device)
    q, k = with_unit_stride(q), with_unit_stride(k)
    group = q.shape[1] // k.shape[1]
    dim = tile_size(q.shape[-1])
    tile_rows = 128 if dim <= 128 and q.dtype != torch.float32 else 64
    heads = min(triton.next_power_of_2(group), tile_rows // 16)
    tiles_per_group = num_blocks(group, heads)
    arguments: Arguments = {
        "q": q,
        "k": k,
        "rows": with_unit_stride(rows),
        "lse": lse,
        "mass": mass,
        "scale": scale * LOG2_E,
        "q_offset": q_offset,
        "window": window,
        "num_rows": rows.numel(),
        "kv_len": k.shape[2],
        "num_blocks": mass.shape[3],
        **stride_arguments("bht", q=q, k=k),
    }
    constants = {
        "GROUP": group,
        "TILES_PER_GROUP": tiles_per_group,
        "HEADS": heads,
        "ROWS": tile_rows // heads,
        "KEYS": min(_pick_keys(dim, q.dtype, target), tile_size(block_k)),
        "BLOCK_K": block_k,
        "HEAD_DIM": q.shape[-1],
        "DIM": dim,
        "PRECISION": pick_precision(q.dtype, target),
    }
    grid = (num_blocks(rows.numel(), tile_rows // heads), k.shape[1] * tiles_per_group, q.shape[0])
    warps, stages = (4, 1) if target == "gfx942" else (8, 2)
    return Launch(_mass_kernel, grid, arguments, constants, warps, stages)


def _pick_keys(dim: int, dtype: torch.dtype, target: str) -> int:
    """On gfx942 at head 128, 64 keys and 8 warps spilled 8 scalar registers, 32 keys and 4 warps none."""
    return 32 if dim > 128 or dtype == torch.float32 or target == "gfx942" else 64


@triton.jit
def _tile_scores(
    queries, k, stride_kt, key, is_key, position, window, scale, IS_MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the rows against one tile of keys, times log2(e); -inf where a row may not look."""
    dims = tl.arange(0, DIM)
    k_tile = k + key.to(tl.int64)[None, :] * stride_kt + dims[:, None]
    keys_t = tl.load(k_tile, mask=is_key[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    scores = product(queries, keys_t, None, PRECISION) * scale
    if IS_MASKED:
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if window is not None:
            is_seen = is_seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
    else:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["q_offset", "window", "num_rows", "kv_len", "num_blocks"])
def _mass_kernel(
    q, k, rows, lse, mass, scale, q_offset, window, num_rows, kv_len, num_blocks,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    h_kv = tl.program_id(1) // TILES_PER_GROUP
    tile = tl.arange(0, HEADS * ROWS)
    in_group = (tl.program_id(1) % TILES_PER_GROUP) * HEADS + tile // ROWS
    head = (h_kv * GROUP + in_group).to(tl.int64)
    i_row = tl.program_id(0) * ROWS + tile % ROWS
    is_row = (i_row < num_rows) & (in_group < GROUP)
    row = tl.load(rows + i_row, mask=i_row < num_rows, other=-1)
    position = tl.where(i_row < num_rows, q_offset + row, -1).to(tl.int32)
    dims = tl.arange(0, DIM)
    q_tile = q + batch * stride_qb + head[:, None] * stride_qh + row[:, None] * stride_qt + dims[None, :]
    queries = tl.load(q_tile, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    k += batch * stride_kb + h_kv.to(tl.int64) * stride_kh

    # Blocks [start, full_end) are seen whole by all rows, [full_end, end) by some (a window: all).
    last = tl.max(position, 0)
    first = tl.min(tl.where(i_row < num_rows, position, kv_len), 0)
    end = last // BLOCK_K + 1
    full_end = tl.minimum((first + 1) // BLOCK_K, end)
    start = full_end * 0
    if window is not None:
        start = tl.maximum(first - window + 1, 0) // BLOCK_K
        full_end = start
    PARTS: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    inner = tl.arange(0, KEYS)

    peak = tl.full([HEADS * ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEADS * ROWS], dtype=tl.float32)
    for i in tl.range(start * PARTS, full_end * PARTS):
        in_block = (i % PARTS) * KEYS + inner
        key = (i // PARTS) * BLOCK_K + in_block
        scores = _tile_scores(
            queries, k, stride_kt, key, in_block < BLOCK_K, position, window, scale, False,
            HEAD_DIM, DIM, PRECISION,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
        peak = new_peak
    for i in tl.range(full_end * PARTS, end * PARTS):
        in_block = (i % PARTS) * KEYS + inner
        key = (i // PARTS) * BLOCK_K + in_block
        is_key = (in_block < BLOCK_K) & (key < kv_len)
        scores = _tile_scores(
            queries, k, stride_kt, key, is_key, position, window, scale, True, HEAD_DIM, DIM, PRECISION
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = new_peak
    row_lse = peak + tl.log2(tl.where(is_row, total, 1.0))
    num_heads = (tl.num_programs(1) // TILES_PER_GROUP) * GROUP
    place = (batch * num_heads + head) * num_rows + i_row
    tl.store(lse + place, row_lse * 0.6931471805599453, mask=is_row)

    base = tl.where(is_row, row_lse, 0.0)
    shares = mass + place * num_blocks
    for block in tl.range(start, full_end):
        share = tl.zeros([HEADS * ROWS], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            in_block = part * KEYS + inner
            key = block * BLOCK_K + in_block
            scores = _tile_scores(
                queries, k, stride_kt, key, in_block < BLOCK_K, position, window, scale, False,
                HEAD_DIM, DIM, PRECISION,
            )  # fmt: skip
            share += tl.sum(tl.exp2(scores - base[:, None]), 1)
        tl.store(shares + block, share, mask=is_row)
    for block in tl.range(full_end, end):
        share = tl.zeros([HEADS * ROWS], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            in_block = part * KEYS + inner
            key = block * BLOCK_K + in_block
            is_key = (in_block < BLOCK_K) & (key < kv_len)
            scores = _tile_scores(
                queries, k, stride_kt, key, is_key, position, window, scale, True, HEAD_DIM, DIM, PRECISION
            )  # fmt: skip
            share += tl.sum(tl.exp2(scores - base[:, None]), 1)
        tl.store(shares + block, share, mask=is_row)
