"""Backups of a store that is being written to, and the commands that look after one."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from sentei.monitors.database import BUSY_TIMEOUT_MS
from sentei.monitors.errors import StoreError
from sentei.monitors.events import EventLog
from sentei.monitors.migrations.revision import HEAD
from sentei.monitors.store import Store
from sentei.monitors.upkeep import backup
from sentei.monitors.upkeep.backup import back_up, find_pg_dump
from sentei.monitors.upkeep.check import check_store
from sentei.monitors.upkeep.upgrade import upgrade_store
from sentei.pipeline.cli.app import app
from sentei.pipeline.cli.output import ExitCode
from tests.fakes_records import ROLLOUT
from tests.old_store import NUM_EVENTS, build_old_store
from tests.postgres_server import PostgresServer, find_binary

ROOT = Path(__file__).resolve().parents[2]
COPIES = 5


def test_a_backup_is_one_moment_of_a_busy_store(tmp_path: Path) -> None:
    """Each copy holds every request up to some number with its audit and event, and its chain is whole."""
    url = f"sqlite:///{tmp_path}/state.db"
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.busy_writer", url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    held = []
    try:
        assert writer.stdout.readline() == "writing\n"
        for number in range(COPIES):
            copy = back_up(url, tmp_path / "copies" / f"{number}.db")
            held.append(inspect(f"sqlite:///{copy}"))
            time.sleep(0.2)
    finally:
        told, _ = writer.communicate(timeout=60)
    written = json.loads(told)

    assert held == sorted(held)
    assert 0 < held[0] < held[-1] <= written["rounds"]
    assert written["longest_s"] < BUSY_TIMEOUT_MS / 1000  # no write waited as long as it would for a lock
    assert {path.stem for path in (tmp_path / "copies").glob("*.db")} == {str(i) for i in range(COPIES)}
    assert list((tmp_path / "copies").glob("*.part*")) == []


def inspect(url: str) -> int:
    """Check a copy, and return how many requests it holds."""
    with Store.open(url, must_exist=True) as store:
        wrong = [finding for finding in check_store(store) if not finding.is_ok]
        requests, audits = store.read_requests(ROLLOUT), store.read_audits(ROLLOUT)
        events = list(EventLog(store).read(ROLLOUT, kinds=("evidence",)))
    assert [finding.name for finding in wrong] == []
    assert [row["request_id"] for row in requests] == [f"q{i}" for i in range(len(requests))]
    assert len(requests) - 1 <= len(audits) <= len(requests)
    assert len(audits) - 1 <= len(events) <= len(audits)
    return len(requests)


def test_a_backup_overwrites_nothing(tmp_path: Path) -> None:
    """A name that is taken is refused, and so is a folder that cannot be made."""
    url = f"sqlite:///{tmp_path}/state.db"
    Store.open(url).close()
    taken = tmp_path / "taken"
    taken.write_text("mine")

    with pytest.raises(StoreError, match="is there already"):
        back_up(url, taken)
    with pytest.raises(StoreError, match="cannot be written"):
        back_up(url, taken / "below" / "copy.db")

    assert taken.read_text() == "mine"


def test_a_damaged_store_is_not_backed_up(tmp_path: Path) -> None:
    """A copy that is not whole is no backup; nothing of it stays."""
    path = tmp_path / "state.db"
    build_old_store(f"sqlite:///{path}")
    with path.open("r+b") as file:
        file.seek(40 * 4096)
        file.write(b"\xff" * 8192)

    with pytest.raises(StoreError, match=r"not whole|malformed"):
        back_up(f"sqlite:///{path}", tmp_path / "copies" / "copy.db")

    assert list((tmp_path / "copies").iterdir()) == []
    with Store.connect(f"sqlite:///{path}") as store:
        assert "database" in {finding.name for finding in check_store(store) if not finding.is_ok}


def test_a_copy_is_its_owners_alone(tmp_path: Path) -> None:
    """As the store itself."""
    url = f"sqlite:///{tmp_path}/state.db"
    Store.open(url).close()

    assert back_up(url, tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600


def test_postgres_is_dumped_and_restored(tmp_path: Path, postgres: PostgresServer) -> None:
    """`pg_restore` of the dump is the same store, chain and all."""
    if find_pg_dump() is None:
        pytest.skip("no pg_dump on this machine: apt-get install postgresql-client")
    url, other = postgres.new_database(), postgres.new_database()
    build_old_store(url)
    upgrade_store(url)

    dump = back_up(url, tmp_path / "copies" / "state.dump")
    address = sa.make_url(other)
    place = [f"--host={address.host}", f"--port={address.port}", f"--username={address.username}"]
    restore = [str(find_binary("pg_restore")), "--no-owner", "--exit-on-error", *place]
    subprocess.run([*restore, f"--dbname={address.database}", str(dump)], check=True, timeout=60)

    with Store.open(other) as store:
        assert EventLog(store).verify() == NUM_EVENTS
        assert [finding for finding in check_store(store) if not finding.is_ok] == []


def test_the_newest_pg_dump_is_taken_however_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's folders are versions; what else lies there is taken last, and breaks nothing."""
    monkeypatch.setattr(backup, "DEBIAN", tmp_path)
    for name in ("9.6", "10", "16", "local", "16-old"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "pg_dump").touch()

    assert find_pg_dump() == str(tmp_path / "16" / "bin" / "pg_dump")


def test_without_pg_dump_the_message_says_what_to_run(
    tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without Postgres' programs."""
    monkeypatch.setattr(backup, "DEBIAN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    url = postgres.new_database()

    with pytest.raises(StoreError, match="pg_dump --format=custom"):
        back_up(url, tmp_path / "state.dump")


def test_the_commands_of_a_store(tmp_path: Path) -> None:
    """An old store at home: refused, upgraded, checked, copied, pruned; each prints one document."""
    path = tmp_path / "sentei-home" / "state.db"
    path.parent.mkdir()
    build_old_store(f"sqlite:///{path}")
    run = CliRunner().invoke

    checked = run(app, ["store", "check", "--json"])
    assert checked.exit_code == ExitCode.FAILED
    assert json.loads(checked.stdout)["ok"] is False
    refused = run(app, ["store", "prune", "--older-than", "30d"])
    assert isinstance(refused.exception, StoreError)
    upgraded = json.loads(run(app, ["store", "upgrade", "--json"]).stdout)
    assert (upgraded["before"], upgraded["after"], upgraded["events"]) == ("0001", HEAD, NUM_EVENTS)
    assert Path(upgraded["backup"]).is_file()
    checked = run(app, ["store", "check", "--json"])
    assert (checked.exit_code, json.loads(checked.stdout)["ok"]) == (ExitCode.OK, True)
    written = json.loads(run(app, ["store", "backup", "--json"]).stdout)
    assert Path(written["backup"]).parent == path.parent / "backups"
    dry = json.loads(run(app, ["store", "prune", "--older-than", "30d", "--dry-run", "--json"]).stdout)
    done = json.loads(run(app, ["store", "prune", "--older-than", "30d", "--json"]).stdout)
    assert dry["rollouts"] == done["rollouts"]
    assert {row["rollout_id"]: row["rows"] for row in done["rollouts"]}["midway"] == 0
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT DISTINCT rollout_id FROM requests").fetchall() == [("midway",)]
        assert database.execute("SELECT count(*) FROM events").fetchone() == (NUM_EVENTS,)


def test_prune_wants_a_duration(tmp_path: Path) -> None:
    """A bare number has no unit."""
    done = CliRunner().invoke(app, ["store", "prune", "--older-than", "30"])

    assert isinstance(done.exception, ValueError)
    assert "a duration is a number with a unit" in str(done.exception)
