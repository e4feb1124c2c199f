"""`sentei policy`: check a policy file, or export the schema for an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.cli.simulate import run_simulate
from sentei.policies.load import PolicyError, load_policy, policy_json_schema

app = typer.Typer(no_args_is_help=True)
app.command("simulate")(run_simulate)


@app.command()
def lint(
    policy: Annotated[Path, typer.Argument(help="A policy file (YAML, sentei/v1).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check a policy file: every error in one run, with line, path, value and what is allowed."""
    output = Output(as_json=as_json)
    try:
        loaded = load_policy(policy.read_text(encoding="utf-8"), source=str(policy))
    except PolicyError as error:
        output.say(_errors_table(error))
        output.emit({"ok": False, "errors": [vars_of(item) for item in error.errors], "warnings": []})
        raise typer.Exit(ExitCode.BAD_INPUT) from error
    stages = loaded.spec.stages
    output.say(f"[green]ok[/] {policy}: {loaded.metadata.name}, {len(stages)} stages")
    output.emit({"ok": True, "errors": [], "warnings": []})


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    typer.echo(json.dumps(policy_json_schema(), indent=2))


def vars_of(item: object) -> dict[str, object]:
    """Return the public fields of one policy error."""
    names = ("file", "line", "path", "value", "message")
    return {name: getattr(item, name) for name in names}


def _errors_table(error: PolicyError) -> Table:
    table = Table(
        "line", "path", "value", "what is wrong", title=f"{len(error.errors)} error(s)", title_style="red"
    )
    for item in error.errors:
        table.add_row(str(item.line), item.path, repr(item.value)[:60], item.message)
    return table
