"""Times of scoring: each form of scorer beside dense attention, its parts, and decode steps that choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.selection import Thresholds

from .plan import Line
from .tensors import draw, draw_prompt, make_scorer, make_scoring, paged_cache, rotary_table
from .timing import Work, extra_mib, replayed, sdpa_work, take_turns
from .worker import Bench

DENSITY = 0.1


def score(bench: Bench, tokens: int) -> Iterator[Line]:
    """From queries and keys to lists, by each form, as a share of dense; of the first form also its parts."""
    q, k, v = draw_prompt(bench, tokens)
    scorings = {form: make_scoring(bench, q, k, DENSITY, form) for form in bench.sizes.forms}
    first = scorings[bench.sizes.forms[0]]
    pools, (shares, starts) = first.pools(k), first.shares(q, k)
    works: dict[str, Work] = {f"{form}: all": _all(scoring, q, k) for form, scoring in scorings.items()}
    works["first form: keys to features"] = lambda: first.pools(k)
    works["first form: queries to shares"] = lambda: first.shares(q, k, pools)
    works["first form: shares to lists"] = lambda: first.choose(shares, starts)
    key = f"sdpa {tokens}"
    if key in bench.facts:
        works["dense"] = sdpa_work(q, k, v, str(bench.facts[key]))
    times = take_turns(bench, works)
    base = times.median("dense") if "dense" in times.spent else None
    for name in works:
        line = times.line(name)
        if name == "dense" or line.ms is None:
            yield line
            continue
        kept = f"{line.ms / base:.2%} of dense" if base else "no dense time to compare with"
        mib = extra_mib(bench, works[name]) if name.endswith("all") else None
        yield replace(line, note=kept, extra_mib=mib)


def _all(scoring: Callable[[Tensor, Tensor], object], q: Tensor, k: Tensor) -> Work:
    return lambda: scoring(q, k)


def scored_step(bench: Bench, q: Tensor, cache: PagedCache, density: float, base: float, form: str) -> Line:
    """One new token per sequence: its features, scores, lists and attention, as one CUDA graph."""
    step = _step(bench, q[:, :, 0], cache, density, form)
    kept = float(step.choose().float().mean()) / cache.page_table.shape[1]
    times = take_turns(bench, {form: replayed(bench, step)})
    line = times.line(form)
    return times.line(
        form,
        against="dense",
        ratio=base / line.ms if line.ms else None,
        note=line.note or f"with scorer, lists per KV group; density {kept:.3f}",
    )


@dataclass(frozen=True, eq=False)
class Step:
    """A decode step over pages: the newest token's features, then `ScorerPages.decode` from q [N, Hq, D]."""

    q: Tensor
    cache: PagedCache
    pages: ScorerPages
    thresholds: Thresholds
    out: Tensor

    def choose(self) -> Tensor:
        """Fill `out`; return how many blocks each head read."""
        self.pages.update_step(self.cache.keys, self.cache.page_table, self.cache.lengths)
        return self.pages.decode(self.q, self.cache, self.thresholds, self.out)

    def __call__(self) -> Tensor:
        """Return what it attends to, of each head."""
        self.choose()
        return self.out


def make_step(bench: Bench) -> Step:
    """A decode step of the first form over pages of its own."""
    sizes = bench.sizes
    keys, values = (
        draw(bench, sizes.batch, sizes.kv_heads, sizes.answer_tokens, sizes.head_dim) for _ in range(2)
    )
    q = draw(bench, sizes.batch, sizes.heads, sizes.head_dim)
    lengths = torch.full((sizes.batch,), sizes.answer_tokens, dtype=torch.int32, device=bench.device)
    cache = paged_cache(bench, keys, values, lengths, sizes.block, fill=0.0)
    return _step(bench, q, cache, DENSITY, sizes.forms[0])


def _step(bench: Bench, q: Tensor, cache: PagedCache, density: float, form: str) -> Step:
    sizes, width = bench.sizes, cache.page_table.shape[1]
    pages = ScorerPages(
        make_scorer(bench, form),
        rotary_table(bench, (width + 1) * sizes.block),
        cache.keys.shape[0],
        dtype=cache.keys.dtype,
        backend="triton",
    )
    tokens = int(cache.lengths.max())
    pages.update(cache.keys, [Span(row, 0, tokens) for row in cache.page_table])
    thresholds = _cut_step(bench, pages, q, cache, density)
    return Step(q, cache, pages, thresholds, torch.empty_like(q))


def _cut_step(bench: Bench, pages: ScorerPages, q: Tensor, cache: PagedCache, density: float) -> Thresholds:
    """The one log share with which the groups' lists keep this density, by trying."""
    low, high = -30.0, 0.0
    blocks, out = cache.page_table.shape[1], torch.empty_like(q)
    for _ in range(1 if bench.sizes.is_tiny else 12):
        middle = (low + high) / 2
        thresholds = Thresholds(torch.full((cache.keys.shape[1], 1), middle, device=q.device), ())
        kept = float(pages.decode(q, cache, thresholds, out).float().mean()) / blocks
        low, high = (middle, high) if kept > density else (low, middle)
    return Thresholds(torch.full((cache.keys.shape[1], 1), high, device=q.device), ())
