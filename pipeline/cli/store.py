"""`sentei store`: upgrade, check, copy and prune the database of records and decisions."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.home import sentei_home

app = typer.Typer(no_args_is_help=True)

Url = Annotated[str | None, typer.Option("--store", help="SQLAlchemy URL [default: home's SQLite].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def upgrade(
    store: Url = None,
    copy: Annotated[bool, typer.Option(help="Copy a SQLite file first, beside it.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Though the lease of a controller has not run out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a store of an older version to this one's tables, all of it or nothing; stop the app first."""
    from sentei.monitors.upkeep.upgrade import upgrade_store

    output = Output(as_json=as_json)
    done = upgrade_store(store or sentei_home().store_url, keeps_copy=copy, is_forced=force)
    if done.before == done.after:
        output.say(f"{done.url} is of revision {done.after} already; its {done.events} events are whole")
    else:
        output.say(f"{done.url}: revision {done.before} to {done.after}; its {done.events} events are whole")
    if done.backup is not None:
        output.say(f"as it was before: {done.backup}")
    output.emit({"store": done.url, **asdict(done)})


@app.command()
def check(store: Url = None, as_json: Json = False) -> None:
    """Check revision, tables, the database and the whole event log; nothing is changed."""
    from sentei.monitors.store import Store
    from sentei.monitors.upkeep.check import check_store

    output = Output(as_json=as_json)
    with Store.connect(store or sentei_home().store_url) as opened:
        findings = check_store(opened)
    table = Table("check", "", "found", "way out", title=escape(opened.url), title_justify="left")
    for finding in findings:
        mark = "[green]ok[/]" if finding.is_ok else "[red]no[/]"
        table.add_row(finding.name, mark, escape(finding.found), escape(finding.way_out))
    is_ok = all(finding.is_ok for finding in findings)
    output.say(table)
    output.emit({"store": opened.url, "ok": is_ok, "checks": [asdict(finding) for finding in findings]})
    if not is_ok:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def backup(
    target: Annotated[
        Path | None, typer.Argument(help="The new file [default: below home's backups/, by date].")
    ] = None,
    store: Url = None,
    as_json: Json = False,
) -> None:
    """Copy a store while others write to it: a file by SQLite's backup, a server's database by pg_dump."""
    from sentei.monitors.upkeep.backup import back_up

    output = Output(as_json=as_json)
    home, url = sentei_home(), store or sentei_home().store_url
    began_s = time.monotonic()
    written = back_up(url, target or home.root / "backups" / _file_name(url))
    size, seconds = written.stat().st_size, time.monotonic() - began_s
    output.say(f"{written}: {size / 2**20:.1f} MiB in {seconds:.1f} s")
    output.emit({"backup": str(written), "bytes": size, "seconds": seconds})


def _file_name(url: str) -> str:
    kind = "db" if url.startswith("sqlite") else "dump"
    return f"state-{time.strftime('%Y%m%d-%H%M%S')}.{kind}"


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="Such as 30d: only records of before.")],
    store: Url = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old requests, audits, arrivals and samples of rollouts that are over; never an event."""
    from sentei.monitors.store import Store
    from sentei.monitors.upkeep.prune import prune_store
    from sentei.policies.schema.units import parse_duration

    output = Output(as_json=as_json)
    before_s = time.time() - parse_duration(older_than)
    with Store.open(store or sentei_home().store_url, must_exist=True) as opened:
        lines = prune_store(opened, before_s=before_s, is_dry=dry_run)
    going = [line for line in lines if line.is_over and line.rows]
    staying = [line for line in lines if not line.is_over]
    table = Table("rollout", "requests", "audits", "arrivals", "attention", "metrics", title_justify="left")
    table.title = f"older than {older_than}: {'would be deleted' if dry_run else 'deleted'}"
    for line in going:
        counts = (line.requests, line.audits, line.arrivals, line.attention, line.metrics)
        table.add_row(line.rollout_id, *(f"{number:,}" for number in counts))
    output.say(table if going else f"nothing is older than {older_than} of a rollout that is over")
    for line in staying:
        output.say(f"{line.rollout_id} is the newest: all its records stay ({line.requests:,} old requests)")
    output.emit(_pruned(opened.url, before_s, lines, is_dry=dry_run))


def _pruned(url: str, before_s: float, lines: Any, *, is_dry: bool) -> dict[str, Any]:
    return {
        "store": url,
        "before_s": before_s,
        "dry_run": is_dry,
        "rollouts": [asdict(line) | {"rows": line.rows if line.is_over else 0} for line in lines],
    }
