"""Assembles the commands and turns known errors into messages and exit codes."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import typer

from sentei import __version__
from sentei.errors import SenteiError
from sentei.pipeline.cli import (
    bench,
    demo,
    doctor,
    evaluation,
    explain,
    offline,
    policy,
    report,
    rollout,
    store,
    study,
)
from sentei.pipeline.cli.output import ExitCode, Output

app = typer.Typer(
    name="sentei",
    help="Making sparse attention safe to ship: retrofit, calibrate, serve, roll out, watch, fall back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"sentei {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    del version


app.command("demo")(demo.run_demo)
app.command("distill")(offline.run_distill)
app.command("calibrate")(offline.run_calibrate)
app.command("evaluate")(evaluation.run_evaluate)
app.command("study")(study.run_study)
app.command("explain")(explain.run_explain)
app.command("register")(offline.run_register)
app.command("seal")(offline.run_seal)
app.command("report")(report.run_report)
app.command("doctor")(doctor.run_doctor)
app.add_typer(bench.app, name="bench", help="Measure speed as ratios.")
app.add_typer(policy.app, name="policy", help="Check and explain policy files.")
app.add_typer(rollout.app, name="rollout", help="Start, watch and steer rollouts of a running app.")
app.add_typer(
    store.app, name="store", help="Upgrade, check, copy and prune the database of records and decisions."
)


def run() -> None:
    """Run the command line; a known error becomes one readable line and an exit code, never a traceback."""
    output = Output(as_json=False)
    try:
        app()
    except KeyboardInterrupt:
        output.fail("interrupted; what was finished is kept")
        sys.exit(ExitCode.INTERRUPTED)
    except SenteiError as error:
        output.fail(str(error) or type(error).__name__)
        sys.exit(ExitCode.UNREACHABLE if error.is_absent else ExitCode.BAD_INPUT)
    except (ValueError, OSError) as error:
        output.fail(str(error) or type(error).__name__)
        sys.exit(ExitCode.BAD_INPUT)
