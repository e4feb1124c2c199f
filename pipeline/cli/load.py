"""`sentei bench serving`: one load on several servers of one model, each started and ended here."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import check_extras, needs
from sentei.pipeline.cli.offline import DTYPES, Json, Model
from sentei.pipeline.cli.output import Output, check_choice

if TYPE_CHECKING:
    from sentei.pipeline.demo.systems import ModelUnderTest, Running, System
    from sentei.pipeline.measure.load import Load, LoadPlan

LENGTHS = (1024, 2048, 4096, 8000)
COLUMNS = (
    ("TTFT ms", "ttft_ms"),
    ("TPOT ms", "tpot_ms"),
    ("tokens/s", "tokens_per_s"),
    ("prompt tokens/s", "prompt_tokens_per_s"),
    ("good/s", "goodput_per_s"),
    ("MiB", "memory_mib"),
)
SAMPLE_EVERY_S = 2.0


@needs("train", "bench")
def bench_serving(
    system: Annotated[
        list[str] | None,
        typer.Option(help="builtin, app, vllm, vllm:RUNG, transformers; repeatable [default: builtin]."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Load a server that runs already, instead.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name at --url [default: --model].")] = None,
    model: Model = "pocket",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Lengths in turn; repeatable [default: 1024 to 8000].")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(help="Length of every answer.", min=2)] = 64,
    requests: Annotated[int, typer.Option(help="How many in a run.", min=1)] = 16,
    rate: Annotated[float | None, typer.Option(help="Arrivals per second [default: all at once].")] = None,
    runs: Annotated[int, typer.Option(help="Runs on each server, each with its own prompts.", min=1)] = 1,
    goal_ttft_ms: Annotated[float | None, typer.Option(help="Good answers begin by then.")] = None,
    goal_tpot_ms: Annotated[
        float, typer.Option(help="... and go on at this pace; counts only with --goal-ttft-ms.")
    ] = 200.0,
    threads: Annotated[int, typer.Option(help="Cores of each server.", min=1)] = 2,
    kv_cache_mib: Annotated[int, typer.Option(help="Keys and values of a vLLM engine.", min=64)] = 2048,
    step_tokens: Annotated[int, typer.Option(help="Tokens of one step of vLLM.", min=128)] = 2048,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Let vLLM compile: a minute or two at each start.")
    ] = True,
    timeout_s: Annotated[float, typer.Option(help="Longest silence in a stream.")] = 900.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    as_json: Json = False,
) -> None:
    """Send requests at times that do not wait for answers; TTFT, TPOT, tokens a second, goodput, memory."""
    from sentei.pipeline.demo.systems import EXTRAS, ModelUnderTest, read_system
    from sentei.pipeline.home import sentei_home
    from sentei.pipeline.measure.load import Goal, LoadPlan, plan_prompts, run_load, summarise
    from sentei.pipeline.models import checkpoint_source, load_tokenizer

    output = Output(as_json=as_json)
    check_choice("--dtype", [dtype], DTYPES)
    systems = [] if url else [read_system(text) for text in system or ["builtin"]]
    for one in systems:
        check_extras(*EXTRAS[one.kind])
    home = sentei_home().create()
    folder = home.root / "bench" / "serving"
    lengths = [(prompt_tokens or LENGTHS)[i % len(prompt_tokens or LENGTHS)] for i in range(requests)]
    prompts = plan_prompts(load_tokenizer(model), lengths, runs=runs, seed=seed)
    plans = [LoadPlan(part, answer_tokens, rate, seed + i, timeout_s) for i, part in enumerate(prompts)]
    goal = Goal(goal_ttft_ms, goal_tpot_ms) if goal_ttft_ms is not None else None
    rows: list[dict[str, Any]] = []
    if url is not None:
        loads = [run_load(plan, url, name or model, folder / "url") for plan in plans]
        rows.append({"system": "url", "rung": "", **summarise(loads, goal)})
    longest = max(prompt.tokens for part in prompts for prompt in part)
    adapter = home.find_adapter(model)
    under_test = ModelUnderTest(
        source=checkpoint_source(model),
        dtype=dtype,
        context_tokens=longest + answer_tokens + 1,
        threads=threads,
        max_running=requests,
        kv_cache_mib=kv_cache_mib,
        step_tokens=step_tokens,
        adapter=adapter if adapter.is_dir() else None,
        is_compiled=compiled,
    )
    for one in systems:
        output.say(f"{one}: starts")
        loads = measure_system(one, under_test, plans, folder / str(one).replace(":", "-"))
        rows.append({"system": one.kind, "rung": one.rung, **summarise(loads, goal)})
        for failure in sorted({failure for load in loads for failure in load.failures}):
            output.say(f"{one}: failed: {failure}")
    output.say(make_table(rows))
    output.emit(
        {"model": model, "dtype": dtype, "rate_per_s": rate, "answer_tokens": answer_tokens, "rows": rows}
    )


def measure_system(
    system: System, model: ModelUnderTest, plans: Sequence[LoadPlan], folder: Path
) -> list[Load]:
    """Start a system, put each load on it, end it; the first request of all is not measured."""
    from sentei.pipeline.demo.systems import start
    from sentei.pipeline.measure.load import run_load

    loads = []
    with ending_in_order(), start(system, model, folder) as running:
        plans = [replace(plan, body=system.body, forces_length=system.forces_length) for plan in plans]
        first = replace(plans[0], prompts=(plans[0].prompts[0].shortened(),), rate_per_s=None)
        run_load(first, running.url, running.model, folder / "warm-up")
        for i, plan in enumerate(plans):
            with peak_memory(running) as peak:
                load = run_load(plan, running.url, running.model, folder / f"run-{i}")
            loads.append(replace(load, memory_mib=peak()))
    return loads


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM end the `with` blocks inside, and with them a server that would live on by itself."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def peak_memory(running: Running) -> Iterator[Callable[[], float]]:
    """Look at a server's memory now and then; gives a function that returns the most that was seen."""
    seen, is_over = [running.memory_mib()], Event()

    def look() -> None:
        while not is_over.wait(SAMPLE_EVERY_S):
            seen.append(running.memory_mib())

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        is_over.set()
        thread.join()


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table: medians over the runs, lowest and highest in brackets where there are several."""
    table = Table("system", "rung", "requests", "failed", *(heading for heading, _ in COLUMNS))
    for row in rows:
        cells = [_cell(row, name) for _, name in COLUMNS]
        table.add_row(row["system"], row["rung"], str(row["requests"]), str(row["failed"]), *cells)
    return table


def _cell(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_range"]
    return f"{row[name]:,.4g}" if low == high else f"{row[name]:,.4g} ({low:,.4g} to {high:,.4g})"
