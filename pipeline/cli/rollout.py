"""`sentei rollout`: start, watch and steer a rollout of a running app over its operations API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.cli.policy_file import read_policy_file
from sentei.pipeline.cli.view import history_table, rollout_panel, rollouts_table
from sentei.pipeline.rollout.client import AdminClient

app = typer.Typer(no_args_is_help=True)

Url = Annotated[
    str | None, typer.Option("--url", help="Address of the app [default: $SENTEI_URL or loopback].")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RolloutId = Annotated[str | None, typer.Argument(help="The rollout; the newest if left out.")]
Reason = Annotated[str, typer.Option("--reason", help="Why: kept in the event log.")]

OUTCOMES = ("promoted", "rolled_back", "held", "replaced")


@app.command()
def start(
    policy: Annotated[Path, typer.Argument(help="A policy file (YAML, sentei/v1).")],
    release: Annotated[
        bool, typer.Option("--release-quarantine", help="Start a policy that was rolled back before.")
    ] = False,
    replaces: Annotated[
        bool, typer.Option("--replace", help="Follow a promoted rollout: its share of sparse ends at once.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Start a rollout."""
    output = Output(as_json=as_json)
    text = read_policy_file(policy)
    answer = AdminClient(url).start_rollout(text, str(policy), release_quarantine=release, replace=replaces)
    output.say(f"started [bold]{answer['rollout_id']}[/]: watch it with `sentei rollout watch`")
    output.emit(answer)


@app.command("list")
def list_all(url: Url = None, as_json: Json = False) -> None:
    """List all rollouts, newest first."""
    output = Output(as_json=as_json)
    found = AdminClient(url).rollouts()
    output.say(rollouts_table(found))
    output.emit({"rollouts": found})


@app.command()
def status(rollout_id: RolloutId = None, url: Url = None, as_json: Json = False) -> None:
    """Show stage, shares, verdicts and the last reason."""
    output = Output(as_json=as_json)
    client = AdminClient(url)
    found = client.rollout(_newest(client, rollout_id))
    output.say(rollout_panel(found))
    output.emit(found)


@app.command()
def watch(
    rollout_id: RolloutId = None,
    url: Url = None,
    every_s: Annotated[float, typer.Option(help="Seconds between looks.")] = 1.0,
) -> None:
    """Follow a rollout until it is promoted (exit code 0), rolled back, held or replaced (1)."""
    client = AdminClient(url)
    chosen = _newest(client, rollout_id)
    found: dict[str, Any] = client.rollout(chosen)
    with Live(rollout_panel(found), console=Output(as_json=False).console, refresh_per_second=4) as live:
        while found.get("outcome") not in OUTCOMES:
            time.sleep(every_s)
            found = client.rollout(chosen)
            live.update(rollout_panel(found))
    raise typer.Exit(ExitCode.OK if found["outcome"] == "promoted" else ExitCode.FAILED)


@app.command()
def history(
    rollout_id: RolloutId = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many, the newest ones.")] = 100,
    before: Annotated[int | None, typer.Option(help="Only those with a smaller seq.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show the decisions of a rollout with their reasons, a page at a time."""
    output = Output(as_json=as_json)
    client = AdminClient(url)
    found = client.events(_newest(client, rollout_id), before=before, limit=limit)
    output.say(history_table(found))
    if found["before"] is not None:
        output.say(f"there are older ones: --before {found['before']}")
    output.emit(found)


@app.command()
def edit(
    policy: Annotated[Path, typer.Argument(help="The edited policy file; only safer edits are taken.")],
    rollout_id: RolloutId = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Give a running rollout a safer policy; anything else needs a new rollout."""
    output = Output(as_json=as_json)
    client = AdminClient(url)
    chosen = _newest(client, rollout_id)
    text = read_policy_file(policy)
    answer = client.edit_policy(chosen, text, str(policy))
    output.say(f"edit sent to [bold]{chosen}[/], it acts at the next tick:")
    for change in answer["changes"]:
        output.say(Text(f"  {change}"))
    output.emit(answer)


def _command(kind: str, help_text: str) -> None:
    def send(
        rollout_id: RolloutId = None, reason: Reason = "", url: Url = None, as_json: Json = False
    ) -> None:
        output = Output(as_json=as_json)
        client = AdminClient(url)
        chosen = _newest(client, rollout_id)
        answer = client.command(chosen, kind, reason=reason)
        output.say(f"{kind} sent to [bold]{chosen}[/]: it acts {answer['acts']}")
        output.emit(answer)

    app.command(kind, help=help_text)(send)


_command("pause", "Hold the rollout where it is; protection goes on.")
_command("resume", "Go on after a pause.")
_command("promote", "Approve the advance that waits for an approval.")
_command("abort", "Send all traffic to dense at once.")
_command("retry", "Start again after a rollback, with fresh evidence.")


def _newest(client: AdminClient, rollout_id: str | None) -> str:
    if rollout_id is not None:
        return rollout_id
    found = client.rollouts()
    if not found:
        raise ValueError(f"{client.url} knows no rollout; start one with `sentei rollout start POLICY`")
    return str(found[0]["rollout_id"])
