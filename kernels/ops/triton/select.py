"""Selection in Triton: a program reads one query block's scores and writes its list; no matrix, no host sync.

Cut-offs are found bit by bit: a score's bits, reordered so that they compare as whole numbers, are bisected
32 times over the scores held in registers. That needs no sort, and is exact. A decode step has a kernel of
its own: it makes shares of log weights first, and lets the heads of a KV group share one list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.rules import Grid, Rule, Threshold, TopK, TopP
from sentei.kernels.ops.triton.launch import Arguments, Launch, stride_arguments, with_unit_stride


def select_triton(scores: Tensor, rule: Rule, grid: Grid, width: int) -> tuple[Tensor, Tensor]:
    """Compact lists of `width` entries: (counts [B, H, Q], indices [B, H, Q, width]), int32."""
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    indices = torch.empty(*scores.shape[:3], width, dtype=torch.int32, device=scores.device)
    select_launch(scores, rule, grid, counts, indices).run()
    return counts, indices


def select_launch(scores: Tensor, rule: Rule, grid: Grid, counts: Tensor, indices: Tensor) -> Launch:
    """The launch that fills contiguous `counts` [B, H, Q] and `indices` [B, H, Q, width]."""
    scores = with_unit_stride(scores)
    width = indices.shape[3]
    limits = rule.log_share.float().expand(scores.shape[:3]) if isinstance(rule, Threshold) else None
    bound = min(width, rule.blocks) if isinstance(rule, TopK) else width
    arguments: Arguments = {
        "scores": scores,
        "limits": limits,
        "counts": counts,
        "indices": indices,
        "spare": 1.0 - rule.share if isinstance(rule, TopP) else None,
        "q_len": grid.q_len,
        "q_offset": grid.q_offset,
        "width": width,
        "bound": bound,
        **stride_arguments("bhq", s=scores, t=scores if limits is None else limits),
    }
    tile = max(16, triton.next_power_of_2(scores.shape[3]))
    constants = {
        "BLOCK_Q": grid.block_q,
        "BLOCK_K": grid.block_k,
        "BLOCKS": tile,
        "IS_BOUNDED": bound < scores.shape[3],
    }
    launch_grid = (scores.shape[2], scores.shape[1], scores.shape[0])
    warps = min(8, max(1, tile // 256))
    return Launch(_select_kernel, launch_grid, arguments, constants, num_warps=warps, num_stages=1)


def select_step_triton(
    logits: Tensor,
    forced: Tensor,
    limits: Tensor,
    lengths: Tensor,
    *,
    lists: int,
    block_k: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of one new token per sequence: (counts [B, lists], indices [B, lists, width], is_odd [B, lists]).

    logits [B, Hq, W] are log weights of blocks, forced [B, Hq] the exact one of sink and own block, limits
    [B, Hq] log shares. A list keeps what any of its query heads wants; it is odd (1, else 0) where a score is
    NaN.
    """
    shape = (logits.shape[0], lists)
    counts, is_odd = (torch.empty(shape, dtype=torch.int32, device=logits.device) for _ in range(2))
    indices = torch.empty(*shape, width, dtype=torch.int32, device=logits.device)
    select_step_launch(logits, forced, limits, lengths, (counts, indices, is_odd), block_k=block_k).run()
    return counts, indices, is_odd


def select_step_launch(
    logits: Tensor,
    forced: Tensor,
    limits: Tensor,
    lengths: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    *,
    block_k: int,
) -> Launch:
    """The launch that fills contiguous counts [B, lists], indices [B, lists, width] and is_odd [B, lists]."""
    counts, indices, is_odd = results
    width = indices.shape[2]
    arguments: Arguments = {
        "logits": logits.contiguous(),
        "forced": forced.contiguous(),
        "limits": limits.float().contiguous(),
        "lengths": lengths,
        "counts": counts,
        "indices": indices,
        "is_odd": is_odd,
        "k_blocks": logits.shape[2],
        "width": width,
    }
    tile = max(16, triton.next_power_of_2(logits.shape[2]))
    constants = {
        "HEADS": logits.shape[1] // counts.shape[1],
        "BLOCK_K": block_k,
        "BLOCKS": tile,
        "IS_BOUNDED": width < logits.shape[2],
    }
    grid = (counts.shape[1], counts.shape[0])
    return Launch(_select_step_kernel, grid, arguments, constants, min(8, max(1, tile // 256)), 1)


@triton.jit
def _ordered(values):
    """Whole numbers that compare as the fp32 values do; 0 is below all of them."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _highest(keep, ordered, room):
    """Of the kept ones as many as there is room for, by their order; of equals, the first."""
    room = tl.maximum(room, 0)
    ordered = tl.where(keep, ordered, 0)
    cut = tl.full([], 0, dtype=tl.uint32)
    bit = tl.full([], 0x80000000, dtype=tl.uint32)
    for _ in tl.range(0, 32):  # the highest cut at or above which there are that many
        trial = cut | bit
        bit = bit >> 1
        above = tl.sum((ordered >= trial).to(tl.int32), 0)
        cut = tl.where(above >= room, trial, cut)
    is_above = keep & (ordered > cut)
    is_equal = keep & (ordered == cut)
    left = room - tl.sum(is_above.to(tl.int32), 0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= left))


@triton.jit
def _write_list(keep, index, counts, indices, row, width, BLOCKS: tl.constexpr):
    """Store how many are kept, and which, in order; -1 fills the rest of the list."""
    listed = keep.to(tl.int32)
    count = tl.sum(listed, 0)
    tl.store(counts + row, count)
    tl.store(indices + row * width + tl.cumsum(listed, 0) - 1, index, mask=keep)
    tl.store(
        indices + row * width + index,
        tl.full([BLOCKS], -1, dtype=tl.int32),
        mask=(index >= count) & (index < width),
    )


@triton.jit(do_not_specialize=["q_len", "q_offset", "width", "bound"])
def _select_kernel(
    scores, limits, counts, indices, spare, q_len, q_offset, width, bound,
    stride_sb, stride_sh, stride_sq, stride_tb, stride_th, stride_tq,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, IS_BOUNDED: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    own = (q_offset + i_block * BLOCK_Q) // BLOCK_K
    end = (q_offset + tl.minimum((i_block + 1) * BLOCK_Q, q_len) - 1) // BLOCK_K + 1
    is_forced = ((index == 0) | (index >= own)) & (index < end)
    is_open = (index > 0) & (index < own)
    place = scores + batch * stride_sb + head * stride_sh + i_block.to(tl.int64) * stride_sq
    values = tl.load(place + index, mask=is_open, other=float("-inf")).to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    ordered = tl.where(is_open, _ordered(values), 0)

    if limits is not None:
        keep = is_open & (
            values > tl.load(limits + batch * stride_tb + head * stride_th + i_block * stride_tq)
        )
    elif spare is not None:
        # The highest cut whose blocks below it weigh no more than what may be spared.
        weights = tl.where(is_open, tl.exp2(values * 1.4426950408889634), 0.0)
        cut = tl.full([], 0, dtype=tl.uint32)
        bit = tl.full([], 0x80000000, dtype=tl.uint32)
        for _ in tl.range(0, 32):
            trial = cut | bit
            bit = bit >> 1
            dropped = tl.sum(tl.where(ordered < trial, weights, 0.0), 0)
            cut = tl.where(dropped <= spare, trial, cut)
        keep = is_open & (ordered >= cut)
    else:
        keep = is_open

    if IS_BOUNDED:
        keep = _highest(keep, ordered, bound - tl.sum(is_forced.to(tl.int32), 0))

    row = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + i_block
    _write_list(keep | is_forced, index, counts, indices, row, width, BLOCKS)


@triton.jit(do_not_specialize=["k_blocks", "width"])
def _select_step_kernel(
    logits, forced, limits, lengths, counts, indices, is_odd, k_blocks, width,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, IS_BOUNDED: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_list
    length = tl.load(lengths + tl.program_id(1))
    end = tl.minimum(tl.cdiv(length, BLOCK_K), k_blocks)
    index = tl.arange(0, BLOCKS)
    is_open = (index > 0) & (index < end - 1)
    is_forced = ((index == 0) | (index == end - 1)) & (index < end)
    margin = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    odd = row.to(tl.int32) * 0
    for i in tl.static_range(HEADS):
        head = row * HEADS + i
        values = tl.load(logits + head * k_blocks + index, mask=is_open, other=float("-inf"))
        seen = tl.load(forced + head)
        numbers = tl.where(values == values, values, float("-inf"))
        top = tl.maximum(tl.max(numbers, 0), seen)
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        total = tl.sum(tl.exp2((values - top) * 1.4426950408889634), 0)
        total = total + tl.exp2((seen - top) * 1.4426950408889634)
        odd = tl.where((total == total) & (total < float("inf")), odd, 1)
        total = tl.where(total == 0.0, 1.0, total)  # an empty slot: nothing was seen, nothing is open
        over = values - (top + tl.log2(total) * 0.6931471805599453) - tl.load(limits + head)
        margin = tl.maximum(margin, tl.where(over == over, over, float("-inf")))
    keep = is_open & (margin > 0)
    if IS_BOUNDED:
        ordered = tl.where(is_open, _ordered(margin), 0)
        keep = _highest(keep, ordered, width - tl.sum(is_forced.to(tl.int32), 0))
    _write_list(keep | is_forced, index, counts, indices, row, width, BLOCKS)
    tl.store(is_odd + row, tl.where(length > 0, odd, 0))
