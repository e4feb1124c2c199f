"""Block-sparse flash attention in Triton: one pass over each query block's list, nothing else in memory.

A program owns one query block of as many query heads of a KV group as fit its row tile, so that they share
each load of keys and values; programs of one group start side by side and meet in the cache. Blocks that
every row sees whole run without a mask; blocks on the causal diagonal or the window's edge follow, with one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.layouts import PackedMask
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.triton.launch import (
    Arguments,
    Launch,
    first_slot,
    head_constants,
    narrow,
    pick_precision,
    pick_target,
    product,
    scaled_scores,
    size_constants,
    softmax_arguments,
    stride_arguments,
    tile_size,
    with_unit_stride,
)

_FREE = ["q_len", "kv_len", "q_offset", "window"]


@dataclass(frozen=True)
class _Tile:
    """Keys that a program holds at a time, and how it is run."""

    keys: int
    num_warps: int
    num_stages: int


def attend_triton(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks: (out [B, Hq, Tq, Dv] in q's dtype, lse [B, Hq, Tq] fp32)."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3], device=q.device)
    prefill_launch((q, k, v), mask, how, out, lse).run()
    return out, lse


def attend_packed_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, how: Softmax
) -> tuple[Tensor, Tensor]:
    """The same over sequences laid end to end: q [Tq, Hq, D], k and v [Tk, Hkv, D]; lse [Hq, Tq]."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = torch.empty(q.shape[1], q.shape[0], device=q.device)
    q, k, v, view = (tensor.transpose(0, 1)[None] for tensor in (q, k, v, out))
    prefill_launch((q, k, v), mask, how, view, lse[None]).run()
    return out, lse


def prefill_launch(
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: BlockMask | PackedMask,
    how: Softmax,
    out: Tensor,
    lse: Tensor,
    *,
    target: str | None = None,
) -> Launch:
    """The launch that fills `out` [B, Hq, Tq, Dv] and `lse` [B, Hq, Tq]; packed tensors come with B = 1."""
    q, k, v = (with_unit_stride(tensor) for tensor in tensors)
    target = target or pick_target(q.device)
    is_packed = isinstance(mask, PackedMask)
    lists = (mask.counts[None], mask.indices[None]) if is_packed else (mask.counts, mask.indices)
    # Lists that all sequences share get a batch of stride 0.
    counts, indices = (with_unit_stride(part).expand(q.shape[0], *part.shape[1:]) for part in lists)
    sizes = size_constants(q, v)
    dim = max(sizes["DIM_QK"], sizes["DIM_V"])
    rows = tile_size(mask.block_q if is_packed else min(mask.block_q, q.shape[2]))
    heads = head_constants(q.shape[1], k.shape[1], counts.shape[1], _rows_max(dim, q.dtype, target) // rows)
    tile = _pick_tile(heads["HEADS"] * rows, dim, q.dtype, target)
    arguments: Arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "counts": counts,
        "indices": indices,
        "sinks": how.sinks,
        **_sequence_arguments(mask),
        **softmax_arguments(how),
        **stride_arguments("bht", q=q, k=k, v=v, o=out),
        **stride_arguments("bh", l=lse, c=counts),
        **stride_arguments("bhq", i=indices),
    }
    constants = {
        **heads,
        **sizes,
        "ROWS": rows,
        "KEYS": min(tile.keys, tile_size(mask.block_k)),
        "BLOCK_Q": mask.block_q,
        "BLOCK_K": mask.block_k,
        "CROSSING": triton.next_power_of_2(num_blocks(mask.block_q, mask.block_k) + 1),
        "PRECISION": pick_precision(q.dtype, target),
    }
    grid = (k.shape[1] * heads["TILES_PER_GROUP"], counts.shape[2], q.shape[0])
    return Launch(_prefill_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def _rows_max(dim: int, dtype: torch.dtype, target: str) -> int:
    """Rows (query heads times query rows) of a program: with 256, four heads of 64 rows share each load."""
    if dtype == torch.float32 or dim > 128:
        return 64
    return 256 if target in ("sm_90", "sm_100") else 128


def _pick_tile(rows: int, dim: int, dtype: torch.dtype, target: str) -> _Tile:
    """Not tuned on a device: the largest tiles without spills in the compilers' reports (docs/kernels.md)."""
    if dtype == torch.float32:
        return _Tile(16, 4, 1) if target == "gfx942" else _Tile(32, 8, 1)
    if target == "gfx942":
        return _Tile(32, 4, 1)
    if dim > 128:
        return _Tile(32, 8, 2)
    if rows > 128:
        return _Tile(32, 8, 3 if target == "sm_90" else 2)
    return _Tile(32 if target == "sm_80" else 64, 8 if rows > 64 else 4, 3)


def _sequence_arguments(mask: BlockMask | PackedMask) -> Arguments:
    """Where the sequences lie: lengths as numbers, or per-sequence tables that stay on the device."""
    if isinstance(mask, BlockMask):
        tables: Arguments = dict.fromkeys(("cu_q", "cu_k", "first_blocks", "seq_of_block"))
        return {**tables, "q_len": mask.q_len, "kv_len": mask.kv_len, "q_offset": mask.q_offset}
    first_blocks, seq_of_block = mask.block_tables()
    return {
        "cu_q": mask.cu_q,
        "cu_k": mask.cu_k,
        "first_blocks": first_blocks,
        "seq_of_block": seq_of_block,
        **dict.fromkeys(("q_len", "kv_len", "q_offset"), 0),
    }


@triton.jit
def _take_tile(
    queries, acc, peak, total, k, v, stride_kt, stride_vt, listed, slot, part, position, kv_len,
    window, scale, cap, IS_MASKED: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM_QK: tl.constexpr, DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running softmax."""
    first = tl.load(listed + slot) * BLOCK_K + part * KEYS
    inner = tl.arange(0, KEYS)
    dims_k = tl.arange(0, DIM_QK)
    dims_v = tl.arange(0, DIM_V)
    k_tile = k + first.to(tl.int64) * stride_kt + inner[None, :] * stride_kt + dims_k[:, None]
    v_tile = v + first.to(tl.int64) * stride_vt + inner[:, None] * stride_vt + dims_v[None, :]
    IS_UNEVEN: tl.constexpr = BLOCK_K % KEYS != 0
    if IS_MASKED or IS_UNEVEN:
        is_key = first + inner < kv_len
        if IS_UNEVEN:
            is_key = is_key & (part * KEYS + inner < BLOCK_K)
        keys_t = tl.load(k_tile, mask=is_key[None, :] & (dims_k < HEAD_DIM)[:, None], other=0.0)
        values = tl.load(v_tile, mask=is_key[:, None] & (dims_v < VALUE_DIM)[None, :], other=0.0)
    else:
        if HEAD_DIM == DIM_QK:
            keys_t = tl.load(k_tile)
        else:
            keys_t = tl.load(k_tile, mask=(dims_k < HEAD_DIM)[:, None], other=0.0)
        if VALUE_DIM == DIM_V:
            values = tl.load(v_tile)
        else:
            values = tl.load(v_tile, mask=(dims_v < VALUE_DIM)[None, :], other=0.0)
    scores = scaled_scores(queries, keys_t, scale, cap, PRECISION)
    if IS_MASKED:
        key = first + inner
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if window is not None:
            is_seen = is_seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
    elif IS_UNEVEN:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if IS_MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = product(narrow(weights, values.dtype, PRECISION), values, acc, PRECISION)
    return acc, new_peak, total


@triton.jit(do_not_specialize=_FREE)
def _prefill_kernel(
    q, k, v, out, lse, counts, indices, sinks, cu_q, cu_k, first_blocks, seq_of_block, scale, cap,
    q_len, kv_len, q_offset, window, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, stride_lb,
    stride_lh, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq, GROUP: tl.constexpr,
    MASK_GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CROSSING: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM_QK: tl.constexpr,
    DIM_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head_tile = tl.program_id(0)
    i_list = tl.num_programs(1) - 1 - tl.program_id(1)  # late query blocks read most: they start first
    batch = tl.program_id(2).to(tl.int64)
    h_kv = head_tile // TILES_PER_GROUP
    i_head = (head_tile % TILES_PER_GROUP) * HEADS
    h_mask = (h_kv * GROUP + i_head) // MASK_GROUP
    i_block = i_list
    q_start = tl.zeros([], dtype=tl.int64)
    k_start = tl.zeros([], dtype=tl.int64)
    if seq_of_block is not None:
        seq = tl.load(seq_of_block + i_list)
        i_block = i_list - tl.load(first_blocks + seq)
        q_start = tl.load(cu_q + seq).to(tl.int64)
        k_start = tl.load(cu_k + seq).to(tl.int64)
        q_len = (tl.load(cu_q + seq + 1) - q_start).to(tl.int32)
        kv_len = (tl.load(cu_k + seq + 1) - k_start).to(tl.int32)
        q_offset = kv_len - q_len

    tile = tl.arange(0, HEADS * ROWS)
    in_group = i_head + tile // ROWS
    head = (h_kv * GROUP + in_group).to(tl.int64)
    row = i_block * BLOCK_Q + tile % ROWS
    is_row = (tile % ROWS < BLOCK_Q) & (row < q_len) & (in_group < GROUP)
    token = q_start + row
    dims_k = tl.arange(0, DIM_QK)
    q_tile = q + batch * stride_qb + head[:, None] * stride_qh + token[:, None] * stride_qt + dims_k[None, :]
    queries = tl.load(q_tile, mask=is_row[:, None] & (dims_k < HEAD_DIM)[None, :], other=0.0)
    k += batch * stride_kb + h_kv.to(tl.int64) * stride_kh + k_start * stride_kt
    v += batch * stride_vb + h_kv.to(tl.int64) * stride_vh + k_start * stride_vt

    # The list falls into [start, full_start) at the window's edge, [full_start, full_end) seen whole by every
    # row, and [full_end, count) across the diagonal.
    count = tl.load(counts + batch * stride_cb + h_mask * stride_ch + i_list)
    listed = indices + batch * stride_ib + h_mask.to(tl.int64) * stride_ih + i_list.to(tl.int64) * stride_iq
    position = q_offset + row
    first_position = q_offset + i_block * BLOCK_Q
    last_position = q_offset + tl.minimum((i_block + 1) * BLOCK_Q, q_len) - 1
    slots = count - CROSSING + tl.arange(0, CROSSING)
    tail = tl.load(listed + slots, mask=slots >= 0, other=-1)
    full_end = count - tl.sum((tail >= (first_position + 1) // BLOCK_K).to(tl.int32), 0)
    start = count * 0
    full_start = count * 0
    if window is not None:
        oldest = tl.maximum(first_position - window + 1, 0)
        start = first_slot(listed, count, oldest // BLOCK_K)
        oldest_full = tl.maximum(last_position - window + 1, 0)
        full_start = tl.minimum(first_slot(listed, count, tl.cdiv(oldest_full, BLOCK_K)), full_end)

    acc = tl.zeros([HEADS * ROWS, DIM_V], dtype=tl.float32)
    if sinks is None:
        peak = tl.full([HEADS * ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([HEADS * ROWS], dtype=tl.float32)
    else:
        peak = tl.load(sinks + head, mask=in_group < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([HEADS * ROWS], 1.0, dtype=tl.float32)
    PARTS: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    for i in tl.range(full_start * PARTS, full_end * PARTS):
        acc, peak, total = _take_tile(
            queries, acc, peak, total, k, v, stride_kt, stride_vt, listed, i // PARTS, i % PARTS,
            position, kv_len, window, scale, cap, False,
            KEYS, BLOCK_K, HEAD_DIM, VALUE_DIM, DIM_QK, DIM_V, PRECISION,
        )  # fmt: skip
    num_low = full_start - start
    for i in tl.range(0, (num_low + count - full_end) * PARTS):
        slot = i // PARTS
        slot = tl.where(slot < num_low, start + slot, full_end + slot - num_low)
        acc, peak, total = _take_tile(
            queries, acc, peak, total, k, v, stride_kt, stride_vt, listed, slot, i % PARTS,
            position, kv_len, window, scale, cap, True,
            KEYS, BLOCK_K, HEAD_DIM, VALUE_DIM, DIM_QK, DIM_V, PRECISION,
        )  # fmt: skip

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    acc = acc / total[:, None]
    row_lse = tl.where(is_empty, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    dims_v = tl.arange(0, DIM_V)
    o_tile = (
        out + batch * stride_ob + head[:, None] * stride_oh + token[:, None] * stride_ot + dims_v[None, :]
    )
    tl.store(
        o_tile,
        narrow(acc, out.dtype.element_ty, PRECISION),
        mask=is_row[:, None] & (dims_v < VALUE_DIM)[None, :],
    )
    tl.store(lse + batch * stride_lb + head * stride_lh + token, row_lse, mask=is_row)
