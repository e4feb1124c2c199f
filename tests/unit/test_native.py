"""Sentei's own CPU programs against the fp32 definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sentei.kernels.ops import registry
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask, causal_limits
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.native import calls
from sentei.kernels.ops.native.calls import attend_native
from sentei.kernels.ops.native.structs import fill_struct, struct_fields
from sentei.kernels.ops.reference import attend_reference
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import BYTE_SCORE_RMS, ERROR_FLOOR, allowed_error
from sentei.kernels.scorer import selection
from sentei.kernels.scorer.features import RotaryTable, unrotate
from sentei.kernels.scorer.network import BlockScorer, Form, Reduce, ScorerError, ScorerShape
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, score_blocks, select_blocks

# batch, query heads, KV heads, mask heads, query rows, past, head size, query block, key block
SHAPES = [
    (1, 4, 2, 4, 1, 0, 64, 64, 64),
    (2, 4, 2, 2, 63, 0, 32, 64, 64),
    (1, 4, 1, 1, 65, 46, 60, 64, 64),
    (2, 4, 2, 4, 111, 0, 100, 16, 32),
    (1, 2, 2, 2, 1000, 0, 64, 128, 128),
    (1, 4, 1, 4, 130, 257, 256, 64, 96),
    (1, 2, 1, 1, 4095, 0, 32, 64, 64),
    (2, 8, 2, 2, 1, 499, 64, 64, 64),
    (2, 8, 2, 8, 3, 500, 60, 64, 64),
]


def make_call(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, density: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
    """Random tensors, q laid out as a model lays it out, and a random legal mask."""
    batch, q_heads, kv_heads, mask_heads, q_len, past, dim, block_q, block_k = shape
    generator = torch.Generator().manual_seed(sum(shape))
    kv_len = past + q_len
    q = torch.randn(batch, q_len, q_heads, dim, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim, generator=generator).to(dtype) for _ in range(2))
    limits = causal_limits(q_len, block_q, block_k, past)
    num_k = -(-kv_len // block_k)
    keep = torch.rand(batch, mask_heads, len(limits), num_k, generator=generator) < density
    keep &= torch.arange(num_k) < limits[:, None]
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_k": block_k, "q_offset": past}
    return q, k, v, BlockMask.from_dense(keep, **sizes)


def attend_exactly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, *, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition once more, as one dense softmax in fp64."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    position = mask.q_offset + torch.arange(mask.q_len)[:, None]
    keys = torch.arange(mask.kv_len)
    seen = (keys <= position) & (keys > position - (window or mask.kv_len))
    tokens = mask.to_dense().repeat_interleave(mask.block_q, 2).repeat_interleave(mask.block_k, 3)
    seen = seen & tokens[:, :, : mask.q_len, : mask.kv_len].repeat_interleave(
        q.shape[1] // mask.counts.shape[1], 1
    )
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, window: int | None) -> None:
    """Awkward lengths, heads and blocks: at most twice plain PyTorch's own error, and the same empty rows."""
    q, k, v, mask = make_call(shape, dtype)
    exact, exact_lse = attend_exactly(q, k, v, mask, scale=0.2, window=window)
    plain = attend_reference(q, k, v, mask, Softmax(0.2, window))[0].to(dtype)

    out, lse = attend(q, k, v, mask, scale=0.2, window=window, return_lse=True, backend="native")

    assert out.dtype == dtype
    assert float((out - exact).abs().max()) <= allowed_error(plain, exact)
    assert lse is not None
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)


def test_a_row_with_nothing_selected_gives_zeros() -> None:
    """No block, no answer: zeros and an LSE of -inf, never NaN."""
    q, k, v, mask = make_call(SHAPES[3], density=0.0)

    out, lse = attend_native(q, k, v, mask, Softmax(1.0))

    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 200])
def test_nan_is_not_swallowed(rows: int, dtype: torch.dtype) -> None:
    """A NaN in a query, or among the selected keys or values, reaches the answer, where guards can see it."""
    shape = (1, 2, 1, 1, rows, 300 - rows, 32, 64, 64)
    q, k, v, mask = make_call(shape, dtype, density=1.0)
    bad_q, bad_k, bad_v = q.clone(), k.clone(), v.clone()
    bad_q[0, 0, -1, 3] = torch.nan
    bad_k[0, 0, 5, 3] = torch.nan
    bad_v[0, 0, 5, 3] = torch.nan

    assert bool(attend_native(bad_q, k, v, mask, Softmax(0.2))[0][:, 0, -1].isnan().all())
    assert bool(attend_native(q, bad_k, v, mask, Softmax(0.2))[0][:, :, -1].isnan().any())
    assert bool(attend_native(q, k, bad_v, mask, Softmax(0.2))[0][:, :, -1].isnan().any())


def test_extreme_scores_stay_exact() -> None:
    """Scores of thousands neither overflow nor lose the largest one."""
    q, k, v, mask = make_call(SHAPES[4], density=1.0)

    out, _ = attend_native(q * 300, k * 300, v, mask, Softmax(1.0))

    exact, _ = attend_reference(q * 300, k * 300, v, mask, Softmax(1.0))
    plain = attend(q * 300, k * 300, v, mask, scale=1.0, backend="gather")[0]
    assert float((out - exact).abs().max()) <= allowed_error(plain, exact) + 16 * ERROR_FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "scale"), [(33, 0.2), (32, -0.2)])
def test_odd_heads_and_negative_scales(dtype: torch.dtype, dim: int, scale: float) -> None:
    """Half a pair of dimensions counts, and a scale below zero turns the order of the scores around."""
    q, k, v, mask = make_call((1, 4, 2, 2, 200, 57, dim, 64, 64), dtype)

    out, _ = attend_native(q, k, v, mask, Softmax(scale))

    exact, _ = attend_exactly(q, k, v, mask, scale=scale, window=None)
    assert float((out - exact).abs().max()) <= allowed_error(exact.to(dtype), exact)


@pytest.fixture
def without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are scored as they are, as on a processor that multiplies no bytes."""
    monkeypatch.setattr(calls, "has_byte_scores", lambda _rank: False)


def make_scorer(
    block: int, pool: int, form: Form = "residual", query_pool: int = 1, reduce: Reduce = "mean"
) -> BlockScorer:
    """A scorer moved away from its start, so that every term counts."""
    shape = ScorerShape(4, 2, 32, 12, pool, block, form, query_pool, reduce)
    scorer = BlockScorer(shape, 32**-0.5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in (scorer.query_map, scorer.distance_bias, scorer.log_gain):
            weight.normal_(0, 0.5, generator=generator)
    return scorer


def make_table(length: int) -> RotaryTable:
    """Angles of a small rotary embedding."""
    angles = torch.arange(length)[:, None] * (0.1 ** (torch.arange(16) / 16))
    full = torch.cat([angles, angles], dim=-1)
    return RotaryTable(full.cos(), full.sin())


@pytest.mark.usefixtures("without_bytes")
@pytest.mark.parametrize("q_len", [1, 65, 130, 700])
@pytest.mark.parametrize(
    ("block", "pool", "form"),
    [
        (64, 16, "residual"),
        (32, 32, "residual"),
        (96, 48, "residual"),
        (64, 1, "low_rank"),
        (64, 4, "low_rank"),
    ],
)
def test_scores_and_lists_equal_the_plain_path(
    q_len: int, block: int, pool: int, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring and selecting natively gives PyTorch's scores, and a mask that its own lists agree with."""
    generator = torch.Generator().manual_seed(q_len)
    q, k = (2 * torch.randn(2, heads, 700, 32, generator=generator) for heads in (4, 2))
    scorer, table = make_scorer(block, pool, form), make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    options = {"q_len": q_len, "kv_len": 700, "q_offset": 700 - q_len, "block_q": block, "block_k": block}
    with torch.no_grad():
        native, starts = score_blocks(scorer, q[:, :, -q_len:], k, keys, table=table)
        open_shares = native[native > -torch.inf]
        cut = float(open_shares.median()) if open_shares.numel() else 0.0
        thresholds = Thresholds(torch.full((2, 1), cut), ())
        mask = select_blocks(native, thresholds, starts=starts, **options)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q[:, :, -q_len:], k, keys, table=table)
        plain_mask = select_blocks(native, thresholds, starts=starts, **options)

    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(mask.validate().counts, plain_mask.counts)
    assert torch.equal(mask.indices, plain_mask.indices)
    assert mask.density() < 1


@pytest.mark.parametrize("q_len", [1, 16, 100, 333, 700])
@pytest.mark.parametrize("block_q", [16, 32])
def test_short_query_blocks_score_as_the_plain_path_does(
    q_len: int, block_q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query blocks shorter than key blocks: the same scores, and together those of long query blocks."""
    generator = torch.Generator().manual_seed(q_len)
    q, k = (2 * torch.randn(2, heads, 700, 32, generator=generator) for heads in (4, 2))
    q = q[:, :, -q_len:]
    scorer, table = make_scorer(64, 4, "residual"), make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, starts = score_blocks(scorer, q, k, keys, table=table, block_q=block_q)
        whole, _ = score_blocks(scorer, q, k, keys, table=table)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q, k, keys, table=table, block_q=block_q)

    assert starts.tolist() == list(range(700 - q_len, 700, block_q))
    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-5)
    if q_len == 700:  # block borders agree
        parts = torch.nn.functional.pad(
            native, (0, 0, 0, -native.shape[2] % (64 // block_q)), value=-torch.inf
        )
        merged = parts.unflatten(2, (-1, 64 // block_q)).amax(dim=3)
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_bytes")
@pytest.mark.parametrize("q_len", [1, 5, 16, 101, 700])
@pytest.mark.parametrize("query_pool", [2, 4, 16])
def test_pooled_queries_score_as_the_plain_path_does(
    q_len: int, query_pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows scored as one, also where the last block or a decode step has fewer rows than a pool."""
    generator = torch.Generator().manual_seed(q_len)
    q, k = (torch.randn(2, heads, 700, 32, generator=generator) for heads in (4, 2))
    q = q[:, :, -q_len:]
    scorer, table = make_scorer(64, 1, "low_rank", query_pool), make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)

    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("without_bytes")
@pytest.mark.parametrize(("q_len", "block_q"), [(1, 16), (5, 16), (25, 16), (101, 64), (700, 16), (700, 24)])
@pytest.mark.parametrize("query_pool", [2, 4])
def test_the_rows_that_differ_are_chosen_as_the_plain_path_does(
    q_len: int, block_q: int, query_pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row in so many is scored for all, also in runs that are shorter than others."""
    generator = torch.Generator().manual_seed(q_len)
    q, k = (torch.randn(2, heads, 700, 32, generator=generator) for heads in (4, 2))
    q = q[:, :, -q_len:]
    scorer, table = make_scorer(64, 1, "low_rank", query_pool, "k_center"), make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=block_q)
        single, _ = score_blocks(scorer.with_query_pool(1), q, k, keys, table=table, block_q=block_q)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q, k, keys, table=table, block_q=block_q)

    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-4)
    is_open = single > -torch.inf
    assert (native[is_open] <= single[is_open] + 1e-4).all()  # the neediest of some rows, not of all
    assert torch.equal(native > -torch.inf, is_open)
    num_shared = float(torch.isclose(native, single, atol=1e-4)[is_open].float().mean())
    assert num_shared == 1.0 if q_len <= 16 // query_pool else num_shared > 1 / query_pool


@pytest.mark.usefixtures("without_bytes")
@pytest.mark.parametrize("dim", [24, 40, 64, 96])
def test_the_same_rows_of_bf16_are_chosen_whatever_the_heads_size(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are laid out sixteen at a time where a head's size allows it, one by one behind that."""
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(1, heads, 411, dim, generator=generator).bfloat16() for heads in (4, 2))
    angles = torch.arange(411)[:, None] * (0.1 ** (torch.arange(dim // 2) / (dim // 2)))
    full = torch.cat([angles, angles], dim=-1)
    table = RotaryTable(full.cos(), full.sin())
    scorer = BlockScorer(ScorerShape(4, 2, dim, 16, 1, 64, "low_rank", 4, "k_center"), dim**-0.5)
    scorer.start_from(q[0].float(), k[0].float())
    keys = PooledCache(scorer).update(k, 411, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)

    is_open = plain > -torch.inf
    assert torch.equal(native > -torch.inf, is_open)
    # Another choice of rows would be off by some nats.
    torch.testing.assert_close(native[is_open], plain[is_open], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_chosen_rows_are_the_same_however_many_blocks_are_scored_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fills up the last query block of several is no row, and asks for nothing."""
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, heads, 899, 32, generator=generator) for heads in (4, 2))
    scorer, table = make_scorer(16, 1, "low_rank", 4, "k_center"), make_table(899)
    monkeypatch.setattr(calls, "has_byte_scores", lambda _rank: False)
    monkeypatch.setattr(selection, "MAX_SCORES_PER_CHUNK", at_once)
    keys = PooledCache(scorer).update(k, 899, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q[:, :, -300:], k, keys, table=table, block_q=64)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q[:, :, -300:], k, keys, table=table, block_q=64)

    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("pool", "reduce"), [(4, "mean"), (2, "k_center"), (4, "k_center"), (8, "k_center")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_is_an_error_whoever_stands_for_it(
    bad: float, pool: int, reduce: Reduce
) -> None:
    """A row is not passed over for others because nobody can tell how far it is from them."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, heads, 300, 32, generator=generator) for heads in (4, 2))
    scorer, table = make_scorer(64, 1, "low_rank", pool, reduce), make_table(300)
    for row in (160, 167, 299):
        broken = q.clone()
        broken[0, 1, row, 3] = bad
        keys = PooledCache(scorer).update(k, 300, table)
        with torch.no_grad(), pytest.raises(ScorerError, match="the scorer gave NaN"):
            score_blocks(scorer, broken, k, keys, table=table, block_q=16)


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
@pytest.mark.parametrize(
    ("rank", "query_pool", "reduce"),
    [(12, 1, "mean"), (32, 4, "mean"), (30, 2, "mean"), (32, 2, "k_center"), (16, 4, "k_center")],
)
@pytest.mark.parametrize(
    ("q_len", "dtype"), [(1, torch.float32), (101, torch.bfloat16), (700, torch.float32)]
)
def test_byte_scores_are_near_the_plain_ones(
    rank: int,
    query_pool: int,
    reduce: Reduce,
    q_len: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features of 8 bits, an exponential in steps: what a share loses is a hundredth of its spread."""
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(2, heads, 700, 32, generator=generator).to(dtype) for heads in (4, 2))
    q, table = q[:, :, -q_len:], make_table(700)
    scorer = BlockScorer(ScorerShape(4, 2, 32, rank, 1, 64, "low_rank", query_pool, reduce), 32**-0.5)
    scorer.start_from(q[0].float(), k[0].float())
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        floats = PooledCache(scorer).update(k, 700, table)
        plain, _ = score_blocks(scorer, q, k, floats, table=table, block_q=16)

    assert isinstance(keys, calls.BytePanels)
    assert isinstance(floats, torch.Tensor)
    chosen = plain > -torch.inf
    assert torch.equal(chosen, native > -torch.inf)
    error = (native - plain)[chosen]
    assert float(error.square().mean().sqrt()) <= BYTE_SCORE_RMS
    assert float(error.abs().max()) <= 10 * BYTE_SCORE_RMS


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
def test_byte_scores_of_large_logits_are_finite_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that may overflow are cut at 2^95 times the forced blocks: there a share is full."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, heads, 700, 32, generator=generator) for heads in (4, 2))
    scorer = BlockScorer(ScorerShape(4, 2, 32, 32, 1, 64, "low_rank"), 32**-0.5)
    scorer.start_from(q[0], k[0])
    q, table = q * 12, make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        floats = PooledCache(scorer).update(k, 700, table)
        plain, _ = score_blocks(scorer, q, k, floats, table=table, block_q=16)

    assert isinstance(keys, calls.BytePanels)
    assert isinstance(floats, torch.Tensor)
    chosen = plain > -torch.inf
    assert torch.equal(chosen, native > -torch.inf)
    assert float(native[chosen].max()) <= 0.1
    is_large = chosen & (plain > -20)
    assert float((native - plain)[is_large].abs().mean()) <= 0.3


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-6, 1e5, 1e12, 1e25])
def test_a_byte_has_a_step_at_every_size_of_a_query(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small queries ask all blocks alike, as in floats; ones beyond all measure still find their block."""
    generator = torch.Generator().manual_seed(11)
    q, k = (torch.randn(1, heads, 700, 32, generator=generator) for heads in (4, 2))
    scorer = BlockScorer(ScorerShape(4, 2, 32, 32, 1, 64, "low_rank"), 32**-0.5)
    scorer.start_from(q[0], k[0])
    q, table = q * size, make_table(700)
    keys = PooledCache(scorer).update(k, 700, table)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, keys, table=table, block_q=16)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(
            scorer, q, k, PooledCache(scorer).update(k, 700, table), table=table, block_q=16
        )

    chosen = plain > -torch.inf
    assert not native[chosen].isnan().any()
    assert float(native[chosen].max()) <= 0.1
    if size <= 1e-6:
        torch.testing.assert_close(native[chosen], plain[chosen], rtol=0, atol=0.02)
    else:  # bytes of a query are too coarse here to say which of two logits is larger, if they are near
        assert float((native > -1.0)[plain > -1.0].float().mean()) >= 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 12), (23, 32), (100, 30)])
def test_features_of_keys_equal_the_plain_ones(dtype: torch.dtype, tokens: int, rank: int) -> None:
    """Runs of tokens of any length, ranks that fill no panel, sequences that lie apart."""
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(2, 2, 130, 32, generator=generator).to(dtype)[:, :, 7 : 7 + tokens]
    scorer = BlockScorer(ScorerShape(4, 2, 32, rank, 1, 64, "low_rank"), 32**-0.5)
    table = make_table(130)
    cos, sin = (part[7 : 7 + tokens].contiguous() for part in (table.cos, table.sin))

    native = calls.encode_native(k, cos, sin, scorer.key_map.detach())

    plain = unrotate(k.float(), torch.arange(7, 7 + tokens), table)
    exact = torch.cat([k.double(), plain.double()], dim=-1) @ scorer.key_map.detach().double()
    assert native.dtype == dtype
    torch.testing.assert_close(
        native.double(), exact, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5
    )


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_that_grow_score_as_panels_packed_anew_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces and steps across block borders, after a crop and a reordering: the same bits, packed once."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, heads, 2400, 32, generator=generator).to(dtype) for heads in (4, 2))
    scorer, table = BlockScorer(ScorerShape(4, 2, 32, 12, 1, 64, "low_rank"), 32**-0.5), make_table(2400)
    scorer.start_from(q[0].float(), k[0].float())
    cache, packed = PooledCache(scorer), list[int]()
    pack = calls.pack_bytes_native

    def counted(pooled: torch.Tensor, *others: Any) -> calls.BytePanels:
        packed.append(pooled.shape[2] // 64)
        return pack(pooled, *others)

    def step(q: torch.Tensor, k: torch.Tensor, num_new: int) -> None:
        grown = score_blocks(scorer, q, k, cache.update(k, num_new, table), table=table, block_q=16)[0]
        before = len(packed)
        keys = PooledCache(scorer).update(k, k.shape[2], table)
        anew = score_blocks(scorer, q, k, keys, table=table, block_q=16)[0]
        del packed[before:]
        assert torch.equal(grown, anew)

    monkeypatch.setattr(calls, "pack_bytes_native", counted)
    with torch.no_grad():
        step(q[:, :, :250], k[:, :, :250], 250)
        for end in range(251, 325):  # blocks close at 256 and 320
            step(q[:, :, end - 1 : end], k[:, :, :end], 1)
        for begin, end in ((324, 1200), (1200, 2400)):  # more panels than there was room for
            step(q[:, :, begin:end], k[:, :, :end], end - begin)
        assert sum(packed) == 2400 // 64
        for end, order in ((300, [0, 1]), (301, [1, 0])):
            step(q[order, :, end - 1 : end], k[order, :, :end], 1)

    assert sum(packed) == 2400 // 64 + 4 + 4


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
@pytest.mark.parametrize("end", [320, 450])
def test_a_rows_shares_do_not_depend_on_what_comes_behind(end: int) -> None:
    """Bytes of a key are its own: a piece of a prompt scores as the whole does, to the bit."""
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, heads, 700, 32, generator=generator) for heads in (4, 2))
    k[:, :, end:] *= 7
    scorer, table = make_scorer(64, 1, "low_rank"), make_table(700)

    with torch.no_grad():
        whole, _ = score_blocks(
            scorer, q, k, PooledCache(scorer).update(k, 700, table), table=table, block_q=16
        )
        q, k = q[:, :, :end], k[:, :, :end]
        piece, _ = score_blocks(
            scorer, q, k, PooledCache(scorer).update(k, end, table), table=table, block_q=16
        )

    full = end // 16
    assert torch.equal(piece[:, :, :full], whole[:, :, :full, : piece.shape[3]])


@pytest.mark.skipif(not calls.has_byte_scores(32), reason="this processor multiplies no bytes")
@pytest.mark.parametrize("where", ["query", "key", "bias"])
def test_bytes_do_not_hide_what_is_no_number(where: str) -> None:
    """NaN has no byte: it must come out as an error, never as a share."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 700, 32, generator=generator) for heads in (4, 2))
    scorer, table = make_scorer(64, 1, "low_rank", 4), make_table(700)
    if where == "bias":
        scorer.distance_bias.data[1, 2] = torch.nan
    else:
        (q if where == "query" else k)[0, 0, 300, 3] = torch.nan
    keys = PooledCache(scorer).update(k, 700, table)

    with torch.no_grad(), pytest.raises(ScorerError, match="the scorer gave NaN"):
        score_blocks(scorer, q, k, keys, table=table, block_q=16)


@pytest.mark.usefixtures("without_bytes")
@pytest.mark.parametrize(("pool", "form"), [(16, "residual"), (4, "residual"), (1, "low_rank")])
def test_scores_of_bf16_are_as_close_as_plain_ones(
    pool: int, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys in bf16 score no further from fp32, on average, than PyTorch's own bf16 path does."""
    generator = torch.Generator().manual_seed(pool)
    q, k = (torch.randn(8, heads, 700, 32, generator=generator).bfloat16() for heads in (4, 2))
    scorer, table = make_scorer(64, pool, form), make_table(700)
    with torch.no_grad():
        native, _ = score_blocks(scorer, q, k, PooledCache(scorer).update(k, 700, table), table=table)
        monkeypatch.setattr(registry, "_broken", {"native": "off for this test"})
        plain, _ = score_blocks(scorer, q, k, PooledCache(scorer).update(k, 700, table), table=table)
        q, k = q.float(), k.float()
        exact, _ = score_blocks(scorer, q, k, PooledCache(scorer).update(k, 700, table), table=table)

    chosen = exact > -torch.inf
    assert torch.equal(chosen, native > -torch.inf)
    own, theirs = ((shares - exact)[chosen].square().mean().sqrt() for shares in (native, plain))
    assert 0 < own <= theirs


def test_a_wide_list_costs_no_more_than_its_counts() -> None:
    """Padding past the counts is never read, whatever stands there."""
    q, k, v, mask = make_call(SHAPES[4])
    padding = torch.full((*mask.counts.shape, 3), -1, dtype=torch.int32)
    wide = replace(mask, indices=torch.cat([mask.indices, padding], dim=-1))

    how = Softmax(0.2)
    assert torch.equal(attend_native(q, k, v, wide, how)[0], attend_native(q, k, v, mask, how)[0])


def test_a_struct_is_laid_out_as_the_program_declares_it() -> None:
    """Values land in the order of the C++ declaration, whatever order they are named in."""
    fields = struct_fields("Scores")
    by_name = {field: place for place, field in enumerate(fields)}

    laid_out = fill_struct("Scores", **dict(reversed(by_name.items())))

    assert fields[:5] == ("H", "Hkv", "n", "rows", "row_tokens")
    assert list(laid_out) == list(range(len(fields)))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"q_offset": None}, r"missing \['q_offset'\]"), ({"offset": 1}, r"unknown \['offset'\]")],
)
def test_a_struct_with_a_wrong_field_is_refused(change: dict[str, int | None], words: str) -> None:
    """A field that is missing or misspelt is an error that names it, never a zero or a shift."""
    values = {**dict.fromkeys(struct_fields("Prefill"), 1), **change}

    with pytest.raises(BackendError, match=words):
        fill_struct("Prefill", **{field: value for field, value in values.items() if value is not None})


def test_a_struct_that_is_not_there_is_refused() -> None:
    """A struct the program does not declare, or not as int64_t alone, cannot be filled."""
    with pytest.raises(BackendError, match="declares no struct Scratch of int64_t alone"):
        fill_struct("Scratch", rows=1)
