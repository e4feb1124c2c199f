"""`sentei policy simulate`: what a policy does to thousands of rollouts whose truth is known."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.cli.policy_file import read_policy_file

if TYPE_CHECKING:
    from sentei.policies.schema.policy import Policy
    from sentei.policies.simulation.world import Effect, Scenario

EXAMPLES = Path(__file__).parents[2] / "policies" / "examples"
YARDSTICK = EXAMPLES / "yardstick.yaml"
REQUESTS = 20  # of a session whose requests agree by a given correlation
_EFFECT = re.compile(r"(?P<gate>[a-z][a-z0-9_-]*)=(?P<factor>\d+(\.\d+)?)(@(?P<place>[a-z][a-z0-9_-]*))?")


def run_simulate(
    policy: Annotated[
        Path | None, typer.Argument(help="A policy file; without one, the shipped yardstick policy.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only this scenario; may be given several times.")
    ] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="Simulated rollouts per scenario.")] = 2000,
    sessions: Annotated[
        int, typer.Option(min=1, help="Sessions per rollout, over all routed slices.")
    ] = 9000,
    sessions_per_hour: Annotated[float, typer.Option(min=1, help="Traffic of the routed slices.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same figures.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all cores.")] = None,
    approves: Annotated[bool, typer.Option(help="Whether an operator approves as soon as he may.")] = True,
    effect: Annotated[
        list[str] | None,
        typer.Option(
            help="A world of your own: GUARDRAIL=TIMES[@SLICE] its bound; may be given several times."
        ),
    ] = None,
    begins_at: Annotated[
        int, typer.Option(min=0, help="The effects begin after so many sessions of the slice (a regression).")
    ] = 0,
    grows_over: Annotated[
        int, typer.Option(min=0, help="They grow to their size over so many sessions (drift).")
    ] = 0,
    correlation: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="Of the requests inside a session.")
    ] = None,
    missing: Annotated[float, typer.Option(min=0, max=1, help="Share of audits never scored.")] = 0.0,
    outage: Annotated[str | None, typer.Option(help="Nothing arrives from, to: such as 30m-90m.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Simulate a policy: false rollback, false promotion, delay and exposure, beside threshold rules."""
    from sentei.pipeline.rollout.simulate import Simulation, simulate
    from sentei.policies.schema.load import load_policy
    from sentei.policies.simulation.scenarios import default_scenarios
    from sentei.policies.simulation.study import Traffic

    output = Output(as_json=as_json)
    text = read_policy_file(policy or YARDSTICK)
    loaded = load_policy(text, str(policy or YARDSTICK))
    own = own_scenario(
        effect or [],
        begins_at=begins_at,
        grows_over=grows_over,
        correlation=correlation,
        missing=missing,
        outage=outage,
    )
    chosen = _chosen(default_scenarios(loaded), scenario or [], own)
    wanted = Simulation(
        text,
        chosen,
        Traffic(sessions_per_hour, sessions),
        rollouts=rollouts,
        seed=seed,
        workers=workers or os.cpu_count() or 1,
        approves=approves,
    )
    with output.progress() as progress:
        rows = simulate(wanted, progress)
    for row in rows:
        row["stays_in"] = _stays_in(loaded, row)
    _tell(loaded, rows, seed, output)


def _tell(policy: Policy, rows: list[dict[str, Any]], seed: int, output: Output) -> None:
    """Show the figures; a policy that rolls back more often than it promises fails the command."""
    alpha = policy.spec.guardrails.alpha_total
    output.say(figures_table(policy.metadata.name, rows), *_notes(rows), rules_table(rows))
    output.say(*_stuck(rows))
    output.say(f"alpha_total {alpha:g}; intervals are exact (Clopper-Pearson), 95 %; seed {seed}")
    output.emit(rows)
    if any(row["false_rollback_ci"][0] > alpha for row in rows):
        raise typer.Exit(ExitCode.FAILED)


def _chosen(known: tuple[Scenario, ...], names: list[str], own: Scenario | None) -> tuple[Scenario, ...]:
    """The named scenarios and one's own; all that are known if neither was asked for."""
    if not names:
        return known if own is None else (own,)
    by_name = {item.name: item for item in known}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f'no scenario "{unknown[0]}"; there are: {", ".join(by_name)}')
    return (*(by_name[name] for name in names), *([] if own is None else [own]))


def figures_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One line per scenario; whole at 100 columns, and folded, never cut, in less."""
    table = _open_table(f"policy {name}, {rows[0]['rollouts']} rollouts each")
    for column in ("scenario", "false rollback %", "false promotion %"):
        table.add_column(column, overflow="fold")
    for column in ("units", "exposed", "promoted", "s"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        delay = row["units_to_rollback_p50"]  # median; None: most were never caught
        table.add_row(
            row["scenario"],
            _share(row["false_rollback"], row["false_rollback_ci"]),
            _share(row["false_promotion"], row["false_promotion_ci"]),
            "" if row["caught"] is None else str(delay or "never"),
            f"{row['exposure_share']:.1%}",
            f"{row['promoted']:.1%}",
            f"{row['seconds']:.1f}",
        )
    return table


def _open_table(title: str) -> Table:
    """A table without vertical lines, which would take the room of figures."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _notes(rows: list[dict[str, Any]]) -> list[Text]:
    return [Text.assemble((row["scenario"], "bold"), f": {row['about']}") for row in rows]


def _stays_in(policy: Policy, row: dict[str, Any]) -> str | None:
    """The first stage, where it sends nothing to sparse and no rollout of the scenario ever did."""
    first = policy.spec.stages[0]
    is_stuck = row["exposure_share"] == 0 and row["undecided"] > 0
    return first.id if first.share == 0 and is_stuck else None


def _stuck(rows: list[dict[str, Any]]) -> list[Text]:
    """What a column of zeros does not say: nothing was routed, or hardly anything had ended."""
    stuck = [row for row in rows if row["stays_in"] is not None]
    told = []
    if stuck:
        names = ", ".join(row["scenario"] for row in stuck)
        told.append(
            f"no rollout ever left stage {stuck[0]['stays_in']} in: {names}. These figures say nothing about "
            "the stages after it: give more --sessions"
        )
    open_ = [row for row in rows if row["undecided"] > 0.5 and row not in stuck]
    if open_:
        names = ", ".join(f"{row['scenario']} ({row['undecided']:.0%})" for row in open_)
        told.append(
            f"most rollouts had no end yet in: {names}. What is not promoted yet is not promoted wrongly: "
            "give more --sessions before reading a false promotion off these"
        )
    return [Text(text, style="bold yellow") for text in told]


def rules_table(rows: list[dict[str, Any]]) -> Table:
    """The policy and each threshold rule, one under the other; as wide as `figures_table`."""
    table = _open_table("the same sessions under threshold rules")
    for column in ("scenario", "rule", "false rollback %", "false promotion %", "not caught"):
        table.add_column(column, overflow="fold")
    for row in rows:
        own = {
            "rule": "this policy",
            "missed": None if row["caught"] is None else 1 - row["caught"],
            **{name: row[name] for name in row if name.startswith("false_")},
        }
        for index, rule in enumerate((own, *row["thresholds"])):
            table.add_row(
                row["scenario"] if index == 0 else "",
                str(rule["rule"]),
                _share(rule["false_rollback"], rule["false_rollback_ci"]),
                _share(rule["false_promotion"], rule["false_promotion_ci"]),
                "" if rule["missed"] is None else f"{rule['missed']:.1%}",
                end_section=index == len(row["thresholds"]),
            )
    return table


def _share(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * value:.1f} [dim]({100 * low:.1f}-{100 * high:.1f})[/]"


def own_scenario(
    effects: list[str],
    *,
    begins_at: int = 0,
    grows_over: int = 0,
    correlation: float | None = None,
    missing: float = 0.0,
    outage: str | None = None,
) -> Scenario | None:
    """The scenario "own" of those options, or None if nothing was asked for; ValueError names a bad one."""
    from sentei.policies.simulation.world import Scenario

    found = tuple(_effect(text, begins_at, grows_over) for text in effects)
    if not found and (begins_at or grows_over):
        raise ValueError("--begins-at and --grows-over belong to an --effect, such as --effect agree=2")
    if not found and correlation is None and not missing and outage is None:
        return None
    said = {
        f"from session {begins_at} of the slice on": begins_at,
        f"growing over {grows_over} sessions": grows_over,
        f"requests of a session correlated by {correlation}": correlation,
        f"a share of {missing:g} of the audits never scored": missing,
        f"nothing arrives from {outage}": outage,
    }
    own = Scenario(
        "own",
        "; ".join([", ".join(effects)] * bool(effects) + [words for words, given in said.items() if given]),
        found,
        missing=missing,
        silence=None if outage is None else _hours(outage),
    )
    if correlation is None:
        return own
    # The correlation inside a session is 1 / (1 + concentration) of its Beta distribution.
    return replace(own, concentration=1 / correlation - 1, requests=REQUESTS)


def _effect(text: str, begins_at: int, grows_over: int) -> Effect:
    from sentei.policies.simulation.world import Effect

    match = _EFFECT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--effect looks like agree=2 or agree=1.25@long (guardrail, times, slice), not {text!r}"
        )
    factor = float(match["factor"])
    return Effect(match["gate"], factor, match["place"], begins_at=begins_at, grows_over=grows_over)


def _hours(text: str) -> tuple[float, float]:
    from sentei.policies.schema.units import format_duration, parse_duration

    parts = text.split("-")
    if len(parts) != 2:
        raise ValueError(f"--outage looks like 30m-90m (from, to), not {text!r}")
    begin_s, end_s = (parse_duration(part) for part in parts)
    if begin_s >= end_s:
        raise ValueError(
            f"--outage must end after it begins, not {format_duration(begin_s)} to {format_duration(end_s)}"
        )
    return begin_s / 3600, end_s / 3600
