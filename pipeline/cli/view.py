"""Pictures of a rollout for the terminal; they only show what the operations API says.

What people wrote, such as the reason of an order, is `Text`: in a plain string rich reads `[...]` as style.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

STYLES = {
    "safe": "green",
    "gain": "green",
    "no_gain": "bold yellow",
    "held": "bold yellow",
    "promoted": "bold green",
    "harm": "bold red",
    "rolled_back": "bold red",
    "replaced": "dim",
    "undecided": "yellow",
    "no_data": "dim",
    "stale": "magenta",
    "error": "magenta",
    "srm": "bold magenta",
}
BAR_CELLS = 24


def rollout_panel(found: dict[str, Any], footer: str = "") -> Panel:
    """Show one rollout: where it stands, who gets what, what the evidence says, and the last reason."""
    parts: list[Any] = [_headline(found), *_dates(found), routes_table(found), verdicts_table(found)]
    parts.append(Text(str(found.get("reason", "")), style="italic"))
    if found.get("waits_for"):
        why = str(found.get("waits_because") or "")
        parts.append(Text(f"waits for {found['waits_for']}{f': {why}' if why else ''}", style="yellow"))
    if footer:
        parts.append(Text(footer, style="dim"))
    return Panel(Group(*parts), title=Text(str(found.get("rollout_id", ""))), title_align="left")


def _headline(found: dict[str, Any]) -> Text:
    outcome = str(found.get("outcome") or found.get("phase", "running"))
    line = Text.assemble(
        (f" {outcome} ", STYLES.get(outcome, "bold")),
        f"  stage {found.get('stage_id', '?')}  rung {found.get('rung_id', '?')}",
    )
    if found.get("by"):
        line.append(f"  by {found['by']}", style="bold")
    return line


def _dates(found: dict[str, Any]) -> list[Text]:
    """When it began, when its stage did, when it ended, and who approved what."""
    named = (("started", "created_at_s"), ("stage since", "stage_entered_s"), ("ended", "ended_s"))
    dates = [f"{name} {_date(found[key])}" for name, key in named if found.get(key) is not None]
    by = (found.get("about") or {}).get("started_by")
    lines = [", ".join(dates) + (f"; started by {by}" if by else "")]
    for item in found.get("approvals", []):
        lines.append(f"{item['reason']} in stage {item['stage_id']}, {_date(item['at_s'])}")
    return [Text(line, style="dim") for line in lines if line]


def routes_table(found: dict[str, Any]) -> Table:
    """Show each slice's share of sparse traffic as a bar."""
    table = Table("slice", "prompt tokens", "sparse share", "", "rung", "audited", box=None, pad_edge=False)
    for route in found.get("routes", []):
        share = float(route["share"])
        filled = round(share * BAR_CELLS)
        bar = Text("█" * filled, style="cyan") + Text("░" * (BAR_CELLS - filled), style="dim")
        tokens = f"{route['min_tokens']} to {route['max_tokens'] - 1}"
        cells = (f"{share:.0%}", bar, Text(route["rung_id"]), f"{float(route['audit_share']):.0%}")
        table.add_row(Text(route["slice_id"]), tokens, *cells)
    return table


def verdicts_table(found: dict[str, Any]) -> Table:
    """Show each guardrail in each slice with its numbers."""
    table = Table(
        "guardrail", "slice", "verdict", "units", "what the evidence says", box=None, pad_edge=False
    )
    for item in found.get("verdicts", []):
        verdict = str(item["verdict"])
        table.add_row(
            Text(item["guardrail_id"]),
            Text(item["slice_id"]),
            Text(verdict, style=STYLES.get(verdict, "")),
            str(item.get("units", "")),
            Text(str(item.get("reason", ""))),
        )
    return table


def rollouts_table(found: list[dict[str, Any]]) -> Table:
    """List rollouts."""
    table = Table("rollout", "policy", "stage", "outcome", "by", "started")
    for item in found:
        outcome = str(item.get("outcome") or item.get("phase", ""))
        table.add_row(
            Text(item["rollout_id"]),
            Text(str(item.get("policy_name", ""))),
            Text(str(item.get("stage_id", ""))),
            Text(outcome, style=STYLES.get(outcome, "")),
            Text(str(item.get("by") or "")),
            _date(item.get("created_at_s")),
        )
    return table


def history_table(found: dict[str, Any]) -> Table:
    """List a rollout's decisions."""
    table = Table("seq", "at", "event", "stage", "reason")
    for event in found.get("events", []):
        words = (event["kind"], str(event.get("stage_id", "")), str(event.get("reason", "")))
        table.add_row(str(event["seq"]), _date(event.get("at_s")), *map(Text, words))
    return table


def _date(at_s: float | None) -> str:
    return f"{dt.datetime.fromtimestamp(at_s):%Y-%m-%d %H:%M:%S}" if at_s is not None else ""
