"""Triton's paged decode answers to the definition, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.tolerances import ERROR_FLOOR, allowed_error
from tests.strategies_attention import make_lists, make_paged

pytestmark = pytest.mark.gpu
FLOOR = ERROR_FLOOR[torch.float32]

# (lengths, tokens, page, block, (query heads, KV heads, list heads), head size, splits, options)
CASES: list[tuple[tuple[int, ...], int, int, int, tuple[int, int, int], int, int, dict[str, Any]]] = [
    ((1, 65, 111, 1000), 1, 16, 64, (4, 1, 1), 32, 3, {}),
    ((300, 63), 1, 64, 16, (8, 2, 2), 64, 5, {"sinks": True}),
    ((200, 0, 70), 3, 16, 32, (6, 2, 6), 60, 2, {"window": 90}),
    ((130, 257), 2, 100, 128, (3, 1, 1), 128, 64, {"softcap": 4.0, "window": 7}),
    ((90,), 1, 1, 48, (2, 2, 1), 256, 1, {}),
]


@pytest.mark.parametrize(("lengths", "tokens", "page", "block", "heads", "dim", "splits", "options"), CASES)
def test_output_and_lse_equal_the_definition(
    lengths: tuple[int, ...],
    tokens: int,
    page: int,
    block: int,
    heads: tuple[int, int, int],
    dim: int,
    splits: int,
    options: dict[str, Any],
    device: str,
) -> None:
    """Ragged batches, an empty slot, pages and blocks of any size, splits beyond the list agree."""
    q, cache = make_paged(lengths, tokens, page=page, heads=heads[:2], dim=dim, device=device)
    lists = make_lists(lengths, heads[2], block=block, device=device)
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-1, 3, heads[0], device=device)}

    out, lse = attend_paged(q, cache, lists, num_splits=splits, backend="triton", **options)

    exact, exact_lse = attend_paged(q, cache, lists, backend="reference", **options)
    assert float((out - exact).abs().max()) <= FLOOR
    assert torch.allclose(lse, exact_lse, rtol=0, atol=2 * FLOOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_torchs_own(dtype: torch.dtype, device: str) -> None:
    """With everything listed, half-width inputs may lose at most twice what torch's dense operator loses."""
    q, cache = make_paged((333,), 1, page=16, heads=(8, 2), dim=64, device=device, dtype=dtype)
    lists = make_lists((333,), 2, block=64, share=1.0, device=device)

    out, _ = attend_paged(q, cache, lists, num_splits=4, backend="triton")

    keys, values = cache.read(0)
    plain = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    exact = scaled_dot_product_attention(q.float(), keys.float(), values.float(), enable_gqa=True)
    assert float((out.float() - exact).abs().max()) <= allowed_error(plain, exact)


def test_unlisted_pages_and_the_rest_of_the_last_are_never_touched(device: str) -> None:
    """NaN in every page that no list names, and past each sequence's end, does not reach the output."""
    q, cache = make_paged((200, 150), 1, page=16, heads=(4, 2), dim=32, device=device, fill=torch.nan)
    lists = make_lists((200, 150), 1, block=16, share=0.0, device=device)
    named = {int(cache.page_table[b, i]) for b in range(2) for i in lists.indices[b, 0].tolist() if i >= 0}
    unread = [page for page in range(cache.keys.shape[0]) if page not in named]
    cache.keys[unread], cache.values[unread] = torch.nan, torch.nan

    out, lse = attend_paged(q, cache, lists, num_splits=2, backend="triton")

    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_nothing_listed_gives_zeros(device: str) -> None:
    """Sequences without a listed block give zeros and an LSE of minus infinity."""
    q, cache = make_paged((200, 1), 1, page=16, heads=(4, 2), dim=32, device=device)
    counts = torch.zeros(2, 2, dtype=torch.int32, device=device)
    lists = BlockLists(counts, torch.full((2, 2, 3), -1, dtype=torch.int32, device=device))

    out, lse = attend_paged(q, cache, lists, backend="triton")

    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_pages_are_read_in_the_order_of_the_table(device: str) -> None:
    """The same tokens in other pages give the same answer, bit for bit."""
    q, cache = make_paged((100,), 1, page=16, heads=(4, 2), dim=32, device=device)
    lists = make_lists((100,), 2, block=64, device=device)
    order = torch.randperm(cache.keys.shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    places = order.argsort().to(torch.int32)
    moved = PagedCache(cache.keys[order], cache.values[order], places[cache.page_table.long()], cache.lengths)

    out, _ = attend_paged(q, cache, lists, num_splits=2, backend="triton")
    again, _ = attend_paged(q, moved, lists, num_splits=2, backend="triton")

    assert torch.equal(out, again)
