"""`sentei bench serving`: load on a server that runs already, whatever engine is behind it."""

from __future__ import annotations

import asyncio
import random
from typing import Annotated, Any

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.output import Output


@needs("train")
def bench_serving(
    url: Annotated[str, typer.Option(help="Root of an OpenAI-compatible API.")],
    model: Annotated[str, typer.Option(help="Whose tokens: pocket, a folder, a hub id.")] = "pocket",
    name: Annotated[str | None, typer.Option(help="Model name to send [default: --model].")] = None,
    system: Annotated[str, typer.Option(help="What runs there, for the table: builtin, vllm, ...")] = "",
    rung: Annotated[str, typer.Option(help="What it runs at, for the table.")] = "dense",
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="Lengths; repeatable.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    requests: Annotated[int, typer.Option(help="How many.", min=1)] = 16,
    rate: Annotated[float | None, typer.Option(help="Arrivals per second [default: all at once].")] = None,
    goal_ttft_ms: Annotated[float | None, typer.Option(help="Good answers begin by then.")] = None,
    goal_tpot_ms: Annotated[float, typer.Option(help="... and go on at this pace.")] = 200.0,
    timeout_s: Annotated[float, typer.Option(help="Longest silence in a stream.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Send requests at times that do not wait for answers; report TTFT, TPOT, tokens a second, goodput."""
    from sentei.pipeline.measure.load import Goal, plan_arrivals, summarise

    output = Output(as_json=as_json)
    lengths = prompt_tokens or [1024, 2048, 4096, 8192]
    prompts = _prompts(model, [lengths[i % len(lengths)] for i in range(requests)], seed)
    random.Random(seed).shuffle(prompts)
    plan = plan_arrivals(prompts, rate_per_s=rate, answer_tokens=answer_tokens, seed=seed)
    felt, seconds = asyncio.run(_send_all(plan, url, name or model, timeout_s))
    goal = Goal(goal_ttft_ms, goal_tpot_ms) if goal_ttft_ms is not None else None
    row: dict[str, Any] = {"system": system, "variant": rung, "prompt_tokens": lengths, "clients": requests}
    row |= summarise(felt, seconds, goal)
    table = Table("", *row.keys())
    table.add_row("", *(str(value) for value in row.values()))
    output.say(table)
    for failure in sorted({one.failure for one in felt if one.failure}):
        output.say(f"failed: {failure}")
    output.emit({"url": url, "model": model, "rate_per_s": rate, "rows": [row]})


async def _send_all(plan: Any, url: str, name: str, timeout_s: float) -> Any:
    import httpx

    from sentei.pipeline.measure.load import openai_sender, run_load

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False) as client:
        return await run_load(plan, openai_sender(client, name, {}))


def _prompts(model: str, lengths: list[int], seed: int) -> list[tuple[int, ...]]:
    """Windows of the standard library's text, each its own, so that no prefix is shared by accident."""
    from sentei.pipeline.measure.texts import make_windows
    from sentei.pipeline.models import resolve_model
    from sentei.pipeline.text.corpus import load_corpus
    from sentei.pipeline.text.splits import split_text

    loaded = resolve_model(model)
    documents = split_text(load_corpus(None)).evaluate
    found = []
    for i, length in enumerate(lengths):
        (window,) = make_windows(loaded, documents, window_tokens=length, num=1, seed=seed * 1000 + i)
        found.append(tuple(int(token) for token in window))
    return found
