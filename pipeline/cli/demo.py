"""`sentei demo`: the main job once, shown live."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sentei.pipeline.cli.evaluation import evaluation_table, recall_table
from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.offline import DeviceName, open_bench
from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.cli.view import STYLES, rollout_panel
from sentei.pipeline.home import HOME_VARIABLE, Home, sentei_home

ENGINES = ("builtin", "vllm")


@needs("serve", "train")
def run_demo(
    model: Annotated[
        str, typer.Option("--model", help="pocket, gemma-3-270m, smollm2-135m, a folder or a hub id.")
    ] = "pocket",
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep the adapter made before.")] = False,
    engine: Annotated[str, typer.Option(help="builtin, or vllm (an extra).")] = "builtin",
    seed: Annotated[int, typer.Option(help="Seed of the traffic.")] = 0,
    device: DeviceName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Distil, calibrate, evaluate, serve; one rollout promoted, one rolled back."""
    from sentei.kernels.placement import place, read_hardware
    from sentei.pipeline.demo.demo import DemoResult, is_as_expected, prepare, run_stories
    from sentei.pipeline.demo.sizes import demo_size
    from sentei.pipeline.steps import read_evaluation

    output = Output(as_json=as_json)
    started = time.monotonic()
    if engine not in ENGINES:
        raise typer.BadParameter(f"{engine}; choose from {', '.join(ENGINES)}", param_hint="--engine")
    if engine == "vllm":
        if device == "cuda":
            raise typer.BadParameter("vllm thins on CPUs only (docs/adr/0015)", param_hint="--device")
        device = "cpu"
    size = replace(demo_size(model), engine=engine)
    # What is to be shown is speed: the pocket model, too, runs in what this machine multiplies fastest.
    placement = place(read_hardware(), device)
    bench = open_bench(model, None, output, placement.dtype_name, device)
    if not (reuse and read_evaluation(bench) is not None):
        with output.progress() as progress:
            prepare(bench, size, progress)
    evaluation = read_evaluation(bench)
    if evaluation is not None:
        output.say(evaluation_table(evaluation), recall_table(evaluation))
    with _Screen(output) as screen:
        ends = run_stories(bench, size, seed=seed, watch=screen.show)
    result = DemoResult(
        model=model,
        rollouts=ends,
        evaluation=evaluation,
        mlflow_uri=bench.home.mlflow_uri,
        report=ends[0].report,
        seconds=time.monotonic() - started,
    )
    output.say(_summary(result), *_addresses(result, bench.home))
    output.emit(result.to_dict())
    if not is_as_expected(ends):
        raise typer.Exit(ExitCode.FAILED)


class _Screen:
    """The live picture; one panel per rollout, the last state of each stays on the screen."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._live: Live | None = None
        self._name = ""
        self._status = output.errors.status("starting Ray, dense and sparse replicas, the controller")

    def __enter__(self) -> _Screen:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        if self._live is not None:
            self._live.stop()

    def show(self, story: Any, found: Mapping[str, Any], totals: Any) -> None:
        """Draw the newest state of a rollout."""
        self._status.stop()
        if self._live is None or self._name != story.name:
            if self._live is not None:
                self._live.stop()
            self._output.say(Text(f"\n{story.title}", style="bold"))
            self._live = Live(console=self._output.console, refresh_per_second=2)
            self._live.start()
            self._name = story.name
        self._live.update(rollout_panel(dict(found), _footer(totals)))


def _footer(totals: Any) -> str:
    served = ", ".join(f"{count} by {variant}" for variant, count in sorted(totals.by_variant.items()))
    recall = f", {totals.answered_right} of {totals.asked} questions right" if totals.asked else ""
    failed = f", {totals.failed} failed ({totals.last_error})" if totals.failed else ", none failed"
    return f"requests: {served or 'none yet'}{failed}{recall}"


def _summary(result: Any) -> Table:
    table = Table(
        *(
            "rollout",
            "outcome",
            "by",
            "seconds",
            "rung",
            "model time",
            "gain",
            "requests",
            "failed",
            "recall",
        ),
        title="What happened",
    )
    for end in result.rollouts:
        recall = f"{end.recall_pct:.0f}%" if end.recall_pct is not None else ""
        outcome = Text(end.outcome, style=STYLES.get(end.outcome, ""))
        took = end.measured
        ratio = "" if took.model_time_ratio is None else f"{took.model_time_ratio:.2f} of dense"
        paid = (took.rung, ratio, "proven" if took.gain_proven else "not proven")
        numbers = (f"{end.seconds:.0f}", *paid, str(end.answered), str(end.failed), recall)
        table.add_row(end.name, outcome, end.by, *numbers)
    return table


def _addresses(result: Any, home: Home) -> list[str]:
    reports = [f"report of {end.name}: {Path(end.report)}" for end in result.rollouts]
    prefix = f"{HOME_VARIABLE}={home.root} " if home != sentei_home() else ""
    ui = f"{prefix}mlflow ui --backend-store-uri {result.mlflow_uri}"
    return [*reports, f"MLflow: {result.mlflow_uri} (open it with: {ui})", f"{result.seconds:.0f} s in all"]
