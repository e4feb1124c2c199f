"""Selection in Triton: a program reads one query block's scores and writes its list; no matrix, no host sync.

Cut-offs are found bit by bit: a score's bits, reordered so that they compare as whole numbers, are bisected
32 times over the scores held in registers. That needs no sort, and is exact.
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


@triton.jit
def _ordered(values):
    """Whole numbers that compare as the fp32 values do; 0 is below all of them."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


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
    highest = tl.full([], 0x80000000, dtype=tl.uint32)

    if limits is not None:
        keep = is_open & (
            values > tl.load(limits + batch * stride_tb + head * stride_th + i_block * stride_tq)
        )
    elif spare is not None:
        # The highest cut whose blocks below it weigh no more than what may be spared.
        weights = tl.where(is_open, tl.exp2(values * 1.4426950408889634), 0.0)
        cut = tl.full([], 0, dtype=tl.uint32)
        bit = highest
        for _ in tl.range(0, 32):
            trial = cut | bit
            bit = bit >> 1
            dropped = tl.sum(tl.where(ordered < trial, weights, 0.0), 0)
            cut = tl.where(dropped <= spare, trial, cut)
        keep = is_open & (ordered >= cut)
    else:
        keep = is_open

    if IS_BOUNDED:
        # The highest cut at or above which there are as many as there is room for; of equals, the first.
        room = tl.maximum(bound - tl.sum(is_forced.to(tl.int32), 0), 0)
        ordered = tl.where(keep, ordered, 0)
        cut = tl.full([], 0, dtype=tl.uint32)
        bit = highest
        for _ in tl.range(0, 32):
            trial = cut | bit
            bit = bit >> 1
            above = tl.sum((ordered >= trial).to(tl.int32), 0)
            cut = tl.where(above >= room, trial, cut)
        is_above = keep & (ordered > cut)
        is_equal = keep & (ordered == cut)
        left = room - tl.sum(is_above.to(tl.int32), 0)
        keep = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= left))

    keep = keep | is_forced
    listed = keep.to(tl.int32)
    count = tl.sum(listed, 0)
    row = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + i_block
    tl.store(counts + row, count)
    tl.store(indices + row * width + tl.cumsum(listed, 0) - 1, index, mask=keep)
    tl.store(
        indices + row * width + index,
        tl.full([BLOCKS], -1, dtype=tl.int32),
        mask=(index >= count) & (index < width),
    )
