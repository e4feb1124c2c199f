"""`sentei explain`: for one prompt, which blocks each layer kept and why, as a table, a record and a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.offline import DeviceName, Json, Model
from sentei.pipeline.cli.output import Output
from sentei.pipeline.home import sentei_home

LAST, STDIN = "last", "-"


@needs("train")
def run_explain(
    prompt: Annotated[str, typer.Argument(help="A text file (UTF-8), or - for standard input.")],
    model: Model = "pocket",
    adapter: Annotated[
        Path | None, typer.Option(help="Its folder [default: the one that `sentei distill` made].")
    ] = None,
    rung: Annotated[str, typer.Option(help="A rung of the adapter's ladder.")] = "bold",
    token: Annotated[str, typer.Option(help="Look from the query block of this token, or `last`.")] = LAST,
    out: Annotated[
        Path | None, typer.Option(help="Where record and page go [default: reports at home].")
    ] = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Show which blocks each layer kept in one prefill, and why: score, threshold, rank."""
    from sentei.kernels.hf.adapter import load_adapter
    from sentei.pipeline.measure.choices import explain_prompt
    from sentei.pipeline.models import resolve_model
    from sentei.pipeline.reports.choices_page import save_explanation

    output = Output(as_json=as_json)
    position = read_token(token)
    text = read_prompt(prompt)
    with output.errors.status(f"loading {model}"):
        loaded = resolve_model(model, device=device)
        folder = adapter or sentei_home().adapter_dir(model, loaded.fingerprint.weights_sha256)
        found = load_adapter(folder, loaded.model)
    with output.progress() as progress:
        explanation = explain_prompt(loaded, found, text, rung=rung, token=position, progress=progress)
    name = f"explain-{folder.resolve().name}-{rung}"
    record, page = save_explanation(explanation, text, out or sentei_home().reports / name)
    summary = explanation.summary()
    if explanation.layers:
        output.say(choices_table(summary))
    output.say(*closing_lines(summary), f"page: {page}", f"record: {record}")
    output.emit({**summary, "record": str(record), "page": str(page)})


def read_prompt(source: str) -> str:
    """Return the prompt of a file, or of standard input for `-`; raises ValueError where it is not UTF-8."""
    raw = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt {source} is not UTF-8 ({error}); convert it first") from error


def read_token(text: str) -> int | None:
    """Return a token's position, None for `last`."""
    if text == LAST:
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r}; give a position from 0 on, or {LAST}", param_hint="--token")
    return int(text)


def choices_table(summary: dict[str, Any]) -> Table:
    """Show an explained prompt: a line per thinned layer, over all query blocks and for the focus."""
    query = summary["query_block"]
    table = Table(
        "layer",
        "density",
        "est. drop ≤",
        "kept by all",
        "by none",
        "est. drop ≤",
        "true drop",
        "worst row",
        title=f"From `kept by all` on: query block {query}, over its rows and heads",
        title_justify="left",
    )
    for layer in summary["layers"]:
        there = layer["at_query_block"]
        table.add_row(
            str(layer["layer"]),
            f"{layer['density']:.1%}",
            f"{layer['dropped_share_at_most']:.1%}",
            f"{there['kept_by_all_heads']}/{query + 1}",
            str(there["kept_by_no_head"]),
            f"{there['dropped_share_at_most']:.1%}",
            f"{there['dropped_mass_mean']:.1%}",
            f"{there['dropped_mass_worst']:.1%}",
        )
    return table


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """Say what the table cannot."""
    query, lines = summary["query_block"], []
    if summary["layers"]:
        lines.append(
            f"{summary['kept_by_all']} of {query + 1} blocks were kept by every head of every thinned layer "
            f"for query block {query} of a prompt of {summary['prompt_tokens']} tokens"
        )
    else:
        lines.append(
            "nothing was thinned: the rung is dense, or the prompt is shorter than its break-even length"
        )
    if summary["dense_layers"]:
        lines.append(f"dense at this rung and length: layers {_list(summary['dense_layers'])}")
    if summary["window_layers"]:
        lines.append(f"never thinned (sliding window): layers {_list(summary['window_layers'])}")
    return lines


def _list(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)
