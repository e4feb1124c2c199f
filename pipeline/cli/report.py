"""`sentei report`: the comparison report of a rollout, as a page and as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sentei.pipeline.cli.output import Output
from sentei.pipeline.home import sentei_home


def run_report(
    rollout_id: Annotated[str | None, typer.Argument(help="The rollout; the newest if left out.")] = None,
    store: Annotated[str | None, typer.Option(help="SQLAlchemy URL [default: home's SQLite].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write what a rollout saved, what it cost in quality, and whether it was safe."""
    from sentei.monitors.store import Store
    from sentei.pipeline.reports.rollout_report import build_report, render_json, save_report

    output = Output(as_json=as_json)
    home = sentei_home()
    opened = Store.open(store or home.store_url, must_exist=True)
    rollouts = opened.read_rollouts()
    if rollout_id is None and not rollouts:
        raise ValueError(f"store {opened.url} has no rollout; start one with `sentei rollout start POLICY`")
    chosen = rollout_id or rollouts[-1].rollout_id
    report = build_report(opened, chosen)
    html, _ = save_report(report, home.reports / chosen)
    if report.pruned_before_s is not None:
        output.say("[yellow]some records of this rollout were pruned: the figures cover what is left[/]")
    output.say(f"report of [bold]{chosen}[/]: {html}")
    output.emit({"rollout_id": chosen, "html": str(html), "report": json.loads(render_json(report))})
