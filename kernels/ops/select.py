"""From scores to compact lists: sink and diagonal always, of the rest what a rule keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, causal_limits, num_blocks
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.registry import is_native_usable, takes_triton
from sentei.kernels.ops.rules import Grid, Rule, Threshold, TopK, TopP


def select_lists(
    scores: Tensor, rule: Rule, grid: Grid, *, width: int | None = None, backend: str = "auto"
) -> BlockMask:
    """Select by rule from log shares [B, H, Q, Kb]; NaN counts as -inf, what lies ahead is never kept.

    `width` bounds a list: beyond it the lowest scores go. On a GPU lists have that width, or that of all key
    blocks: nobody waits to know the longest one, to which they are cut on a CPU. The native program (auto
    there) knows the threshold rule only.
    """
    expected = (num_blocks(grid.q_len, grid.block_q), num_blocks(grid.kv_len, grid.block_k))
    least = num_blocks(grid.block_q, grid.block_k) + 2
    if scores.dim() != 4 or tuple(scores.shape[2:]) != expected:
        raise ShapeError(
            f"scores are {tuple(scores.shape)}; this grid needs [B, H, {expected[0]}, {expected[1]}]"
        )
    if width is not None and width < min(least, expected[1]):
        raise ShapeError(f"width is {width}; sink and diagonal alone can take {least}")
    if takes_triton(backend, scores.device):
        from sentei.kernels.ops.triton.select import select_triton

        counts, indices = select_triton(scores, rule, grid, min(width or expected[1], expected[1]))
    elif (
        backend == "auto"
        and isinstance(rule, Threshold)
        and width is None
        and is_native_usable(scores.device.type, grid.block_k)
    ):
        counts, indices = _list_natively(scores, rule, grid)
    else:
        counts, indices = _compact(_keep(scores, rule, grid, width), min(width or expected[1], expected[1]))
    sizes = (grid.q_len, grid.kv_len, grid.block_q, grid.block_k, grid.q_offset)
    return BlockMask(counts, indices, *sizes)


def _list_natively(scores: Tensor, rule: Threshold, grid: Grid) -> tuple[Tensor, Tensor]:
    from sentei.kernels.ops.native.calls import select_native

    shape = scores.shape[:3]
    counts, indices = select_native(
        scores.flatten(0, 1).float(),
        rule.log_share.expand(shape).flatten(0, 1),
        start=grid.q_offset,
        block_q=grid.block_q,
        block_k=grid.block_k,
        q_end=grid.q_offset + grid.q_len,
    )
    return counts.view(shape), indices.view(*shape, indices.shape[-1])


def _keep(scores: Tensor, rule: Rule, grid: Grid, width: int | None) -> Tensor:
    """The definition, as a bool [B, H, Q, Kb]."""
    index = torch.arange(scores.shape[3], device=scores.device)
    ends = causal_limits(grid.q_len, grid.block_q, grid.block_k, grid.q_offset, scores.device)[:, None]
    rows = torch.arange(scores.shape[2], device=scores.device)[:, None]
    own = (grid.q_offset + rows * grid.block_q) // grid.block_k
    forced = ((index == 0) | (index >= own)) & (index < ends)
    is_open = ~forced & (index < ends)
    values = scores.float().nan_to_num(-torch.inf, torch.inf, -torch.inf).masked_fill(~is_open, -torch.inf)
    if isinstance(rule, Threshold):
        keep = values > rule.log_share[..., None]
    elif isinstance(rule, TopP):
        keep = _mass_at_or_below(values) > 1 - rule.share
    else:
        keep = is_open.expand_as(values)
    bound = min(width or scores.shape[3], rule.blocks if isinstance(rule, TopK) else scores.shape[3])
    keep = keep & is_open
    if bound < scores.shape[3]:
        order = torch.where(keep, values, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        order = _closed_last(order, keep)
        ranks = order.argsort(-1)
        keep &= ranks < bound - forced.sum(-1, keepdim=True)
    return keep | forced


def _mass_at_or_below(values: Tensor) -> Tensor:
    """The summed exponentials of all scores that are not above each score, in float64."""
    ascending = values.double().sort(-1).values
    sums = torch.nn.functional.pad(ascending.exp().cumsum(-1), (1, 0))
    places = torch.searchsorted(ascending, values.double().contiguous(), right=True)
    return sums.gather(-1, places)


def _closed_last(order: Tensor, keep: Tensor) -> Tensor:
    """The order with all kept entries before the others; kept ones may score -inf as well."""
    is_out = ~keep.gather(-1, order)
    return order.gather(-1, is_out.to(torch.int8).argsort(dim=-1, stable=True))


def _compact(keep: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    counts = keep.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(keep.to(torch.int8), dim=-1, descending=True, stable=True)
    width = int(counts.max()) if keep.device.type == "cpu" else bound
    indices = order[..., :width].to(torch.int32)
    return counts, indices.masked_fill(torch.arange(width, device=counts.device) >= counts[..., None], -1)
