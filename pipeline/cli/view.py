"""Pictures of a rollout for the terminal; they only show what the operations API says."""

from __future__ import annotations

import datetime as dt
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

STYLES = {
    "safe": "green",
    "promoted": "bold green",
    "harm": "bold red",
    "rolled_back": "bold red",
    "undecided": "yellow",
    "no_data": "dim",
    "stale": "magenta",
    "error": "magenta",
    "srm": "bold magenta",
}
BAR_CELLS = 24


def rollout_panel(found: dict[str, Any], footer: str = "") -> Panel:
    """Show one rollout: where it stands, who gets what, what the evidence says, and the last reason."""
    parts: list[Any] = [_headline(found), routes_table(found), verdicts_table(found)]
    parts.append(Text(str(found.get("reason", "")), style="italic"))
    if footer:
        parts.append(Text(footer, style="dim"))
    return Panel(Group(*parts), title=str(found.get("rollout_id", "")), title_align="left")


def _headline(found: dict[str, Any]) -> Text:
    outcome = str(found.get("outcome") or found.get("phase", "running"))
    line = Text.assemble(
        (f" {outcome} ", STYLES.get(outcome, "bold")),
        f"  stage {found.get('stage_id', '?')}  rung {found.get('rung_id', '?')}",
    )
    if found.get("by"):
        line.append(f"  by {found['by']}", style="bold")
    return line


def routes_table(found: dict[str, Any]) -> Table:
    """Show each slice's share of sparse traffic as a bar."""
    table = Table("slice", "prompt tokens", "sparse share", "", "rung", "audited", box=None, pad_edge=False)
    for route in found.get("routes", []):
        share = float(route["share"])
        filled = round(share * BAR_CELLS)
        bar = Text("█" * filled, style="cyan") + Text("░" * (BAR_CELLS - filled), style="dim")
        tokens = f"{route['min_tokens']} to {route['max_tokens'] - 1}"
        cells = (f"{share:.0%}", bar, route["rung_id"], f"{float(route['audit_share']):.0%}")
        table.add_row(route["slice_id"], tokens, *cells)
    return table


def verdicts_table(found: dict[str, Any]) -> Table:
    """Show each guardrail in each slice with its numbers."""
    table = Table(
        "guardrail", "slice", "verdict", "units", "what the evidence says", box=None, pad_edge=False
    )
    for item in found.get("verdicts", []):
        verdict = str(item["verdict"])
        table.add_row(
            item["guardrail_id"],
            item["slice_id"],
            Text(verdict, style=STYLES.get(verdict, "")),
            str(item.get("units", "")),
            str(item.get("reason", "")),
        )
    return table


def rollouts_table(found: list[dict[str, Any]]) -> Table:
    """List rollouts."""
    table = Table("rollout", "policy", "stage", "outcome", "by", "started")
    for item in found:
        outcome = str(item.get("outcome") or item.get("phase", ""))
        table.add_row(
            item["rollout_id"],
            str(item.get("policy_name", "")),
            str(item.get("stage_id", "")),
            Text(outcome, style=STYLES.get(outcome, "")),
            str(item.get("by") or ""),
            _clock(item.get("created_at_s")),
        )
    return table


def history_table(found: dict[str, Any]) -> Table:
    """List a rollout's decisions."""
    table = Table("seq", "at", "event", "stage", "reason")
    for event in found.get("events", []):
        stage = str(event.get("stage_id", ""))
        table.add_row(
            str(event["seq"]), _clock(event.get("at_s")), event["kind"], stage, str(event.get("reason", ""))
        )
    return table


def _clock(at_s: float | None) -> str:
    return dt.datetime.fromtimestamp(at_s).strftime("%H:%M:%S") if at_s is not None else ""
