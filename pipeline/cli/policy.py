"""`sentei policy`: check, explain, simulate and replay a policy file, or export its schema for an editor."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.cli.policy_file import check_coverage, read_policy_file
from sentei.pipeline.cli.simulate import run_simulate

if TYPE_CHECKING:
    from sentei.policies.review.advice import Advice
    from sentei.policies.review.forecast import StageForecast
    from sentei.policies.schema.load import PolicyError
    from sentei.policies.schema.policy import Policy

app = typer.Typer(no_args_is_help=True)
app.command("simulate")(run_simulate)

PolicyFile = Annotated[Path, typer.Argument(help="A policy file (YAML, sentei/v1).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Rate = Annotated[
    float | None, typer.Option(min=0.001, help="Expected sessions per hour of all routed slices together.")
]
Mix = Annotated[
    str | None,
    typer.Option(help="How they fall on the routed slices, such as mid=0.7,long=0.3; else evenly."),
]


@app.command()
def lint(
    policy: PolicyFile,
    sessions_per_hour: Rate = None,
    mix: Mix = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="An adapter's folder: refuse slices past what its ladder was verified at."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a policy file: every error in one run; else its duration, needs, and what can never happen."""
    from sentei.policies.review.advice import find_advice, readable, said
    from sentei.policies.review.forecast import Expected, best_s, forecast, worst_s
    from sentei.policies.schema.load import PolicyError, load_policy

    output = Output(as_json=as_json)
    text = read_policy_file(policy)
    try:
        loaded = load_policy(text, source=str(policy))
        if adapter is not None:
            check_coverage(loaded, text, str(policy), adapter)
    except PolicyError as error:
        output.say(errors_table(error))
        errors = [vars_of(item) for item in error.errors]
        output.emit(
            {"ok": False, "errors": errors, "warnings": [], "duration_best": None, "duration_worst": None}
        )
        raise typer.Exit(ExitCode.BAD_INPUT) from error
    expected = Expected(sessions_per_hour, _mix(loaded, mix))
    stages, advice = forecast(loaded, expected), find_advice(loaded, expected)
    best, worst = best_s(stages), worst_s(stages)
    can_end = best != float("inf")
    output.say(_verdict(can_end, len(advice)) + f" {policy}: {loaded.metadata.name}, {len(stages)} stages")
    output.say(_stages_table(stages))
    for remark in advice:
        output.say(Text(f"warning: {said(remark)}", style="yellow"))
    output.say(f"at best {readable(best)}, at worst {'without end' if worst is None else readable(worst)}")
    if sessions_per_hour is None:
        output.say("the time for evidence is not in it: give --sessions-per-hour")
    output.emit(
        {
            "ok": True,
            "errors": [],
            "warnings": [_warning(remark, text, str(policy)) for remark in advice],
            "duration_best": _duration(best),
            "duration_worst": "unbounded" if worst is None else _duration(worst),
            "can_end": can_end,
            "stages": [_stage(stage) for stage in stages],
        }
    )
    if not can_end:
        raise typer.Exit(ExitCode.FAILED)


def _verdict(can_end: bool, num_warnings: int) -> Text:
    """Green only where nothing is to be said."""
    if not can_end:
        return Text("can never end", style="bold red")
    return (
        Text(f"ok, {num_warnings} warning(s)", style="yellow") if num_warnings else Text("ok", style="green")
    )


@app.command()
def explain(
    policy: PolicyFile,
    sessions_per_hour: Rate = None,
    mix: Mix = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page [default: beside, NAME.html].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say in sentences what a policy does, and draw its stages over time on a page."""
    from sentei.pipeline.reports.policy_page import save_explanation
    from sentei.policies.review.forecast import Expected, forecast
    from sentei.policies.review.sentences import explain as explained
    from sentei.policies.schema.load import load_policy

    output = Output(as_json=as_json)
    loaded = load_policy(read_policy_file(policy), source=str(policy))
    expected = Expected(sessions_per_hour, _mix(loaded, mix))
    stages = forecast(loaded, expected)
    sentences = explained(loaded, stages)
    page = save_explanation(loaded, expected, out or Path(f"{loaded.metadata.name}.html"))
    for sentence in sentences:
        output.say(Text(f"- {sentence}"))
    output.say(f"picture: {page}")
    output.emit(
        {
            "policy": loaded.metadata.name,
            "digest": loaded.digest,
            "sentences": list(sentences),
            "stages": [_stage(stage) for stage in stages],
            "html": str(page),
        }
    )


@app.command("replay")
def replay_rollout(
    policy: PolicyFile,
    rollout_id: Annotated[str | None, typer.Argument(help="A recorded rollout; else the newest.")] = None,
    store: Annotated[str | None, typer.Option(help="SQLAlchemy URL [default: home's SQLite].")] = None,
    as_json: AsJson = False,
) -> None:
    """Decide a recorded rollout again by any policy, and show where the decisions part."""
    from sentei.monitors.store import Store
    from sentei.pipeline.home import sentei_home
    from sentei.pipeline.rollout.replay import replay, to_difference
    from sentei.policies.schema.load import load_policy

    output = Output(as_json=as_json)
    loaded = load_policy(read_policy_file(policy), source=str(policy))
    with Store.open(store or sentei_home().store_url, must_exist=True) as opened:
        rollouts = opened.read_rollouts()
        if rollout_id is None and not rollouts:
            raise ValueError(f"store {opened.url} has no rollout to replay")
        found = to_difference(replay(opened, rollout_id or rollouts[-1].rollout_id, loaded))
    output.say(_difference_table(found))
    index = found["first_difference"]
    output.say("no decision differs" if index is None else f"the decisions part at decision {index + 1}")
    output.emit(found)


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from sentei.policies.schema.load import policy_json_schema

    typer.echo(json.dumps(policy_json_schema(), indent=2))


def vars_of(item: object) -> dict[str, object]:
    """Return the public fields of one policy error."""
    names = ("file", "line", "path", "value", "message")
    return {name: getattr(item, name) for name in names}


def _mix(policy: Policy, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    names = [item.id for item in policy.routed_slices]
    try:
        given = {
            name.strip(): float(number) for name, number in (part.split("=") for part in text.split(","))
        }
    except ValueError:
        raise ValueError(f'--mix looks like "{names[0]}=0.7,...", not {text!r}') from None
    if set(given) != set(names):
        raise ValueError(f"--mix must name exactly the routed slices: {', '.join(names)}")
    return tuple(given[name] for name in names)


def _duration(seconds: float) -> str | None:
    from sentei.policies.schema.units import format_duration

    return None if seconds == float("inf") else format_duration(seconds)


def _stage(stage: StageForecast) -> dict[str, Any]:
    return {
        "stage": stage.stage_id,
        "share": stage.share,
        "rung": stage.rung,
        "audit": stage.audit,
        "best": _duration(stage.best_s),
        "worst": "unbounded" if stage.worst_s is None else _duration(stage.worst_s),
        "needs": [asdict(need) for need in stage.needs],
    }


def _warning(remark: Advice, text: str, file: str) -> dict[str, object]:
    from sentei.policies.schema.load import find_line
    from sentei.policies.schema.rules import dotted_path

    path = ("spec", *remark.path)
    return {
        "file": file,
        "line": find_line(text, path),
        "path": dotted_path(path),
        "value": remark.value,
        "message": remark.message,
    }


def _stages_table(stages: tuple[StageForecast, ...]) -> Table:
    from sentei.policies.review.advice import readable

    table = Table()
    for name in ("stage", "share", "rung", "audited", "slice", "audits", "served", "sessions", "at best"):
        table.add_column(name, overflow="fold")
    for stage in stages:
        for index, need in enumerate(stage.needs):
            head = (
                (stage.stage_id, f"{stage.share:.0%}", stage.rung, f"{stage.audit:.0%}")
                if index == 0
                else ("",) * 4
            )
            sessions = "never enough" if need.sessions is None else str(need.sessions)
            best = readable(stage.best_s) if index == 0 else ""
            table.add_row(*head, need.slice_id, str(need.audits), str(need.served), sessions, best)
    return table


def _difference_table(found: dict[str, Any]) -> Table:
    old, new = found["recorded"], found["replayed"]
    table = Table("", f"recorded: {old['outcome']}", f"replayed: {new['outcome']}", title=found["rollout_id"])
    for index in range(max(len(old["decisions"]), len(new["decisions"]))):
        cells = [
            Text(_decision(side["decisions"][index]) if index < len(side["decisions"]) else "")
            for side in (old, new)
        ]
        differs = found["first_difference"] is not None and index >= found["first_difference"]
        table.add_row(str(index + 1), *cells, style="yellow" if differs else "")
    return table


def _decision(step: dict[str, Any]) -> str:
    clock = dt.datetime.fromtimestamp(step["at_s"]).strftime("%H:%M:%S")
    return f"{clock} {step['kind']} in {step['stage_id']}: {step['reason']}"


def errors_table(error: PolicyError) -> Table:
    """Every fault of a policy file; a narrow terminal folds what it cannot hold."""
    table = Table(title=f"{len(error.errors)} error(s)", title_style="red")
    for name in ("line", "path", "value", "what is wrong"):
        table.add_column(name, overflow="fold")  # a path is one long word: folded, never cut
    for item in error.errors:
        table.add_row(str(item.line), *map(Text, (item.path, repr(item.value)[:60], item.message)))
    return table
