"""Decode over a paged KV cache: a few query tokens per sequence read the listed blocks, page by page."""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BLOCK_MIN, BlockMask
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.registry import Request, pick_backend
from sentei.kernels.ops.rules import Softmax


def attend_paged(
    q: Tensor,
    cache: PagedCache,
    lists: BlockLists,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's newest tokens: (out [B, Hq, Tq, Dv], lse [B, Hq, Tq] fp32).

    q [B, Hq, Tq, D] sits on the last Tq tokens of each sequence. On a GPU `num_splits` programs share each
    list (None: enough to fill the device); elsewhere each sequence goes through `attend` in turn.
    """
    _check(q, cache, lists)
    how = Softmax(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, sinks)
    request = Request(
        q.device.type,
        q.dtype,
        q.shape[2],
        needs_lse=True,
        needs_softcap=softcap is not None,
        needs_sinks=sinks is not None,
    )
    with torch.no_grad():
        if pick_backend(request, backend).backend.name == "triton":
            from sentei.kernels.ops.triton.decode import attend_paged_triton

            return attend_paged_triton(q, cache, lists, how, num_splits=num_splits)
        return _one_by_one(q, cache, lists, how, backend)


def _one_by_one(
    q: Tensor, cache: PagedCache, lists: BlockLists, how: Softmax, backend: str
) -> tuple[Tensor, Tensor]:
    """Copy each sequence's pages side by side, and let `attend` do the rest."""
    tokens = q.shape[2]
    out = q.new_zeros(*q.shape[:3], cache.values.shape[-1])
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    for i_seq, length in enumerate(cache.lengths.tolist()):
        if length == 0:
            continue
        counts, indices = lists.counts[i_seq, None, :, None], lists.indices[i_seq, None, :, None]
        blocks = (max(BLOCK_MIN, tokens), lists.block_k)
        one, one_lse = attend(
            q[i_seq, None],
            *cache.read(i_seq),
            BlockMask(counts, indices, tokens, length, *blocks, length - tokens),
            scale=how.scale,
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
            return_lse=True,
            backend=backend,
        )
        assert one_lse is not None
        out[i_seq], lse[i_seq] = one[0], one_lse[0]
    return out, lse


def _check(q: Tensor, cache: PagedCache, lists: BlockLists) -> None:
    batch, q_heads, _, dim = q.shape
    kv_heads = cache.keys.shape[1]
    if cache.keys.shape[:3] != cache.values.shape[:3] or cache.keys.shape[3] != dim or q_heads % kv_heads:
        raise ShapeError(
            f"q {tuple(q.shape)}, keys {tuple(cache.keys.shape)}, values {tuple(cache.values.shape)} do not "
            "fit; pass q [B, Hq, Tq, D], keys and values [P, Hkv, page, D]"
        )
    if cache.page_table.shape[0] != batch or cache.lengths.shape != (batch,):
        raise ShapeError(
            f"q has {batch} sequences, the page table {cache.page_table.shape[0]}, "
            f"lengths {tuple(cache.lengths.shape)}"
        )
    heads = lists.counts.shape[1]
    if lists.counts.shape[0] != batch or heads not in (1, kv_heads, q_heads):
        raise ShapeError(
            f"lists have batch {lists.counts.shape[0]} and {heads} heads; "
            f"batch must be {batch}, heads 1, {kv_heads} or {q_heads}"
        )
