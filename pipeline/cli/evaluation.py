"""`sentei evaluate`: every rung beside dense, and how it is shown in a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.offline import (
    CorpusName,
    DeviceName,
    Dtype,
    Json,
    Model,
    Windows,
    changed,
    open_bench,
)
from sentei.pipeline.cli.output import Output, check_choice

if TYPE_CHECKING:
    from sentei.pipeline.evaluation.evaluate import EvaluateOptions
    from sentei.pipeline.steps import Workbench

RECALL_ALONE = "recall"
TaskFile = Annotated[
    Path | None,
    typer.Option("--tasks", help="Your own tasks: one JSON object a line with prompt, reference, metric."),
]
TaskLength = Annotated[
    list[int] | None,
    typer.Option(
        "--task-length", help="Prompt tokens of the recall tasks; may be given several times.", min=64
    ),
]


@needs("train")
def run_evaluate(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per evaluated window.", min=256)] = None,
    windows: Windows = None,
    tasks: TaskFile = None,
    task_kind: Annotated[
        list[str] | None, typer.Option(help="A kind of recall task; may be given several times.")
    ] = None,
    task_length: TaskLength = None,
    task_depths: Annotated[
        int | None, typer.Option(help="Recall tasks of each kind and length, each at another depth.", min=1)
    ] = None,
    second_half: Annotated[
        bool, typer.Option("--second-half", help="Judge only positions in the second half of each window.")
    ] = False,
    compare: Annotated[
        str, typer.Option(help="Other choices of blocks at the density of: boldest, all or no rung.")
    ] = "boldest",
    timed_runs: Annotated[int | None, typer.Option(help="Timed rounds of prefill.", min=1)] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Your own price list (YAML), on top of the one that ships.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Measure one part alone, and keep nothing: recall.")
    ] = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Measure every rung beside dense: quality, recall, your tasks, latency, memory, cost."""
    from sentei.pipeline.evaluation.evaluate import EvaluateOptions
    from sentei.pipeline.evaluation.prices import load_prices
    from sentei.pipeline.steps import evaluate_step
    from sentei.pipeline.tasks import MAKERS

    output = Output(as_json=as_json)
    load_prices(prices)  # a list that cannot be used is said before a model is loaded
    check_choice("--task-kind", task_kind or (), MAKERS)
    check_choice("--compare", [compare], ("boldest", "all", "none"))
    check_choice("--only", [only] if only else (), (RECALL_ALONE,))
    if only and (tasks or timed_runs or prices or second_half or windows or compare != "boldest"):
        raise typer.BadParameter(
            "leaves out --windows, --tasks, --compare, --timed-runs, --prices and --second-half",
            param_hint="--only",
        )
    options = changed(
        EvaluateOptions(),
        window_tokens=tokens,
        num_windows=windows,
        user_tasks=tasks,
        task_kinds=tuple(dict.fromkeys(task_kind)) if task_kind else None,
        task_lengths=tuple(task_length) if task_length else None,
        num_tasks=task_depths,
        timed_runs=timed_runs,
        prices=prices,
    )
    bench = open_bench(model, corpus, output, dtype, device)
    if only == RECALL_ALONE:
        _show_recall(bench, options, output)
        return
    if compare != "boldest":
        rungs = bench.adapter().ladder.rungs if compare == "all" else ()
        options = replace(options, baseline_rungs=tuple(rung.id for rung in rungs if not rung.is_dense))
    if second_half:
        window = min(options.window_tokens, bench.loaded.max_tokens)
        options = replace(options, first_position=window // 2)
    with output.progress() as progress:
        evaluation = evaluate_step(bench, options, progress)
    _show(evaluation.to_dict(), bench.adapter_dir, has_answers=bool(evaluation.user_answers), output=output)


def _show_recall(bench: Workbench, options: EvaluateOptions, output: Output) -> None:
    from sentei.pipeline.evaluation.evaluate import evaluate_recall
    from sentei.pipeline.plain import to_plain

    with output.progress() as progress:
        found = evaluate_recall(bench.loaded, bench.adapter(), bench.corpus, options, progress)
    rungs = [{"rung": rung_id, "recall": to_plain(summary)} for rung_id, summary in found.items()]
    document = {"model": bench.loaded.name, "corpus": bench.corpus.name, "rungs": rungs}
    output.say(recall_table(document))
    output.emit(document)


def _show(document: dict[str, Any], folder: Path, *, has_answers: bool, output: Output) -> None:
    from sentei.pipeline.steps import ANSWERS_FILE, PAGE_FILE

    output.say(evaluation_table(document), recall_table(document))
    if document["baselines"]:
        output.say(baseline_table(document))
    if has_answers:
        output.say(user_table(document), f"every answer: {folder / ANSWERS_FILE}")
    output.say(cost_table(document), *(Text(f"note: {note}") for note in document["notes"]))
    output.say(f"page: {folder / PAGE_FILE}")
    output.emit(document)


def evaluation_table(document: dict[str, Any]) -> Table:
    """Show an evaluation: one line per rung."""
    headings = ("density", "NLL difference\n(95% CI)", "perplexity", "KL", "same\ntop token", "dropped\nmass")
    table = Table("rung", *headings, "prefill s")
    for rung in document["rungs"]:
        low, high = rung["nll_delta_ci"]
        table.add_row(
            rung["rung"],
            f"{rung['density']:.1%}",
            f"{rung['nll_delta']:+.4f}\n{low:+.4f} to {high:+.4f}",
            f"{rung['ppl_cost_pct']:+.2f}%",
            f"{rung['kl_mean']:.4f}",
            f"{rung['top1_agreement']:.1%}",
            f"{rung['dropped_mass_mean']:.3f}",
            f"{rung['prefill_s']:.2f}",
        )
    return table


def baseline_table(document: dict[str, Any]) -> Table:
    """Show other choices of blocks: one line per kind and rung, at the density of that rung."""
    headings = ("NLL difference (95% CI)", "worse than ours by (95% CI)", "KL", "KL above ours (95% CI)")
    table = Table("choice", "at rung", "density", *headings)
    for row in document["baselines"]:
        cost, gap, farther = row["nll_delta_ci"], row["worse_than_ours_ci"], row["kl_more_than_ours_ci"]
        table.add_row(
            row["kind"],
            row["rung"],
            f"{row['density']:.1%}",
            f"{row['nll_delta']:+.4f} ({cost[0]:+.4f} to {cost[1]:+.4f})",
            f"{row['worse_than_ours']:+.4f} ({gap[0]:+.4f} to {gap[1]:+.4f})",
            f"{row['kl_mean']:.4f}",
            f"{row['kl_more_than_ours']:+.4f} ({farther[0]:+.4f} to {farther[1]:+.4f})",
        )
    return table


def recall_table(document: dict[str, Any]) -> Table:
    """Show recall tasks: one line per kind and length, one column per rung, the worst beside the mean."""
    rungs = document["rungs"]
    names = [rung["rung"] for rung in rungs]
    table = Table("recall task", "tokens", "prompts", *names, title="Recall tasks, right answers")
    for i, cell in enumerate(rungs[0]["recall"]["cells"]):
        shares = [f"{rung['recall']['cells'][i]['right']:.0%}" for rung in rungs]
        table.add_row(cell["kind"], f"{cell['prompt_tokens']:,}", str(cell["num"]), *shares)
    table.add_section()
    table.add_row("mean", "", "", *(f"{rung['recall']['mean']:.0%}" for rung in rungs))
    table.add_row("worst against dense", "", "", *(_worst_recall(rung["recall"]["worst"]) for rung in rungs))
    lengths = [f"{rung['recall']['generated_tokens_mean']:.1f}" for rung in rungs]
    table.add_row("tokens generated", "", "", *lengths)
    if all("prompt_density" in rung["recall"] for rung in rungs):  # evaluations of before have none
        densities = [f"{rung['recall']['prompt_density']:.1%}" for rung in rungs]
        table.add_row("density of prompts", "", "", *densities)
    return table


def user_table(document: dict[str, Any]) -> Table:
    """Show the user's tasks: one line per task, one column per rung, with what changed against dense."""
    rungs = document["rungs"]
    table = Table("your task", "metric", "prompts", *(rung["rung"] for rung in rungs), title="Your tasks")
    for i, row in enumerate(rungs[0]["user_tasks"]["tasks"]):
        scores = [_user_score(rung["user_tasks"]["tasks"][i], rung["rung"]) for rung in rungs]
        table.add_row(escape(row["task"]), escape(", ".join(row["metrics"])), str(row["num"]), *scores)
    table.add_section()
    table.add_row("mean", "", "", *(f"{rung['user_tasks']['mean']:.1%}" for rung in rungs))
    table.add_row("worst against dense", "", "", *(_worst_user(rung["user_tasks"]) for rung in rungs))
    return table


def cost_table(document: dict[str, Any]) -> Table:
    """Show what a million prompt tokens cost on each machine, and when a rung has paid for itself."""
    rungs = [rung["rung"] for rung in document["rungs"]]
    table = Table("USD per million prompt tokens", *rungs, title="Cost, and when it has paid for itself")
    rows = document["costs"]["rows"]
    for label in dict.fromkeys((row["provider"], row["machine"]) for row in rows):
        own = [row for row in rows if (row["provider"], row["machine"]) == label]
        size = "" if own[0]["is_same_size"] else " (estimate)"
        table.add_row(escape(f"{label[0]}: {label[1]}{size}"), *(_cost(row) for row in own))
    return table


def _worst_recall(worst: dict[str, Any]) -> str:
    where = f"{worst['kind']} at {worst['prompt_tokens']:,}"
    return f"{where}\n{worst['right']:.0%}, dense {worst['dense_right']:.0%}"


def _worst_user(summary: dict[str, Any]) -> str:
    row = next(row for row in summary["tasks"] if row["task"] == summary["worst"])
    return escape(f"{row['task']}\n{row['score']:.0%}, dense {row['dense_score']:.0%}")


def _user_score(row: dict[str, Any], rung: str) -> str:
    if rung == "dense":
        return f"{row['score']:.1%}"
    return f"{row['score']:.1%}\n{row['worse']} worse\n{row['better']} better\n{row['density']:.0%} kept"


def _cost(row: dict[str, Any]) -> str:
    price = f"{row['usd_per_million_tokens']:.3g}"
    if row["rung"] == "dense":
        return price
    days = row["payback_days"]
    return f"{price} (never)" if days is None else f"{price} ({days:.2g} days)"
