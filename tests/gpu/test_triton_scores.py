"""Triton's scores answer to fp64 and to the torch path, on a GPU or in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.tolerances import ERROR_FLOOR, allowed_error
from sentei.kernels.ops.triton.select import select_step_triton
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.launches import encode_pools
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, score_blocks
from tests.gpu.check.truth_scores import exact_shares
from tests.strategies_attention import make_paged, make_qkv

pytestmark = pytest.mark.gpu
LOW: dict[str, Any] = {"form": "low_rank", "pool_tokens": 1}
DIFFER = {"query_reduce": "k_center"}

# (query heads, KV heads, head size), the scorer's options, rows and what lies before them, query block
CASES: list[tuple[tuple[int, int, int], dict[str, Any], int, int, int]] = [
    ((4, 1, 16), {**LOW, "rank": 16, "query_pool": 4, "block_tokens": 16}, 70, 0, 16),
    ((3, 1, 16), {**LOW, "rank": 32, "query_pool": 2, "block_tokens": 32}, 77, 41, 32),
    ((6, 2, 12), {**LOW, "rank": 64, "query_pool": 1, "block_tokens": 16}, 39, 30, 16),
    ((2, 2, 16), {**LOW, "rank": 48, "query_pool": 4, "block_tokens": 16}, 7, 50, 64),
    ((4, 2, 12), {"rank": 24, "pool_tokens": 4, "block_tokens": 16}, 65, 20, 16),
    ((3, 1, 16), {**LOW, **DIFFER, "rank": 32, "query_pool": 2, "block_tokens": 32}, 77, 41, 32),
    ((4, 2, 16), {**LOW, **DIFFER, "rank": 16, "query_pool": 4, "block_tokens": 16}, 70, 0, 16),
    ((4, 2, 16), {**LOW, **DIFFER, "rank": 16, "query_pool": 4, "block_tokens": 16}, 9, 40, 16),
    ((3, 1, 32), {"rank": 8, "pool_tokens": 16, "block_tokens": 48}, 20, 150, 32),
    ((4, 2, 16), {**LOW, "rank": 16, "query_pool": 4, "block_tokens": 16}, 1, 100, 16),
    ((4, 1, 16), {"rank": 8, "pool_tokens": 4, "block_tokens": 16}, 1, 66, 16),
]


def make_scorer(heads: tuple[int, int, int], options: dict[str, Any], device: str = "cpu") -> BlockScorer:
    """A scorer with weights that were not learned, but none of them zero."""
    scorer = BlockScorer(ScorerShape(*heads, **options), heads[2] ** -0.5, seed=3)
    generator = torch.Generator().manual_seed(4)
    for weight in (scorer.query_map, scorer.distance_bias, scorer.log_gain):
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return scorer.requires_grad_(False).to(device)


def make_table(dim: int, length: int, device: str = "cpu") -> RotaryTable:
    """A scaled embedding, as YaRN's: unrotating has to take the scale out."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], dim=-1)
    return RotaryTable((1.2 * angles.cos()).to(device), (1.2 * angles.sin()).to(device))


def score(
    scorer: BlockScorer, q: torch.Tensor, k: torch.Tensor, table: RotaryTable, block_q: int, backend: str
) -> torch.Tensor:
    """From queries and keys to shares, all of it by one backend."""
    keys = PooledCache(scorer, backend).update(k, k.shape[2], table)
    return score_blocks(scorer, q, k, keys, table=table, block_q=block_q, backend=backend)[0]


@pytest.mark.parametrize(("heads", "options", "q_len", "past", "block_q"), CASES)
def test_shares_are_as_near_to_fp64_as_torchs(
    heads: tuple[int, int, int], options: dict[str, Any], q_len: int, past: int, block_q: int, device: str
) -> None:
    """Ranks, forms, groups of 3 and 4, pools of queries, ragged ends, one row: closed blocks are -inf."""
    scorer, table = make_scorer(heads, options, device), make_table(heads[2], q_len + past, device)
    q, k, _ = make_qkv(q_len, past, heads=heads[:2], dim=heads[2], device=device)

    found = score(scorer, q, k, table, block_q, "triton")

    exact = exact_shares(scorer, q, k, table, block_q)
    is_open = exact > -torch.inf
    assert bool(is_open.any())
    assert torch.equal(found == -torch.inf, ~is_open)
    assert float((found - exact)[is_open].abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [0, 4])
def test_low_precision_error_is_at_most_twice_torchs_own(case: int, dtype: torch.dtype, device: str) -> None:
    """Half-width inputs may lose at most twice what the same score in torch operations loses."""
    heads, options, q_len, past, block_q = CASES[case]
    scorer, table = make_scorer(heads, options, device), make_table(heads[2], q_len + past, device)
    q, k, _ = make_qkv(q_len, past, heads=heads[:2], dim=heads[2], batch=2, device=device, dtype=dtype)

    found = score(scorer, q, k, table, block_q, "triton")

    exact = exact_shares(scorer, q, k, table, block_q)
    plain = score(scorer, q, k, table, block_q, "torch")
    is_open = exact > -torch.inf
    bound = allowed_error(plain[is_open], exact[is_open].float())
    assert float((found - exact)[is_open].abs().max()) <= bound


def test_nan_stays_in_its_query_block(device: str) -> None:
    """A NaN query spoils its query block of its head, and no other; nobody waits to look: no error."""
    heads, options, q_len, _, block_q = CASES[0]
    scorer, table = make_scorer(heads, options, device), make_table(heads[2], q_len, device)
    q, k, _ = make_qkv(q_len, heads=heads[:2], dim=heads[2], device=device)
    whole = score(scorer, q, k, table, block_q, "triton")
    q[0, 2, 50] = torch.nan

    found = score(scorer, q, k, table, block_q, "triton")

    is_hit = torch.zeros_like(found, dtype=torch.bool)
    is_hit[0, 2, 3, 1:3] = True
    assert torch.equal(found.isnan(), is_hit)
    assert torch.equal(found[~is_hit], whole[~is_hit])


def test_rows_and_keys_of_any_stride(device: str) -> None:
    """Queries and keys as a model leaves them, heads behind tokens, give the same bits."""
    heads, options, q_len, _, block_q = CASES[0]
    scorer, table = make_scorer(heads, options, device), make_table(heads[2], q_len, device)
    q, k, _ = make_qkv(q_len, heads=heads[:2], dim=heads[2], device=device)
    turned_q, turned_k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))

    found = score(scorer, turned_q, turned_k, table, block_q, "triton")

    assert torch.equal(found, score(scorer, q, k, table, block_q, "triton"))


LENGTHS = (1, 16, 50, 0, 97)
STEPS: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
    ((3, 1, 16), {**LOW, "rank": 8, "block_tokens": 16}),
    ((4, 2, 16), {"rank": 8, "pool_tokens": 4, "block_tokens": 16}),
]


def make_pages(
    heads: tuple[int, int, int], options: dict[str, Any], device: str
) -> tuple[torch.Tensor, PagedCache, ScorerPages]:
    """Queries, pages dealt out of order and their features; what lies past an end is NaN."""
    q, cache = make_paged(LENGTHS, 1, page=16, heads=heads[:2], dim=heads[2], device=device, fill=torch.nan)
    pages = ScorerPages(
        make_scorer(heads, options, device),
        make_table(heads[2], 112, device),
        cache.keys.shape[0],
        backend="triton",
    )
    pages.update(cache.keys, [Span(cache.page_table[i], 0, end) for i, end in enumerate(LENGTHS) if end])
    return 3 * q[:, :, 0], cache, pages


@pytest.mark.parametrize(("heads", "options"), STEPS)
def test_a_step_reads_what_any_head_of_a_group_wants(
    heads: tuple[int, int, int], options: dict[str, Any], device: str
) -> None:
    """Ragged lengths and an empty slot: lists and output are those of fp64 shares, sequence by sequence."""
    q, cache, pages = make_pages(heads, options, device)
    limits = Thresholds(torch.full((heads[1], 2), math.log(0.3), device=device), (40,))
    out = torch.full_like(q, torch.nan)

    kept = pages.decode(q, cache, limits, out)

    wanted = _lists_from_fp64(pages, q, cache, math.log(0.3))
    expected, _ = attend_paged(q[:, :, None], cache, wanted, scale=pages.scorer.scale, backend="reference")
    group = heads[0] // heads[1]
    assert torch.equal(kept, wanted.counts.repeat_interleave(group, 1))
    assert 2 < float(kept[4].float().mean()) < 6
    assert float((out - expected[:, :, 0]).abs().max()) <= ERROR_FLOOR[torch.float32]


def _lists_from_fp64(pages: ScorerPages, q: torch.Tensor, cache: PagedCache, cut: float) -> BlockLists:
    """Sink, own block and what passes the cut for a head of the group, in order."""
    block, kv_heads = pages.block, cache.keys.shape[1]
    keep = torch.zeros(len(LENGTHS), kv_heads, cache.page_table.shape[1], dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        if length == 0:
            continue
        shares = exact_shares(pages.scorer, q[i, None, :, None], cache.read(i)[0], pages.rotary, block)
        wanted = (shares[0, :, 0] > cut).unflatten(0, (kv_heads, -1)).any(1).cpu()
        keep[i, :, : wanted.shape[1]] = wanted
        keep[i, :, 0] = keep[i, :, (length - 1) // block] = True
    counts = keep.sum(-1, dtype=torch.int32)
    order = torch.argsort(keep.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    indices = order.masked_fill(torch.arange(keep.shape[-1]) >= counts[..., None], -1)
    device = cache.keys.device
    return BlockLists(counts.to(device), indices.to(device), block)


def test_a_broken_sequence_says_so_and_leaves_the_others_alone(device: str) -> None:
    """NaN queries give -1 blocks and an output of NaN for their group, and nothing else."""
    q, cache, pages = make_pages(*STEPS[1], device)
    q[2, 3] = torch.nan
    out = torch.zeros_like(q)

    kept = pages.decode(q, cache, Thresholds(torch.full((2, 1), -3.0, device=device), ()), out)

    is_hit = torch.zeros_like(kept, dtype=torch.bool)
    is_hit[2, 2:] = True
    assert torch.equal(kept < 0, is_hit)
    assert torch.equal(out.isnan().all(-1), is_hit)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", [0, 1])
def test_step_by_step_the_features_are_those_of_the_whole(case: int, backend: str, device: str) -> None:
    """Each token's update leaves the full pools as one update of all; an empty slot changes no page."""
    heads, options = STEPS[case]
    _, cache, whole = make_pages(heads, options, device)
    pages = ScorerPages(whole.scorer, whole.rotary, cache.keys.shape[0], backend=backend)
    keys = cache.keys.nan_to_num()
    steps = range(1, max(LENGTHS) + 1) if backend == "torch" else (4, 8, 16, 32, 48, 50)

    for step in steps:
        pages.update_step(keys, cache.page_table, cache.lengths.clamp(max=step))

    size = whole.scorer.shape.pool_tokens
    for i, length in enumerate(LENGTHS):
        for pool in range(min(length, 50) // size):
            if backend == "triton" and (pool + 1) * size not in steps:
                continue
            page, place = int(cache.page_table[i, pool * size // 16]), pool % (16 // size)
            got, want = pages.pooled[page, :, place], whole.pooled[page, :, place]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_bounded_step_keeps_the_strongest(device: str) -> None:
    """Of a list with room for four, sink and own block stay, and of the rest what is most over its limit."""
    logits = torch.tensor([[[0.0, 1.0, 3.0, 2.0, 2.5, 9.0], [0.0, 4.0, 0.0, 0.0, 0.0, 9.0]]], device=device)
    forced, limits = torch.zeros(1, 2, device=device), torch.tensor([[-9.0, -9.0]], device=device)
    lengths = torch.tensor([6 * 16], dtype=torch.int32, device=device)

    counts, indices, is_odd = select_step_triton(
        logits, forced, limits, lengths, lists=1, block_k=16, width=4
    )

    assert counts.tolist() == [[4]]
    assert indices.tolist() == [[[0, 1, 2, 5]]]
    assert is_odd.tolist() == [[0]]


def test_features_of_pools_do_not_depend_on_where_a_piece_was_cut(device: str) -> None:
    """Keys encoded in two pieces are those that are encoded at once."""
    heads, options = STEPS[1]
    scorer, table = make_scorer(heads, options, device), make_table(heads[2], 60, device)
    k = make_qkv(60, heads=heads[:2], dim=heads[2], device=device)[1]

    parts = [encode_pools(scorer, k[:, :, :24], 0, table), encode_pools(scorer, k[:, :, 24:], 24, table)]

    whole = encode_pools(scorer, k, 0, table)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-6)
