"""The card's own peaks, and times of every operation beside the dense alternatives."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import causal_limits, num_blocks
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.ops.layouts import BlockLists
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.rules import Rule, Threshold, TopK, TopP
from sentei.kernels.ops.select import select_lists

from .plan import Line, SkipRowError
from .scoring import make_step, scored_step
from .tensors import (
    draw,
    draw_lists,
    draw_prompt,
    draw_step_lists,
    make_scoring,
    open_share,
    paged_cache,
    prompt_grid,
)
from .timing import (
    Work,
    extra_mib,
    flex_work,
    from_idle,
    replayed,
    sdpa_work,
    sdpa_works,
    step_works,
    take_turns,
)
from .worker import Bench


def peaks(bench: Bench) -> Iterator[Line]:
    """What a large matrix product and a copy beyond every cache reach on random numbers: the two ceilings."""
    size = bench.sizes.matrix
    left, right = draw(bench, size, size), draw(bench, size, size)
    source = draw(bench, bench.sizes.copy_mib * 2**19)
    target = torch.empty_like(source)
    out = torch.empty_like(left)
    times = take_turns(
        bench, {"matmul": lambda: torch.mm(left, right, out=out), "copy": lambda: target.copy_(source)}
    )
    flops, moved = 2.0 * size**3, 2.0 * source.nbytes
    bench.learned["matmul_tflops"] = flops / times.median("matmul") / 1e9
    bench.learned["copy_gb_s"] = moved / times.median("copy") / 1e6
    yield times.line("matmul", note=f"{bench.learned['matmul_tflops']:.3g} TFLOP/s bf16, {size} cubed")
    yield times.line("copy", note=f"{bench.learned['copy_gb_s']:.4g} GB/s read and written")


def dense(bench: Bench, tokens: int) -> Iterator[Line]:
    """One prompt by each backend of SDPA and by compiled FlexAttention; the fastest of SDPA is remembered."""
    q, k, v = draw_prompt(bench, tokens)
    works = sdpa_works(q, k, v)
    works["flex"] = flex_work(bench, q, k, v)
    times = take_turns(bench, works)
    fused = [name for name in times.spent if name.startswith("sdpa")]
    if not fused:
        raise SkipRowError(f"no fused backend of SDPA runs here: {times.reasons}")
    fastest = min(fused, key=times.median)
    bench.learned[f"sdpa {tokens}"] = fastest.removeprefix("sdpa ")
    flops = prefill_flops(bench, float(causal_blocks(bench, tokens)))
    for name in works:
        mib = extra_mib(bench, works[name]) if name in times.spent else None
        line = times.line(name, extra_mib=mib)
        share = matmul_share(bench, flops, line.ms)
        note = f"{tokens} tokens; the fastest of SDPA" if name == fastest else line.note
        yield replace(line, share=share, peak="matmul", note=note)


def _fastest_sdpa(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that an earlier row found the fastest at this length, or that is so now."""
    key = f"sdpa {q.shape[2]}"
    if key not in bench.facts:
        times = take_turns(bench, sdpa_works(q, k, v), rounds_max=3)
        if not times.spent:
            raise SkipRowError(f"no fused backend of SDPA runs here: {times.reasons}")
        bench.learned[key] = min(times.spent, key=times.median).removeprefix("sdpa ")
    return str({**bench.facts, **bench.learned}[key])


def prefill(bench: Bench, tokens: int, density: float) -> Iterator[Line]:
    """Sparse attention alone and with the scorer, in turn with the fastest of SDPA on the same prompt."""
    sizes, grid = bench.sizes, prompt_grid(bench, tokens)
    q, k, v = draw_prompt(bench, tokens)
    by_group = draw_lists(bench, grid, sizes.kv_heads, density)
    by_head = draw_lists(bench, grid, sizes.heads, density)
    scoring = make_scoring(bench, q, k, density)
    scored = scoring(q, k)
    name = _fastest_sdpa(bench, q, k, v)
    works: dict[str, Work] = {
        "dense": sdpa_work(q, k, v, name),
        "lists per KV group": lambda: attend(q, k, v, by_group, backend="triton"),
        "lists per head": lambda: attend(q, k, v, by_head, backend="triton"),
        "score and select": lambda: scoring(q, k),
        "with scorer": lambda: attend(q, k, v, scoring(q, k), backend="triton"),
    }
    times = take_turns(bench, works)
    base = times.median("dense") if "dense" in times.spent else None
    yield times.line("dense", note=times.reasons.get("dense") or f"sdpa {name}, {tokens} tokens")
    masks = {
        "lists per KV group": by_group,
        "lists per head": by_head,
        "score and select": scored,
        "with scorer": scored,
    }
    for what, mask in masks.items():
        if what not in times.spent:
            yield times.line(what)
            continue
        ms, blocks = times.median(what), float(mask.counts.sum()) / mask.counts.shape[1]
        kept = blocks / causal_blocks(bench, tokens)
        note = f"density {kept:.3f}"
        if what == "score and select" and base:
            note += f", {ms / base:.1%} of dense"
        line = times.line(what, against="dense", ratio=base / ms if base else None, note=note)
        if what != "score and select":
            line = replace(
                line,
                share=matmul_share(bench, prefill_flops(bench, blocks), ms),
                peak="matmul",
                extra_mib=extra_mib(bench, works[what]),
            )
        yield line


def decode(bench: Bench, density: float) -> Iterator[Line]:
    """As CUDA graphs, so that launching costs nothing, with and without the scorer; and once as called."""
    sizes = bench.sizes
    batch, tokens = sizes.batch, sizes.decode_tokens
    keys, values = (draw(bench, batch, sizes.kv_heads, tokens, sizes.head_dim) for _ in range(2))
    q = draw(bench, batch, sizes.heads, 1, sizes.head_dim)
    dense = _fastest(bench, step_works(q, keys, values))
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=bench.device)
    cache = paged_cache(bench, keys, values, lengths, sizes.block)
    by_group = draw_step_lists(bench, batch, tokens, sizes.kv_heads, density)
    by_head = draw_step_lists(bench, batch, tokens, sizes.heads, density)
    whole = _all_blocks(bench, batch, tokens)
    works: dict[str, Work] = {
        dense[0]: dense[1],
        "all blocks": lambda: attend_paged(q, cache, whole, backend="triton"),
        "lists per KV group": lambda: attend_paged(q, cache, by_group, backend="triton"),
        "lists per head": lambda: attend_paged(q, cache, by_head, backend="triton"),
    }
    graphs = {name: replayed(bench, work) for name, work in works.items()}
    times = take_turns(bench, {**graphs, "as called": from_idle(bench, works["lists per KV group"])})
    base = times.median(dense[0])
    per_block = 2.0 * sizes.block * sizes.head_dim * keys.element_size()
    bytes_of = {
        dense[0]: keys.nbytes + values.nbytes,
        "all blocks": keys.nbytes + values.nbytes,
        "lists per KV group": float(by_group.counts.sum()) * per_block,
    }  # per head: what the heads of a group share comes from the cache
    blocks = num_blocks(tokens, sizes.block)
    kept = {name: float(lists.counts.float().mean()) / blocks
            for name, lists in (("lists per KV group", by_group), ("lists per head", by_head))}  # fmt: skip
    for name in (*works, "as called"):
        line = times.line(name)
        if line.ms is None:
            yield line
            continue
        moved, peak = bytes_of.get(name), bench.facts.get("copy_gb_s")
        note = f"density {kept[name]:.3f}, batch {batch}, {tokens} tokens" if name in kept else ""
        yield times.line(
            name,
            against="dense" if name != dense[0] else "",
            ratio=base / line.ms if name != dense[0] else None,
            share=moved / line.ms / 1e6 / peak if moved and peak else None,
            peak="copy",
            extra_mib=extra_mib(bench, works[name]) if name in works else None,
            note=note
            or ("per KV group from an idle device: launching counted" if name == "as called" else ""),
        )
    del keys, values
    for form in sizes.forms if density == sizes.densities[0] else sizes.forms[:1]:
        yield scored_step(bench, q, cache, density, base, form)


def _fastest(bench: Bench, works: dict[str, Work]) -> tuple[str, Work]:
    """The fastest dense step of those that run here."""
    times = take_turns(bench, works, rounds_max=3)
    if not times.spent:
        raise SkipRowError(f"no fused backend of SDPA runs here: {times.reasons}")
    name = min(times.spent, key=times.median)
    return name, works[name]


def _all_blocks(bench: Bench, batch: int, tokens: int) -> BlockLists:
    heads, blocks = bench.sizes.kv_heads, num_blocks(tokens, bench.sizes.block)
    counts = torch.full((batch, heads), blocks, dtype=torch.int32, device=bench.device)
    indices = torch.arange(blocks, dtype=torch.int32, device=bench.device).expand(batch, heads, -1)
    return BlockLists(counts, indices.contiguous(), bench.sizes.block)


def mass(bench: Bench, tokens: int, num_rows: int | None) -> Iterator[Line]:
    """Block mass of all rows, or of some, beside one dense forward."""
    sizes = bench.sizes
    q, k, v = draw_prompt(bench, tokens)
    rows = torch.arange(tokens, device=bench.device)
    if num_rows is not None:
        rows = torch.randperm(tokens, generator=bench.generator, device=bench.device)[:num_rows].sort().values
    name = _fastest_sdpa(bench, q, k, v)
    scale = sizes.head_dim**-0.5
    works: dict[str, Work] = {
        "dense": sdpa_work(q, k, v, name),
        "mass": lambda: block_mass(q, k, scale=scale, block_k=sizes.block, rows=rows, backend="triton"),
    }
    times = take_turns(bench, works)
    base = times.median("dense") if "dense" in times.spent else None
    yield times.line("dense", note=times.reasons.get("dense") or f"sdpa {name}, {tokens} tokens")
    ms = times.median("mass")
    # Scores are made twice, and nothing is multiplied with values: as many products as a forward.
    flops = 4.0 * sizes.head_dim * sizes.heads * float((rows + 1).sum())
    yield times.line(
        "mass",
        against="dense",
        ratio=base / ms if base else None,
        share=matmul_share(bench, flops, ms),
        peak="matmul",
        extra_mib=extra_mib(bench, works["mass"]),
        note=f"{rows.numel()} rows of {tokens}",
    )


def select(bench: Bench, tokens: int) -> Iterator[Line]:
    """Lists from scores by each rule, at a tenth of the blocks and a bound of a fifth."""
    sizes, grid = bench.sizes, prompt_grid(bench, tokens)
    num = num_blocks(tokens, sizes.block)
    scores = torch.rand(1, sizes.heads, num, num, generator=bench.generator, device=bench.device)
    scores = scores.log_softmax(-1)
    cut = scores.flatten()[:: max(1, scores.numel() // 2**20)].float()
    cut = cut.kthvalue(max(1, round((1.0 - open_share(grid, 0.1)) * cut.numel()))).values
    width = max(4, num // 5)
    rules: dict[str, Rule] = {
        "threshold": Threshold(cut),
        "top-p": TopP(0.5),
        "top-k": TopK(max(4, num // 10)),
    }
    works: dict[str, Work] = {
        name: lambda rule=rule: select_lists(scores, rule, grid, width=width, backend="triton")  # type: ignore[misc]
        for name, rule in rules.items()
    }
    times = take_turns(bench, works)
    moved = scores.nbytes / 2 + 4.0 * sizes.heads * num * (width + 1)  # of the scores, the causal half
    for name in rules:
        line = times.line(name)
        share = None
        if line.ms is not None and "copy_gb_s" in bench.facts:
            share = moved / line.ms / 1e6 / bench.facts["copy_gb_s"]
        yield replace(line, share=share, peak="copy", note=line.note or f"{num} blocks, width {width}")


def host_syncs(bench: Bench) -> Iterator[Line]:
    """How often scoring, selection and attention make the host wait for the device; none is the aim."""
    q, k, v = draw_prompt(bench, bench.sizes.prompts[-1])
    scoring = make_scoring(bench, q, k, 0.2)
    shares, _ = scoring.shares(q, k)
    mask = scoring(q, k)
    attend(q, k, v, mask, backend="triton")
    grid = scoring.grid
    cut = torch.tensor(-3.0, device=bench.device)
    step = make_step(bench)
    step()
    works: dict[str, Work] = {
        "decode step with scorer": step,
        "score": lambda: scoring.shares(q, k),
        "score and select": lambda: scoring(q, k),
        "select": lambda: select_lists(shares, Threshold(cut), grid, backend="triton"),
        "attend": lambda: attend(q, k, v, mask, backend="triton"),
    }
    if not bench.is_cuda:
        for work in works.values():
            work()
        raise SkipRowError("torch counts synchronisations on a card only; the calls themselves ran")
    for name, work in works.items():
        places = _sync_places(work)
        yield Line(name, note=f"{len(places)} waits: {', '.join(sorted(set(places))) or 'none'}")


def _sync_places(work: Work) -> list[str]:
    """Where in the package each wait began."""
    places: list[str] = []

    def note(*_args: object, **_kwargs: object) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/kernels/" in frame.filename]
        last = ours[-1] if ours else None
        places.append(f"{Path(last.filename).name}:{last.lineno}" if last else "elsewhere")

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def causal_blocks(bench: Bench, tokens: int) -> int:
    """Pairs of query and key blocks that dense attention reads, per head."""
    return int(causal_limits(tokens, bench.sizes.block, bench.sizes.block, 0).sum())


def prefill_flops(bench: Bench, blocks: float) -> float:
    """Two products of each pair of tokens in `blocks` blocks per head; the diagonal's upper half counts."""
    sizes = bench.sizes
    return 4.0 * sizes.head_dim * sizes.heads * blocks * sizes.block**2


def matmul_share(bench: Bench, flops: float, ms: float | None) -> float | None:
    """The share of the measured peak of a matrix product."""
    if ms is None or "matmul_tflops" not in bench.facts:
        return None
    return flops / ms / 1e9 / float(bench.facts["matmul_tflops"])
