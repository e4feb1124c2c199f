"""Decode over pages: one call for all rows against the ordinary path, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from sentei.kernels.ops import registry
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.ops.native.calls import has_byte_scores
from sentei.kernels.ops.tolerances import ERROR_FLOOR
from sentei.kernels.scorer.cpu_pages import CpuScorerPages, DecodeRows, FullPages
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.network import Form, ScorerError
from sentei.kernels.scorer.page_mass import dropped_over_pages
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, select_blocks
from tests.strategies_attention import make_paged
from tests.strategies_scorer import lay_as_vllm, make_rotary, make_scorer

LENGTHS = (1, 64, 65, 700, 321, 1000)


def make_case(
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    *,
    form: Form = "residual",
    pool: int = 16,
    rank: int = 24,
    dtype: torch.dtype = torch.float32,
    share: float = 0.05,
) -> tuple[torch.Tensor, PagedCache, CpuScorerPages]:
    """Queries, pages dealt out of order, and their features; what lies past an end is NaN."""
    q, cache = make_paged(LENGTHS, 1, page=64, heads=heads, dim=dim, fill=float("nan"))
    cache = lay_as_vllm(cache)
    cache = PagedCache(cache.keys.to(dtype), cache.values.to(dtype), cache.page_table, cache.lengths)
    pages = CpuScorerPages(
        make_scorer(heads, dim, form=form, pool=pool, rank=rank),
        make_rotary(dim),
        cache.keys.shape[0],
        thresholds=[thresholds(heads[1], 1e-9), thresholds(heads[1], share)],
    )
    pages.update(cache.keys, full_pages(cache, 0, max(LENGTHS)))
    return 3 * q[:, :, 0].to(dtype), cache, pages


def full_pages(cache: PagedCache, first: int, last: int) -> FullPages:
    """The pages that become full when tokens `first` to `last` - 1 come, as far as sequences have them."""
    spans = [
        (cache.page_table[i], first, min(last, length)) for i, length in enumerate(LENGTHS) if first < length
    ]
    return FullPages.of(spans, 64)


def newest_rows(which: int = 1) -> DecodeRows:
    """The newest token of each sequence, all under one of the thresholds."""
    return DecodeRows.of([(i, i, length - 1, which) for i, length in enumerate(LENGTHS)], (500,))


def thresholds(heads: int, share: float) -> Thresholds:
    """One share everywhere, in two length bins."""
    return Thresholds(torch.full((heads, 2), math.log(share)), (500,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "dim", "form", "pool"),
    [
        ((6, 2), 32, "residual", 16),
        ((4, 1), 64, "low_rank", 2),
        ((9, 3), 64, "residual", 4),
        ((4, 1), 64, "residual", 64),
    ],
    ids=str,
)
def test_all_rows_in_one_call_equal_each_row_alone(
    heads: tuple[int, int], dim: int, form: Form, pool: int, dtype: torch.dtype
) -> None:
    """Ragged lengths, heads that choose apart: the program keeps as many blocks and gives the same output."""
    q, cache, pages = make_case(heads, dim, form=form, pool=pool, dtype=dtype)
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    assert pages.has_native_decode(cache)  # else the definition would be compared with itself

    kept, lse = pages.decode(q, newest_rows(), cache, out)
    kept_by_row, lse_by_row = pages.decode_one_by_one(q, newest_rows(), cache, expected)

    assert 2 < float(kept[3:].float().mean()) < 10
    if dtype == torch.float32:
        assert torch.equal(kept, kept_by_row)
        torch.testing.assert_close(lse, lse_by_row)
        assert float((out - expected).abs().max()) < 2 * ERROR_FLOOR[dtype]  # each is off by as much
    else:  # the plain path rounds features to bf16, so that a block at the border may go either way
        assert float((kept == kept_by_row).float().mean()) > 0.8
        same = (kept == kept_by_row)[..., None]
        assert float(((out - expected).abs() * same).max()) < 20 * ERROR_FLOOR[dtype]


@pytest.mark.skipif(not has_byte_scores(32), reason="this processor has no products of bytes")
@pytest.mark.parametrize("rank", [16, 32, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_keys_in_bytes_choose_as_floats_do(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a page stand for its features: log shares are off by rounding, and few blocks change sides."""
    q, cache, pages = make_case((9, 3), 64, form="low_rank", pool=1, rank=rank, dtype=dtype)
    out = torch.full_like(q, torch.nan)
    kept, _ = pages.decode(q, newest_rows(), cache, out)
    monkeypatch.setattr("sentei.kernels.scorer.cpu_pages.has_byte_scores", lambda rank: False)
    _, _, floats = make_case((9, 3), 64, form="low_rank", pool=1, rank=rank, dtype=dtype)
    expected = torch.full_like(q, torch.nan)
    kept_by_floats, _ = floats.decode(q, newest_rows(), cache, expected)

    assert 2 < float(kept_by_floats[3:].float().mean()) < 12
    same = kept == kept_by_floats
    assert float(same.float().mean()) > 0.8
    assert float(((out - expected).abs() * same[..., None]).max()) < 20 * ERROR_FLOOR[dtype]


def test_rows_may_lie_anywhere_and_share_sequences() -> None:
    """A resumed request computes several of its answer's rows at once; each sees what its position sees."""
    q, cache, pages = make_case()
    queries, out = torch.zeros(9, *q.shape[1:]), torch.zeros(9, *q.shape[1:])
    queries[7], queries[2] = q[5], q[4]
    rows = DecodeRows.of([(7, 5, 999, 1), (2, 5, 640, 1), (4, 3, 699, 0)], (500,))
    expected = torch.zeros_like(out)

    kept, _ = pages.decode(queries, rows, cache, out)

    assert torch.equal(kept, pages.decode_one_by_one(queries, rows, cache, expected)[0])
    torch.testing.assert_close(out, expected, atol=2 * ERROR_FLOOR[torch.float32], rtol=0)
    assert kept[2].tolist() == [11] * 6  # the other thresholds keep everything
    assert not bool(out[[0, 1, 3, 5, 6, 8]].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 640])
def test_a_prompt_over_pages_equals_one_over_rows(first: int, dtype: torch.dtype) -> None:
    """The newest rows of a ragged sequence read its pages where they lie."""
    _, cache, pages = make_case((6, 2), 64, dtype=dtype)
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(1000 - first, 6, 64, generator=generator).to(dtype)
    keep = torch.rand(6, -(-q.shape[0] // 16), 16, generator=generator) < 0.5
    starts = torch.arange(keep.shape[1]) * 16 + first
    mask = select_blocks(
        torch.where(keep, 0.0, -torch.inf)[None], Thresholds(torch.full((2, 1), -1.0), ()), starts=starts,
        q_len=q.shape[0], kv_len=1000, q_offset=first, block_q=16, block_k=64,
    )  # fmt: skip
    one = PagedCache(cache.keys, cache.values, cache.page_table[5:6], cache.lengths[5:6])
    out = torch.full_like(q, torch.nan)
    expected, sums = attend(
        q.transpose(0, 1)[None], *cache.read(5), mask, scale=pages.scorer.scale, return_lse=True
    )

    lse = pages.attend_prompt(q, one, mask, out)

    assert torch.equal(out, expected[0].transpose(0, 1))
    assert sums is not None
    assert torch.equal(lse, sums[0])


def test_features_do_not_depend_on_how_tokens_came() -> None:
    """Token by token, in ragged pieces or at once: the same features beside the same pages."""
    _, cache, pages = make_case(pool=4)
    whole = pages.pooled.clone()
    for step in (1, 37):
        pages.pooled.zero_()
        for first in range(0, max(LENGTHS), step):
            pages.update(cache.keys, full_pages(cache, first, first + step))

        torch.testing.assert_close(pages.pooled, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_equal_those_beside_a_cache_of_one_sequence(dtype: torch.dtype) -> None:
    """Pages read in a sequence's order hold what the built-in engine's side cache holds of full blocks."""
    _, cache, pages = make_case((4, 1), 64, form="low_rank", pool=1, rank=32, dtype=dtype)
    k, _ = cache.read(5)
    alone = PooledCache(pages.scorer).update(k, k.shape[2], pages.rotary)

    found = pages.read(cache.page_table[5], LENGTHS[5])

    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found.to(dtype), alone[:, :, : LENGTHS[5] // 64 * 64])
        return
    assert torch.equal(found.cells, alone.cells)
    assert torch.equal(found.flaws, alone.flaws)


@pytest.mark.skipif(not has_byte_scores(32), reason="this processor has no products of bytes")
def test_bytes_stand_for_their_features_where_no_program_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the program given up, rows choose by the floats that the bytes stand for: nearly as before."""
    q, cache, pages = make_case((9, 3), 64, form="low_rank", pool=1, rank=24)
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    kept_before, _ = pages.decode(q, newest_rows(), cache, expected)
    monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})

    kept, _ = pages.decode(q, newest_rows(), cache, out)

    same = kept == kept_before
    assert float(same.float().mean()) > 0.8
    assert float(((out - expected).abs() * same[..., None]).max()) < 20 * ERROR_FLOOR[torch.float32]


def test_a_planted_fault_strikes_pages_too() -> None:
    """Lost features keep sink and diagonal alone past the fault's position, and everything before it."""
    q, cache, pages = make_case()
    out = torch.full_like(q, torch.nan)

    kept, _ = pages.decode(q, newest_rows(0), cache, out, fault=Fault("pooled_keys_lost", 600))

    assert kept[:, 0].tolist() == [1, 1, 2, 2, 6, 2]


@pytest.mark.parametrize(("form", "pool"), [("residual", 16), ("low_rank", 1)])
def test_a_broken_scorer_gives_nan_and_never_a_silent_choice(form: Form, pool: int) -> None:
    """A row whose scores are NaN gives NaN and a count of -1; its neighbours are not touched."""
    q, cache, pages = make_case((6, 2), 64, form=form, pool=pool)
    keys = cache.keys.clone(memory_format=torch.preserve_format)
    keys[cache.page_table[3, 2].long(), :, 5, 7] = torch.nan
    pages.update(keys, full_pages(cache, 0, max(LENGTHS)))
    out = torch.zeros_like(q)

    kept, lse = pages.decode(q, newest_rows(), cache, out)

    assert kept[3].tolist() == [-1] * 6
    assert bool(lse[3].isnan().all())
    assert bool(out[3].isnan().all())
    assert bool(out[[0, 1, 2, 4, 5]].isfinite().all())


@pytest.mark.parametrize("form", ["residual", "low_rank"])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_broken_key_in_a_page_is_an_error_for_a_prompt(
    form: Form, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are some number; the flaw beside them says that they are none."""
    q, cache, pages = make_case((6, 2), 64, form=form, pool=16 if form == "residual" else 1)
    keys = cache.keys.clone(memory_format=torch.preserve_format)
    keys[cache.page_table[5, 3].long(), 1, 5, 7] = torch.nan
    pages.update(keys, full_pages(cache, 0, max(LENGTHS)))
    if not is_native:
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
    k, _ = cache.read(5)  # without the NaN: the features alone must tell

    with pytest.raises(ScorerError, match="the scorer gave NaN"):
        pages.score_prompt(
            q[5][None, :, None].expand(-1, -1, 16, -1), k, pages.read(cache.page_table[5], LENGTHS[5]), 16
        )


def test_pages_must_be_as_long_as_blocks() -> None:
    """A page that is no block is refused with both sizes."""
    _, cache, pages = make_case()

    with pytest.raises(ShapeError, match="pages hold 32 tokens, the scorer's blocks 64"):
        pages.update(cache.keys[:, :, :32], full_pages(cache, 0, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "pool"), [("residual", 16), ("residual", 64), ("low_rank", 2), ("low_rank", 1)]
)
def test_encoded_by_the_program_as_by_tensors(form: Form, pool: int, dtype: torch.dtype) -> None:
    """Features or bytes of full pages are those that the plain operations give, wherever they lie."""
    _, cache, pages = make_case((6, 2), 64, form=form, pool=pool, dtype=dtype)
    plain = CpuScorerPages(pages.scorer, pages.rotary, cache.keys.shape[0])

    plain.update(cache.keys.contiguous(), full_pages(cache, 0, max(LENGTHS)))

    assert pages.cells.shape == plain.cells.shape
    if pages.cells.numel():
        units = (pages.cells.view(torch.uint8).int() - plain.cells.view(torch.uint8).int()).abs()
        assert int(units.max()) <= {torch.float32: 1, torch.bfloat16: 2}[dtype]
        assert not bool(pages.flaws.any() or plain.flaws.any())
        return
    scale = float(plain.pooled.abs().max())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * scale
    assert float((pages.pooled - plain.pooled).abs().max()) <= tolerance


def test_mass_that_rows_over_pages_drop_is_that_of_dense_attention() -> None:
    """The LSE of what was read against that of all keys in sight; who keeps everything drops nothing."""
    q, cache, pages = make_case()
    rows = DecodeRows.of([(5, 5, 999, 1), (5, 5, 999, 0)], (500,))
    _, lse = pages.decode(q, rows, cache, torch.empty_like(q))
    k, _ = cache.read(5)

    found = dropped_over_pages(q[[5, 5]], lse, torch.tensor([999, 999]), cache, 5, pages.scorer.scale)

    scores = torch.einsum("gnd,gtd->gnt", q[5].view(2, 3, 32), k[0]) * pages.scorer.scale
    expected = 1 - (lse[0] - scores.logsumexp(-1).flatten()).exp()
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    assert 0.01 < float(found[0].mean()) < 1
    assert float(found[1].max()) < 1e-5
