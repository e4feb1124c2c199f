"""Paged decode without a GPU: each sequence through the ordinary path."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.tolerances import ERROR_FLOOR
from tests.strategies_attention import make_lists, make_paged


def test_everything_listed_is_dense_attention() -> None:
    """With all blocks listed, the newest token attends to its whole sequence; an empty slot gives zeros."""
    q, cache = make_paged((130, 0, 63), 1, page=16, heads=(4, 2), dim=32)
    lists = make_lists((130, 0, 63), 1, block=64, share=1.0)

    out, lse = attend_paged(q, cache, lists)

    for i_seq in (0, 2):
        dense = scaled_dot_product_attention(q[i_seq, None], *cache.read(i_seq), enable_gqa=True)
        assert float((out[i_seq] - dense[0]).abs().max()) < ERROR_FLOOR[torch.float32]
    assert not out[1].any()
    assert bool((lse[1] == -torch.inf).all())


def test_misfits_are_named() -> None:
    """Heads, batch and lists that do not fit are refused with their values."""
    q, cache = make_paged((130,), 1, page=16, heads=(4, 2), dim=32)
    lists = make_lists((130,), 1, block=64)

    with pytest.raises(ShapeError, match="do not fit"):
        attend_paged(q[:, :3], cache, lists)
    with pytest.raises(ShapeError, match="3 heads"):
        attend_paged(q, cache, BlockLists(lists.counts.expand(1, 3), lists.indices.expand(1, 3, -1)))
    with pytest.raises(ShapeError, match="q has 1 sequences, the page table 2"):
        attend_paged(
            q, PagedCache(cache.keys, cache.values, cache.page_table.repeat(2, 1), cache.lengths), lists
        )
