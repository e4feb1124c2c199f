"""`sentei bench`: speed as ratios, the alternatives taking turns in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.load import bench_serving
from sentei.pipeline.cli.offline import DTYPES, CorpusName, DeviceName, Dtype, Json, Model, open_bench
from sentei.pipeline.cli.output import Output, check_choice
from sentei.pipeline.home import short_name
from sentei.pipeline.progress import counted

if TYPE_CHECKING:
    from sentei.kernels.bench.cases import Shape
    from sentei.kernels.bench.machine import Machine
    from sentei.kernels.bench.run import Options, Row
    from sentei.kernels.hf.adapter import Adapter
    from sentei.pipeline.measure.budget import Budget

app = typer.Typer(no_args_is_help=True)
app.command("serving")(bench_serving)


@app.callback()
def _root() -> None:
    """Time kernels and whole models."""


@app.command()
@needs("train")
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="prefill, decode or block_mass; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt or cache length; repeatable.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head size; repeatable.")] = None,
    block: Annotated[list[int] | None, typer.Option(help="Key block; repeatable.")] = None,
    query_block: Annotated[
        int | None, typer.Option(help="Rows that choose together [default: what calibrate picks].")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of blocks; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeatable.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Sequences of a decode step.", min=1)] = 8,
    lists: Annotated[str, typer.Option(help="Lists of blocks per query head or per KV group.")] = "head",
    backend: Annotated[str, typer.Option(help="auto, native, flex, gather or reference.")] = "auto",
    pool_tokens: Annotated[
        int, typer.Option(help="Tokens per pooled key of the scorer; 1 takes the low-rank form.")
    ] = 64,
    runs: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Time block-sparse attention against SDPA, compiled dense Flex and our own dense, in one run."""
    import torch

    from sentei.kernels.bench.cases import Shape
    from sentei.kernels.bench.run import OPS, Options
    from sentei.kernels.scorer.selection import pick_query_block

    check_choice("--op", op or (), OPS)
    check_choice("--dtype", dtype or (), DTYPES)
    check_choice("--lists", [lists], ("head", "group"))
    shapes = [
        (
            name,
            Shape(
                tokens=n,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=dim,
                block=size,
                query_block=query_block or pick_query_block("cpu"),
                batch=batch if name == "decode" else 1,
                dtype=getattr(torch, precision),
                shares_lists=lists == "group",
            ),
        )
        for name, precision, n, dim, size in product(
            op or ("prefill",),
            dtype or ("float32",),
            tokens or (4096,),
            head_dim or (64, 256),
            block or (64,),
        )
    ]
    densities = tuple(density or (0.5, 0.2, 0.1))
    _run_kernels(shapes, densities, Options(runs, backend, pool_tokens), Output(as_json=as_json))


def _run_kernels(
    shapes: Sequence[tuple[str, Shape]], densities: tuple[float, ...], options: Options, output: Output
) -> None:
    """Time every shape, append to the ledger at home, draw and show."""
    from sentei.kernels.bench.ledger import append_rows
    from sentei.kernels.bench.machine import measure_machine
    from sentei.kernels.bench.run import run_op
    from sentei.pipeline.home import sentei_home
    from sentei.pipeline.reports.plots import save_speedups

    machine = measure_machine()
    rows: list[Row] = []
    with output.progress() as progress:
        for name, shape in counted(shapes, "time", progress):
            rows += run_op(name, shape, densities, machine, options)
    folder = sentei_home().create().root / "bench"
    ledger = append_rows(folder / "kernels.csv", rows, machine)
    plot = save_speedups(rows, folder / "kernels.html")
    _show(rows, machine, output)
    output.say(f"ledger {ledger}\nplot   {plot}")
    output.emit(
        {
            "machine": machine.to_dict(),
            "rows": [row.to_dict() for row in rows],
            "ledger": str(ledger),
            "plot": str(plot),
        }
    )


def _show(rows: Sequence[Row], machine: Machine, output: Output) -> None:
    output.say(
        f"{machine.device}, {machine.threads} threads, torch {machine.torch_version}: "
        f"{machine.gflops:.0f} GF/s (bf16 {machine.bf16_gflops:.0f}), {machine.gbytes_per_s:.0f} GB/s at best"
    )
    grouped: dict[Row, dict[str, Row]] = {}
    for row in rows:
        key = replace(row, baseline="", baseline_ms=0.0, speedup=0.0, share_of_ideal=0.0)
        grouped.setdefault(key, {})[row.baseline] = row
    names = list(dict.fromkeys(row.baseline for row in rows))
    table = Table(
        "op", "shape", "density", "ms (p20-p80)", *(f"vs {name}" for name in names), "of ideal", "floor"
    )
    for key, by_name in grouped.items():
        speedups = [f"{by_name[name].speedup:.2f}" if name in by_name else "" for name in names]
        table.add_row(
            f"{key.op}{' + scorer' if key.with_scorer and key.op == 'prefill' else ''}",
            f"{key.batch}x{key.tokens} {key.heads}:{key.kv_heads}x{key.head_dim} "
            f"b{key.query_block}x{key.block} {key.dtype}",
            f"{key.density:.1%}",
            f"{key.median_ms:.4g} ({key.p20_ms:.4g}-{key.p80_ms:.4g})",
            *speedups,
            f"{min(row.share_of_ideal for row in by_name.values()):.2f}",
            f"{key.floor_ms:.3g}",
        )
    output.say(table)
    if extra := [row.extra_mib for row in rows if row.extra_mib is not None]:
        output.say(
            f"peak memory of prefill with scorer beyond inputs and outputs: {max(extra):.0f} MiB at most"
        )


@app.command()
@needs("train")
def prefill(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt length; repeatable.", min=256)] = None,
    rung: Annotated[list[str] | None, typer.Option(help="Rung; repeatable [default: all].")] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(
            help="sdpa, flex_dense or best_dense; repeatable [default: all; sdpa takes minutes at 32k]."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed rounds, after one to warm up.", min=1)] = 3,
    warm_up: Annotated[
        int | None, typer.Option(help="Tokens of the round that warms up [default: all].", min=256)
    ] = None,
    unverified: Annotated[
        bool,
        typer.Option("--unverified", help="Run rungs sparse at lengths that nobody verified too."),
    ] = False,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Time a whole model's prefill, scorer included, beside its three dense forms: seconds and memory.

    On a CPU our own dense and the rungs take it in pieces of 2,048 tokens, as our engine does; others in one.
    Past the longest length that a rung was verified at, it runs dense, here as in serving.
    """
    from sentei.kernels.bench.machine import measure_machine
    from sentei.kernels.hf.ladder import DENSE
    from sentei.pipeline.home import sentei_home
    from sentei.pipeline.measure.budget import prefill_budgets
    from sentei.pipeline.measure.latency import BEST_DENSE, DENSE_FORMS, time_prefills
    from sentei.pipeline.measure.memory import prefill_peaks
    from sentei.pipeline.measure.texts import make_windows
    from sentei.pipeline.reports.plots import save_budgets
    from sentei.pipeline.text.splits import split_text

    output = Output(as_json=as_json)
    check_choice("--dense", dense or (), DENSE_FORMS)
    bench = open_bench(model, corpus, output, dtype, device)
    adapter = _with_rungs(bench.adapter(), rung)
    known = {found.id: found.verified_tokens for found in adapter.ladder.rungs}
    if unverified:
        adapter = adapter.with_ladder(adapter.ladder.without_limits())
    rows: list[dict[str, object]] = []
    parts: list[dict[str, object]] = []
    machine = measure_machine(bench.loaded.device)
    for length in tokens or (8192,):
        (text,) = make_windows(
            bench.loaded, split_text(bench.corpus).evaluate, window_tokens=length, num=1, seed=3
        )
        with output.progress() as progress:
            timings = time_prefills(
                bench.loaded,
                adapter,
                text,
                runs=runs,
                progress=progress,
                dense=tuple(dense) if dense else DENSE_FORMS,
                warm_up_tokens=warm_up,
            )
            budgets = prefill_budgets(
                bench.loaded, adapter, text, machine, runs=min(runs, 3), progress=progress
            )
            peaks = prefill_peaks(bench.loaded, adapter, text, runs=min(runs, 3), progress=progress)
        for name, timing in timings.items():
            is_verified = (known.get(name) or len(text)) >= len(text)
            peak = peaks.get(DENSE if name == BEST_DENSE else name)
            facts = {"tokens": len(text), "variant": name, "is_verified": is_verified, "peak_mib": peak}
            rows.append(facts | asdict(timing))
        parts += [{"tokens": len(text)} | asdict(budget) for budget in budgets]
        title = f"ms of {len(text):,} tokens (floor)"
        output.say(_prefill_table(rows[-len(timings) :]), _budget_table(budgets, title))
        page = sentei_home().create().root / "bench" / f"{short_name(model)}-{len(text)}.html"
        title = f"{model}: where {len(text):,} tokens of prefill spend their time"
        output.say(f"picture {save_budgets(budgets, title, page)}")
    output.emit({"model": model, "machine": machine.to_dict(), "rows": rows, "parts": parts})


def _budget_table(budgets: Sequence[Budget], title: str, digits: int = 0) -> Table:
    """Show milliseconds by part, and in brackets what the machine's peaks would allow."""
    names = (f"{b.variant}" + ("" if b.density is None else f" ({b.density:.1%})") for b in budgets)
    table = Table(title, *names)
    for part in budgets[0].seconds:
        if not any(budget.seconds[part] for budget in budgets):
            continue
        cells = []
        for budget in budgets:
            floor = budget.floor_s.get(part)
            spent = f"{1e3 * budget.seconds[part]:.{digits}f}"
            cells.append(spent + (f" ({1e3 * floor:.{digits}f})" if floor else ""))
        table.add_row(part, *cells)
    table.add_row("all", *(f"{1e3 * budget.total_s:.{digits}f}" for budget in budgets))
    return table


def _prefill_table(rows: Sequence[dict[str, object]]) -> Table:
    by_name = {(row["tokens"], row["variant"]): row for row in rows}
    table = Table(
        "tokens", "variant", "s (lowest-highest)", "vs sdpa", "vs flex", "vs best dense", "peak MiB"
    )
    for row in rows:
        seconds = float(str(row["median_s"]))
        dense = (by_name.get((row["tokens"], name)) for name in ("sdpa", "flex_dense", "best_dense"))
        table.add_row(
            f"{row['tokens']:,}",
            str(row["variant"]) + ("" if row["is_verified"] else " (unverified here)"),
            f"{seconds:.2f} ({row['lowest_s']:.2f}-{row['highest_s']:.2f})",
            *(f"{float(str(other['median_s'])) / seconds:.2f}" if other else "" for other in dense),
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        )
    return table


def _with_rungs(adapter: Adapter, rungs: Sequence[str] | None) -> Adapter:
    """Leave dense and the rungs asked for; all of them where none is named."""
    if not rungs:
        return adapter
    kept = tuple(adapter.ladder.find(rung_id) for rung_id in ("dense", *rungs))
    return adapter.with_ladder(replace(adapter.ladder, rungs=kept))


@app.command()
@needs("train")
def decode(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Context length; repeatable.", min=256)] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 4,
    rung: Annotated[list[str] | None, typer.Option(help="Rung; repeatable [default: all].")] = None,
    steps: Annotated[int, typer.Option(help="Steps of a turn; 64 see a block close.", min=1)] = 64,
    runs: Annotated[int, typer.Option(help="Turns of each variant.", min=1)] = 3,
    unverified: Annotated[
        bool,
        typer.Option("--unverified", help="Run rungs sparse at lengths that nobody verified too."),
    ] = False,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Time a whole model's decode steps, scorer included, beside our own dense: tokens per second.

    Below its break-even length and past the longest one verified, a rung decodes dense, here as in serving.
    """
    from sentei.kernels.bench.machine import measure_machine
    from sentei.pipeline.measure.decode import Steps, decode_budgets, time_decodes
    from sentei.pipeline.measure.texts import make_windows
    from sentei.pipeline.text.splits import split_text

    output = Output(as_json=as_json)
    bench = open_bench(model, corpus, output, dtype, device)
    adapter = _with_rungs(bench.adapter(), rung)
    if unverified:
        adapter = adapter.with_ladder(adapter.ladder.without_limits())
    machine = measure_machine(bench.loaded.device)
    held_out = split_text(bench.corpus).evaluate
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, object]] = []
    for length in tokens or (8192,):
        (text,) = make_windows(bench.loaded, held_out, window_tokens=length, num=1, seed=3)
        with output.progress() as progress:
            timings = time_decodes(
                bench.loaded, adapter, text, Steps(steps, runs), batch=batch, progress=progress
            )
            few = Steps(min(steps, 8), min(runs, 3))
            budgets = decode_budgets(
                bench.loaded, adapter, text, machine, few, batch=batch, progress=progress
            )
        sizes = {"tokens": len(text), "batch": batch}
        found = [sizes | {"variant": name} | asdict(timing) for name, timing in timings.items()]
        rows += found
        parts += [sizes | asdict(budget) for budget in budgets]
        output.say(_decode_table(found))
        output.say(_budget_table(budgets, f"ms of a step at {len(text):,} x {batch} (floor)", digits=1))
    output.emit({"model": model, "machine": machine.to_dict(), "rows": rows, "parts": parts})


def _decode_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show one context length's variants; the first row is our own dense."""
    table = Table("context", "variant", "tokens/s (lowest-highest)", "ms per step", "vs dense", "density")
    for row in rows:
        low, high = row["lowest_tokens_per_s"], row["highest_tokens_per_s"]
        table.add_row(
            f"{row['tokens']:,} x {row['batch']}",
            row["variant"],
            f"{row['median_tokens_per_s']:.2f} ({low:.2f}-{high:.2f})",
            f"{row['step_ms']:.1f}",
            f"{row['median_tokens_per_s'] / rows[0]['median_tokens_per_s']:.2f}",
            "dense" if row["density"] is None else f"{row['density']:.1%}",
        )
    return table


@app.command()
@needs("train")
def resources(
    write: Annotated[
        Path | None, typer.Option(help="Page whose table is replaced (docs/kernels.md).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the Triton kernels for every target, no GPU needed: registers, spills, shared memory."""
    from sentei.kernels.bench.resources import HEAD_DIMS, KERNELS, TARGET_NAMES, put_table, read_resources

    output = Output(as_json=as_json)
    total = len(TARGET_NAMES) * ((len(KERNELS) - 1) * len(HEAD_DIMS) + 1)
    rows = []
    with output.progress() as progress:
        for done, row in enumerate(read_resources()):
            rows.append(row)
            progress("compile", done + 1, total)
    table = Table("kernel", "head", "target", "warps", "registers", "spills", "shared KiB")
    for row in rows:
        taken = (str(row.registers), str(row.spills), f"{row.shared_bytes / 1024:.0f}")
        table.add_row(row.kernel, str(row.head_dim or "-"), row.target, str(row.num_warps), *taken)
    output.say(table)
    if write is not None:
        write.write_text(put_table(write.read_text(encoding="utf-8"), rows), encoding="utf-8")
    output.emit({"rows": [row.to_dict() for row in rows]})
