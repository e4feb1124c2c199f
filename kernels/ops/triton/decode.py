"""Decode in Triton: a few query tokens per sequence against a paged KV cache, reading only the listed blocks.

Several programs share one list: each takes an equal run of its entries, whatever the sequence's length, and
leaves a partial result; a second kernel merges the parts by their LSE. The query heads of a KV group are rows
of one tile, so that a block is loaded once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.triton.launch import (
    Arguments,
    Launch,
    first_slot,
    head_constants,
    largest,
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

# Rows (query heads times tokens) of a tile: a group of 8 heads with up to 8 tokens in one program.
_ROWS_MAX = 64
# Programs per multiprocessor that hide each other's waiting, and the parts that one merge tile holds.
_PROGRAMS_PER_UNIT = 2
_SPLITS_MAX = 64


def attend_paged_triton(
    q: Tensor, cache: PagedCache, lists: BlockLists, how: Softmax, *, num_splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens: (out [B, Hq, Tq, Dv], lse [B, Hq, Tq] fp32); two launches, no sync."""
    splits = num_splits or _pick_splits(q, cache, lists)
    out = q.new_empty(*q.shape[:3], cache.values.shape[-1])
    lse = torch.empty(q.shape[:3], device=q.device)
    parts = torch.empty(splits, *out.shape, device=q.device)
    part_lse = torch.empty(splits, *lse.shape, device=q.device)
    decode_launch(q, cache, lists, how, (parts, part_lse)).run()
    merge_launch(parts, part_lse, out, lse, how.sinks).run()
    return out, lse


def decode_launch(
    q: Tensor,
    cache: PagedCache,
    lists: BlockLists,
    how: Softmax,
    results: tuple[Tensor, Tensor],
    *,
    target: str | None = None,
) -> Launch:
    """The launch that fills the parts [S, B, Hq, Tq, Dv] and their LSE [S, B, Hq, Tq] (base 2, no sinks)."""
    target = target or pick_target(q.device)
    q, keys, values = (with_unit_stride(tensor) for tensor in (q, cache.keys, cache.values))
    counts, indices, table = (
        with_unit_stride(tensor) for tensor in (lists.counts, lists.indices, cache.page_table)
    )
    sizes = size_constants(q, values)
    tokens = triton.next_power_of_2(q.shape[2])
    heads = head_constants(q.shape[1], keys.shape[1], counts.shape[1], _ROWS_MAX // tokens)
    arguments: Arguments = {
        "q": q,
        "k": keys,
        "v": values,
        "page_table": table,
        "lengths": cache.lengths,
        "counts": counts,
        "indices": indices,
        "parts": results[0],
        "part_lse": results[1],
        "num_tokens": q.shape[2],
        **softmax_arguments(how),
        **stride_arguments("bht", q=q),
        **stride_arguments("pht", k=keys, v=values),
        **stride_arguments("b", t=table, c=counts),
        **stride_arguments("bh", i=indices),
    }
    constants = {
        **heads,
        **sizes,
        "TOKENS": tokens,
        "ROWS": max(16, heads["HEADS"] * tokens),
        "KEYS": min(_pick_keys(max(sizes["DIM_QK"], sizes["DIM_V"]), q.dtype), tile_size(lists.block_k)),
        "PAGE": keys.shape[2],
        "BLOCK_K": lists.block_k,
        "PRECISION": pick_precision(q.dtype, target),
    }
    grid = (keys.shape[1] * heads["TILES_PER_GROUP"], q.shape[0], results[0].shape[0])
    stages = 1 if target == "gfx942" or q.dtype == torch.float32 else 3
    return Launch(_decode_kernel, grid, arguments, constants, num_warps=4, num_stages=stages)


def merge_launch(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Launch:
    """The launch that merges the parts by their LSE, and lets a sink take its share."""
    splits, rows = parts.shape[0], lse.numel()
    arguments: Arguments = {
        "parts": parts,
        "part_lse": part_lse,
        "out": out,
        "lse": lse,
        "sinks": sinks,
        "num_rows": rows,
        "num_tokens": lse.shape[2],
        "num_heads": lse.shape[1],
    }
    constants = {
        "SPLITS": splits,
        "SPLITS_TILE": triton.next_power_of_2(splits),
        "VALUE_DIM": out.shape[-1],
        "DIM_V": tile_size(out.shape[-1]),
        "PRECISION": pick_precision(out.dtype, "gfx942"),
    }
    return Launch(_merge_kernel, (rows,), arguments, constants, num_warps=4, num_stages=1)


def _pick_splits(q: Tensor, cache: PagedCache, lists: BlockLists) -> int:
    """Enough programs to fill the device; not more than the lists can have entries."""
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = q.shape[0] * max(cache.keys.shape[1], lists.counts.shape[1])
    wanted = num_blocks(_PROGRAMS_PER_UNIT * units, programs)
    return max(1, min(wanted, lists.indices.shape[2], _SPLITS_MAX))


def _pick_keys(dim: int, dtype: torch.dtype) -> int:
    return 32 if dim > 128 or dtype == torch.float32 else 64


@triton.jit(do_not_specialize=["window", "num_tokens"])
def _decode_kernel(
    q, k, v, page_table, lengths, counts, indices, parts, part_lse, scale, cap, window, num_tokens,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_tb, stride_cb, stride_ib, stride_ih,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, TILES_PER_GROUP: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM_QK: tl.constexpr,
    DIM_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head_tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_batch = tl.num_programs(1)
    num_heads = (tl.num_programs(0) // TILES_PER_GROUP) * GROUP
    h_kv = head_tile // TILES_PER_GROUP
    i_head = (head_tile % TILES_PER_GROUP) * HEADS
    h_mask = (h_kv * GROUP + i_head) // MASK_GROUP
    length = tl.load(lengths + batch)

    tile = tl.arange(0, ROWS)
    in_group = i_head + tile // TOKENS
    head = (h_kv * GROUP + in_group).to(tl.int64)
    token = tile % TOKENS
    is_row = (tile // TOKENS < HEADS) & (in_group < GROUP) & (token < num_tokens)
    position = length - num_tokens + token
    dims_k = tl.arange(0, DIM_QK)
    dims_v = tl.arange(0, DIM_V)
    q_tile = q + batch * stride_qb + head[:, None] * stride_qh + token[:, None] * stride_qt + dims_k[None, :]
    queries = tl.load(q_tile, mask=is_row[:, None] & (dims_k < HEAD_DIM)[None, :], other=0.0)
    k += h_kv.to(tl.int64) * stride_kh
    v += h_kv.to(tl.int64) * stride_vh
    page_table += batch * stride_tb

    listed = indices + batch * stride_ib + h_mask.to(tl.int64) * stride_ih
    count = tl.load(counts + batch * stride_cb + h_mask)
    start = count * 0
    if window is not None:
        oldest = tl.maximum(length - num_tokens - window + 1, 0)
        start = first_slot(listed, count, oldest // BLOCK_K)
    share = tl.cdiv(count - start, tl.num_programs(2))
    begin = start + split * share
    end = tl.minimum(begin + share, count)

    acc = tl.zeros([ROWS, DIM_V], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    inner = tl.arange(0, KEYS)
    PARTS: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    for i in tl.range(begin * PARTS, end * PARTS):
        in_block = (i % PARTS) * KEYS + inner
        key = tl.load(listed + i // PARTS) * BLOCK_K + in_block
        is_key = (key < length) & (in_block < BLOCK_K)
        page = tl.load(page_table + key // PAGE, mask=is_key, other=0).to(tl.int64)
        slot = key % PAGE
        k_tile = k + (page * stride_kp + slot * stride_kt)[None, :] + dims_k[:, None]
        v_tile = v + (page * stride_vp + slot * stride_vt)[:, None] + dims_v[None, :]
        keys_t = tl.load(k_tile, mask=is_key[None, :] & (dims_k < HEAD_DIM)[:, None], other=0.0)
        values = tl.load(v_tile, mask=is_key[:, None] & (dims_v < VALUE_DIM)[None, :], other=0.0)
        scores = scaled_scores(queries, keys_t, scale, cap, PRECISION)
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if window is not None:
            is_seen = is_seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, largest(scores, 1, PRECISION))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = product(narrow(weights, values.dtype, PRECISION), values, acc * shrink[:, None], PRECISION)
        peak = new_peak

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    row = ((split * num_batch + batch) * num_heads + head) * num_tokens + token
    is_value = is_row[:, None] & (dims_v < VALUE_DIM)[None, :]
    tl.store(parts + row[:, None] * VALUE_DIM + dims_v[None, :], acc / total[:, None], mask=is_value)
    tl.store(part_lse + row, tl.where(is_empty, float("-inf"), peak + tl.log2(total)), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_heads"])
def _merge_kernel(
    parts, part_lse, out, lse, sinks, num_rows, num_tokens, num_heads,
    SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr, VALUE_DIM: tl.constexpr, DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_TILE)
    dims = tl.arange(0, DIM_V)
    place = split * num_rows + row
    logs = tl.load(part_lse + place, mask=split < SPLITS, other=float("-inf"))
    peak = largest(logs, 0, PRECISION)
    if sinks is not None:
        sink = tl.load(sinks + (row // num_tokens) % num_heads).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(logs - base)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    is_part = (split < SPLITS)[:, None] & (dims < VALUE_DIM)[None, :]
    values = tl.load(parts + place[:, None] * VALUE_DIM + dims[None, :], mask=is_part, other=0.0)
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    merged = tl.sum(values * weights[:, None], 0) / total
    tl.store(
        out + row * VALUE_DIM + dims, narrow(merged, out.dtype.element_ty, PRECISION), mask=dims < VALUE_DIM
    )
    tl.store(lse + row, tl.where(is_empty, float("-inf"), (base + tl.log2(total)) * 0.6931471805599453))
