"""A copy of a store that is whole while others write: SQLite's own backup, or Postgres' `pg_dump`.

The copy is written beside its final name, checked, and only then given that name, so a file that has it is a
whole one.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from sentei.monitors.database import Database, make_private
from sentei.monitors.errors import StoreError
from sentei.monitors.events import EventLog
from sentei.monitors.store import Store

DUMP_S = 3600.0
DEBIAN = Path("/usr/lib/postgresql")  # its servers' folders hold the programs, which are not in PATH


def back_up(url: str, target: Path) -> Path:
    """Copy a store into the file `target` and return it.

    SQLite: the copy is one moment of the store, whatever is written meanwhile; its integrity and event log
    are checked. Postgres: the custom format of `pg_dump`, for `pg_restore`. Raises StoreError where the
    target is there already, where it cannot be written, or where the copy is not whole; then nothing stays.
    """
    with Store.connect(url) as store:
        if target.exists():
            raise StoreError(f"{target} is there already: name another file, or move it away")
        part = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            make_private(part)
            if store.path is not None:
                _copy_file(store, part)
            else:
                _dump(store, make_url(url), part)
            _sync(part)
            os.replace(part, target)
        except OSError as error:
            raise StoreError(f"backup {target} cannot be written: {error}") from error
        finally:
            with suppress(OSError):
                part.unlink()
    return target


def _copy_file(store: Database, part: Path) -> None:
    """One step copies all pages under one read lock; in WAL mode that makes no writer wait."""
    try:
        with (
            closing(sqlite3.connect(f"file:{_quoted(store.path)}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(part)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreError(f"store {store.url} cannot be copied: {error}") from error
    if found != "ok":
        raise StoreError(f"the copy of {store.url} is not whole: {found}. Run: sentei store check")
    with Store.connect(f"sqlite:///{part}") as copied:
        EventLog(copied).verify()
    for name in ("-wal", "-shm"):
        part.with_name(part.name + name).unlink(missing_ok=True)


def _quoted(path: Path | None) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _dump(store: Database, url: URL, part: Path) -> None:
    program = find_pg_dump()
    if program is None:
        raise StoreError(
            f"store {store.url} is backed up by pg_dump, which is not on this machine: install the client of "
            "your server's version (Debian: postgresql-client), or run there: pg_dump --format=custom"
        )
    # The address without driver and password is one that libpq reads, options such as sslmode included.
    place = url.set(drivername="postgresql", password=None).difference_update_query(["password"])
    secret = url.password if url.password is not None else url.query.get("password")
    password = {} if secret is None else {"PGPASSWORD": str(secret)}
    try:
        done = subprocess.run(
            [
                program,
                "--format=custom",
                "--no-owner",
                "--no-password",
                f"--file={part}",
                f"--dbname={place.render_as_string()}",
            ],
            env=os.environ | password,
            capture_output=True,
            text=True,
            timeout=DUMP_S,
        )
    except subprocess.TimeoutExpired as error:
        raise StoreError(
            f"store {store.url} was not dumped within {DUMP_S:.0f} s: run pg_dump there"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StoreError(f"store {store.url} cannot be dumped: {lines[-1]}")


def find_pg_dump() -> str | None:
    """Postgres' program of the newest version here; a newer one dumps older servers."""
    found = max(DEBIAN.glob("*/bin/pg_dump"), key=_version, default=None)
    return str(found) if found is not None else shutil.which("pg_dump")


def _version(path: Path) -> tuple[int, ...]:
    """The version that a folder is named by; one that is named otherwise comes before all of them."""
    parts = path.parts[-3].split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
