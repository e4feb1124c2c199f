"""The scorer's kernels against fp64: shares of prompts and steps, what a step reads, both as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.tolerances import ERROR_FLOOR, ERROR_RATIO_MAX
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import Thresholds, score_blocks

from .plan import Line, SkipRowError, WrongAnswerError
from .scoring import make_step
from .tensors import (
    FORMS,
    draw,
    draw_prompt,
    make_scoring,
    paged_cache,
    poisoned,
    rotary_table,
    with_random_weights,
)
from .truth import compare
from .truth_scores import exact_shares
from .worker import Bench


def scores(bench: Bench, case: str) -> Iterator[Line]:
    """Shares lie within twice the error of the same score in torch operations; closed blocks are -inf."""
    sizes = bench.sizes
    heads, block, rows, past, block_q = (sizes.heads, sizes.kv_heads), sizes.block, sizes.answer_tokens, 0, 0
    form, dtype = dict(FORMS["rank 32, 4 as one"]), torch.bfloat16
    if case == "single_queries":
        heads, form = (6, 2), {**FORMS["rank 32"], "rank": 48}
    elif case == "means":
        form = dict(FORMS["means of 4"])
    elif case == "chunk":
        rows, past, block_q = rows // 3, rows // 2, 16
    elif case == "last_row":
        rows, past = 1, rows
    elif case == "fp32":
        heads, dtype, rows = (3, 1), torch.float32, rows * 2 // 3
    scorer = _scorer(bench, heads, block, form)
    table = rotary_table(bench, rows + past)
    q = draw(bench, 2, heads[0], rows, sizes.head_dim, dtype=dtype)
    k = draw(bench, 2, heads[1], rows + past, sizes.head_dim, dtype=dtype)
    exact = exact_shares(scorer, q, k, table, block_q or block)

    def find(backend: str) -> Tensor:
        pools = PooledCache(scorer, backend).update(k, k.shape[2], table)
        options: dict[str, Any] = {"table": table, "block_q": block_q or None, "backend": backend}
        return score_blocks(scorer, q, k, pools, **options)[0]

    with torch.no_grad(), poisoned(bench.device):
        found = find("triton")
    with torch.no_grad():
        own = find("torch")
    size = max(1.0, float(exact[exact.isfinite()].abs().max()))
    yield compare("shares", found, own, exact, ERROR_FLOOR[torch.float32] * size)


def step(bench: Bench, case: str) -> Iterator[Line]:
    """Ragged pages: a group reads what a head wants by fp64 shares, but for blocks within the error."""
    sizes, longest = bench.sizes, bench.sizes.answer_tokens
    form = FORMS["rank 32" if case == "tokens" else "means of 4"]
    heads, dim, block = (sizes.heads, sizes.kv_heads), sizes.head_dim, sizes.block
    scorer, table = _scorer(bench, heads, block, form), rotary_table(bench, longest + block)
    ends = [longest, block + 1, longest // 2, 0, 1]
    lengths = torch.tensor(ends, dtype=torch.int32, device=bench.device)
    q = draw(bench, len(ends), heads[0], dim)
    keys, values = (draw(bench, len(ends), heads[1], longest, dim) for _ in range(2))
    cache = paged_cache(bench, keys, values, lengths, block)
    with poisoned(bench.device):
        pages = ScorerPages(scorer, table, cache.keys.shape[0], dtype=q.dtype, backend="triton")
        pages.update(cache.keys, [Span(cache.page_table[i], 0, end) for i, end in enumerate(ends) if end > 0])
        pages.update_step(cache.keys, cache.page_table, lengths)
    exact = [
        exact_shares(scorer, q[i, None, :, None], keys[i, None, :, :end], table, block)[0, :, 0]
        for i, end in enumerate(ends)
        if end > 0
    ]
    cut = float(exact[0][exact[0].isfinite()].median())
    margin = _torchs_error(scorer, q, keys, exact, ends, table) * ERROR_RATIO_MAX
    out = torch.full_like(q, torch.nan)
    with poisoned(bench.device):
        kept = pages.decode(
            q, cache, Thresholds(torch.full((heads[1], 1), cut, device=bench.device), ()), out
        )
    counts = kept.unflatten(1, (heads[1], -1))
    for shares, i in zip(exact, (i for i, end in enumerate(ends) if end > 0), strict=True):
        forced = 2 if ends[i] > block else 1
        by_group = shares.unflatten(0, (heads[1], -1))
        least = (by_group > cut + margin).any(1).sum(-1) + forced
        most = (by_group > cut - margin).any(1).sum(-1) + forced
        if bool(((counts[i] < least[:, None]) | (counts[i] > most[:, None])).any()):
            raise WrongAnswerError(
                f"sequence {i}: {counts[i].tolist()} blocks, {least} to {most} were wanted"
            )
    is_filled = lengths > 0
    if (
        not bool(out[is_filled].isfinite().all())
        or bool(out[~is_filled].any())
        or bool(kept[~is_filled].any())
    ):
        raise WrongAnswerError("outputs must be finite, and zero with nothing read in an empty slot")
    yield Line("lists", note=f"{int(kept[0].sum())} blocks in the first sequence; margin {margin:.1e}")


def _torchs_error(
    scorer: BlockScorer, q: Tensor, keys: Tensor, exact: list[Tensor], ends: list[int], table: Any
) -> float:
    """How far the torch path's shares in q's dtype are from fp64, over the longest sequence."""
    k = keys[0, None, :, : ends[0]]
    with torch.no_grad():
        pools = PooledCache(scorer, "torch").update(k, k.shape[2], table)
        own = score_blocks(scorer, q[0, None, :, None], k, pools, table=table, backend="torch")[0][0, :, 0]
    finite = exact[0].isfinite()
    return float((own.double() - exact[0])[finite].abs().max())


def _scorer(bench: Bench, heads: tuple[int, int], block: int, form: dict[str, Any]) -> BlockScorer:
    shape = ScorerShape(*heads, bench.sizes.head_dim, block_tokens=block, **form)
    return with_random_weights(bench, BlockScorer(shape, bench.sizes.head_dim**-0.5))


def graph(bench: Bench, case: str) -> Iterator[Line]:
    """A replay gives the bits of a plain call: nothing between scoring and attention waits for the host."""
    call, inputs = (_step if case == "scored_step" else _prompt)(bench)
    call()
    if not bench.is_cuda:
        raise SkipRowError("CUDA graphs need a card; the calls themselves ran")
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        captured = call()
    for tensor in inputs:
        tensor.normal_(generator=bench.generator)
    recorded.replay()
    replayed = captured.clone()
    plain = call()
    if not torch.equal(replayed, plain):
        gap = float((replayed.float() - plain.float()).abs().max())
        raise WrongAnswerError(f"a replayed graph differs from a plain call by {gap:.2e}")
    yield Line(case, note="a replay on new numbers gives the bits of a plain call")


def _step(bench: Bench) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    step = make_step(bench)
    return step, (step.q,)


def _prompt(bench: Bench) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    q, k, v = draw_prompt(bench, bench.sizes.answer_tokens)
    scoring = make_scoring(bench, q, k, 0.3)

    def call() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v, scoring(q, k), backend="triton")[0]

    return call, (q, k, v)
