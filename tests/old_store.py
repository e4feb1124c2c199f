"""A store as the version of commit e4b6c64 left it, on SQLite or on Postgres."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from sentei.monitors.migrations.versions.r0001_first import METADATA as TABLES

OLD = Path(__file__).parent / "fixtures" / "store_e4b6c64"
NUM_EVENTS = 22  # in its log, of three rollouts


def build_old_store(url: str) -> None:
    """Fill an empty database; `store.sql` is SQLite's, so another database gets its rows one by one."""
    address = sa.make_url(url)
    if address.get_backend_name() == "sqlite":
        _load(Path(str(address.database)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.db")
        _load(path)
        source, target = sa.create_engine(f"sqlite:///{path}"), sa.create_engine(url)
        with source.connect() as old, target.begin() as new:
            TABLES.create_all(new)
            for table in TABLES.sorted_tables:
                if rows := [dict(row) for row in old.execute(sa.select(table)).mappings()]:
                    new.execute(sa.insert(table), rows)
        source.dispose()
        target.dispose()


def _load(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript((OLD / "store.sql").read_text(encoding="utf-8"))
