"""`sentei bench`: speed as ratios, the alternatives taking turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sentei.pipeline.cli.output import Output

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep `kernels` a command of its own."""


@app.command()
def kernels(
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt length; may be repeated.", min=128)] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of blocks; may be repeated.")] = None,
    runs: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Time block-sparse prefill against SDPA and compiled dense FlexAttention (attention alone, fp32)."""
    from sentei.kernels.bench.cases import make_cases
    from sentei.kernels.bench.run import run_case

    output = Output(as_json=as_json)
    cases = make_cases(tuple(tokens or (4096,)), tuple(density or (0.5, 0.2, 0.1)))
    rows = []
    with output.progress() as progress:
        for done, case in enumerate(cases):
            progress("time prefill", done, len(cases))
            rows += run_case(case, runs=runs)
        progress("time prefill", len(cases), len(cases))
    table = Table(
        "tokens", "heads", "dim", "density", "against", "ms (p20 to p80)", "dense ms", "speed-up", "of ideal"
    )
    for row in rows:
        spread = f"{row.median_ms:.0f} ({row.p20_ms:.0f} to {row.p80_ms:.0f})"
        ratios = (f"{row.baseline_ms:.0f}", f"{row.speedup:.2f}", f"{row.share_of_ideal:.2f}")
        shape = (str(row.tokens), f"{row.heads}:{row.kv_heads}", str(row.head_dim), f"{row.density:.1%}")
        table.add_row(*shape, row.baseline, spread, *ratios)
    output.say(table)
    output.emit({"rows": [row.to_dict() for row in rows]})


@app.command()
def resources(
    write: Annotated[
        Path | None, typer.Option(help="Page whose table is replaced (docs/kernels.md).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
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
