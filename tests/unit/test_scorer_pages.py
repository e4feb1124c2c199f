"""Decode over pages: one call for all rows against the ordinary path, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.ops.tolerances import ERROR_FLOOR
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.network import Form
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, per_head_thresholds
from tests.strategies_attention import make_paged
from tests.strategies_scorer import lay_as_vllm, make_rotary, make_scorer

LENGTHS = (1, 64, 65, 700, 321, 1000)


def make_case(
    heads: tuple[int, int] = (6, 2), dim: int = 32, *, form: Form = "residual", pool: int = 16
) -> tuple[torch.Tensor, PagedCache, ScorerPages]:
    """Queries, pages dealt out of order, and their features; what lies past an end is NaN."""
    q, cache = make_paged(LENGTHS, 1, page=64, heads=heads, dim=dim, fill=float("nan"))
    cache = lay_as_vllm(cache)
    pages = ScorerPages(make_scorer(heads, dim, form=form, pool=pool), make_rotary(dim), cache.keys.shape[0])
    spans = [Span(cache.page_table[i], 0, length) for i, length in enumerate(LENGTHS)]
    pages.update(cache.keys, spans)
    return 3 * q[:, :, 0], cache, pages


def thresholds(heads: int, share: float) -> Thresholds:
    """One share everywhere, in two length bins."""
    return Thresholds(torch.full((heads, 2), math.log(share)), (500,))


@pytest.mark.parametrize("fault", [None, Fault("pooled_keys_lost", 600), Fault(past_tokens=300)])
@pytest.mark.parametrize(
    ("heads", "form", "pool"), [((6, 2), "residual", 16), ((4, 1), "low_rank", 2)], ids=str
)
def test_all_rows_at_once_as_on_a_gpu_equal_each_row_alone(
    heads: tuple[int, int], form: Form, pool: int, fault: Fault | None
) -> None:
    """What a GPU runs, without a loop over rows: as many blocks, the same output; an empty slot gives 0."""
    q, cache, pages = make_case(heads, form=form, pool=pool)
    limits, expected = thresholds(heads[1], 0.05), torch.full_like(q, torch.nan)
    pages.pooled[cache.page_table[4, 2].long()] = torch.nan
    kept_by_row = pages._decode_one_by_one(q, cache, limits, expected, fault)
    # A slot that nobody uses stands between the others.
    table = torch.cat((cache.page_table, torch.full_like(cache.page_table[:1], -1)))
    slots = PagedCache(
        cache.keys, cache.values, table, torch.cat((cache.lengths, cache.lengths.new_zeros(1)))
    )
    cut = per_head_thresholds(limits, slots.lengths.long() - 1, heads[0])[..., 0].T

    out = torch.full_like(torch.cat((q, q[:1])), 7.0)
    kept = pages.decode_together(torch.cat((q, q[:1])), slots, cut, out, fault)

    assert torch.equal(kept[:-1], kept_by_row)
    assert kept[4].tolist() == [-1] * heads[0]
    torch.testing.assert_close(out[:-1], expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert (kept[-1].abs().sum(), out[-1].abs().sum()) == (0, 0)


def test_features_do_not_depend_on_how_tokens_came() -> None:
    """Token by token, in ragged pieces or at once: the same features beside the same pages."""
    _, cache, pages = make_case(pool=4)
    whole = pages.pooled.clone()
    for step in (1, 37):
        pages.pooled.zero_()
        for first in range(0, max(LENGTHS), step):
            spans = [
                Span(cache.page_table[i], first, min(first + step, length))
                for i, length in enumerate(LENGTHS)
                if first < length
            ]
            pages.update(cache.keys, spans)

        torch.testing.assert_close(pages.pooled, whole)


def test_features_equal_those_beside_a_cache_of_one_sequence() -> None:
    """Pages read in a sequence's order hold what the side cache of the built-in engine holds."""
    _, cache, pages = make_case()
    k, _ = cache.read(5)
    alone = PooledCache(pages.scorer).update(k, k.shape[2], pages.rotary)

    found = pages.read(cache.page_table[5], LENGTHS[5])

    torch.testing.assert_close(found, alone)


def test_a_planted_fault_strikes_pages_too() -> None:
    """Lost features keep sink and diagonal alone past the fault's position, and everything before it."""
    q, cache, pages = make_case()
    out = torch.full_like(q, torch.nan)

    kept = pages.decode(q, cache, thresholds(2, 1e-9), out, fault=Fault("pooled_keys_lost", 600))

    assert kept[:, 0].tolist() == [1, 1, 2, 2, 6, 2]


def test_a_broken_scorer_gives_nan_and_never_a_silent_choice() -> None:
    """A row whose scores are NaN gives NaN and a count of -1; its neighbours are not touched."""
    q, cache, pages = make_case()
    pages.pooled[cache.page_table[3, 2].long()] = torch.nan
    out = torch.zeros_like(q)

    kept = pages.decode(q, cache, thresholds(2, 0.05), out)

    assert kept[3].tolist() == [-1] * 6
    assert bool(out[3].isnan().all())
    assert bool(out[[0, 1, 2, 4, 5]].isfinite().all())


def test_pages_must_be_as_long_as_blocks() -> None:
    """A page that is no block is refused with both sizes."""
    _, cache, pages = make_case()

    with pytest.raises(ShapeError, match="pages hold 32 tokens, the scorer's blocks 64"):
        pages.update(cache.keys[:, :, :32], [])


def test_queries_in_bf16_are_scored_where_there_is_no_native_program() -> None:
    """As on a GPU: the features beside pages are fp32, and the ordinary path takes them all the same."""
    q, cache, pages = make_case()
    q = q.bfloat16()
    cache = PagedCache(cache.keys.bfloat16(), cache.values.bfloat16(), cache.page_table, cache.lengths)
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    limits = thresholds(2, 0.05)
    kept = pages.decode(q, cache, limits, expected)
    pages.scorer.has_native_program = False

    kept_by_torch = pages.decode(q, cache, limits, out)

    assert float((kept == kept_by_torch).float().mean()) > 0.8
    same = (kept == kept_by_torch)[..., None]
    assert float(((out - expected).abs() * same).max()) < 20 * ERROR_FLOOR[torch.bfloat16]
