"""One database behind a URL: engine options, transactions, and errors that a person can act on.

Every write transaction first locks the row `writes` of the table `counters`. So there is one writer at a time
on every database, numbers are handed out in the order of commit, and a reader that has seen number n has seen
all before it: cursors cannot skip a row that commits late. Only a row that is written uses up a number:
trying again, renewing a lease or publishing routes does not, so a restart leaves the numbering as it is.

SQLite goes on without a word on a file that was deleted or replaced under it. So each transaction looks
whether the path still names the file that was opened, a write also before it commits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from sentei.monitors.clock import SteadyClock
from sentei.monitors.errors import StoreError, StoreUrlError, StoreVersionError
from sentei.monitors.migrations.revision import HEAD, find_revision, mark_revision, refusal
from sentei.monitors.tables import COUNTERS, METADATA

BUSY_TIMEOUT_MS = 5_000
WRITES = "writes"
AHEAD_S = 5.0  # clocks of one system may differ by this much; a later stamp is a wrong one
_IS_WRITE = "sentei_is_write"


_CLOCK = sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))


class Database:
    """Engine and transactions of one database URL; safe to use from several threads and processes."""

    own_time: SteadyClock | None = None  # what records are held against, once a process has asked for it

    def __init__(self, url: str) -> None:
        self.url = _printable(url)
        self._path = _sqlite_path(url)
        self._file: tuple[int, int] | None = None  # device and inode of the file that was opened
        try:
            self._engine = _make_engine(url)
        except (ArgumentError, ImportError, SQLAlchemyError) as error:
            raise StoreUrlError(
                f"store URL {self.url!r} cannot be used: {error}. {_driver_hint(error)}"
                "Give an SQLAlchemy URL such as sqlite:////var/lib/sentei/state.db or postgresql+psycopg://user@host/db."
            ) from error

    @classmethod
    def open(cls, url: str, *, must_exist: bool = False) -> Self:
        """Connect, make the tables of a new database, and refuse one of another revision.

        With `must_exist` a file that is not there is a StoreError: who only reads makes none.
        """
        database = cls.connect(url, must_exist=must_exist)
        try:
            database._prepare()
            database._file = _identity(database._path)
        except StoreError:
            database.close()
            raise
        return database

    @classmethod
    def connect(cls, url: str, *, must_exist: bool = True) -> Self:
        """Connect to a database of whatever revision, as upgrades and checks must; nothing is made in it."""
        path = _sqlite_path(url)
        if must_exist and path is not None and not Path(path).is_file():
            text = "is not there; check the path, or start a rollout first"
            raise StoreError(f"store {_printable(url)} {text}")
        database = cls(url)
        database._file = _identity(database._path)
        return database

    @property
    def path(self) -> Path | None:
        """The file of a SQLite store; None for a server or a database in memory."""
        return None if self._path is None else Path(self._path)

    def close(self) -> None:
        """Give back all connections; the object can be used again afterwards."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """Return itself; leaving the block closes all connections."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    @contextmanager
    def read(self, what: str) -> Iterator[Connection]:
        """Open a read transaction; raises StoreError if the database is away."""
        self._check_file(what)
        with self._translate(f"read {what}"), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, what: str) -> Iterator[Connection]:
        """Open the one write transaction of the database; raises StoreError, and then nothing was written."""
        self._check_file(what)
        with self._translate(f"write {what}"), self._engine.connect() as connection:
            connection = connection.execution_options(**{_IS_WRITE: True})
            with connection.begin():
                _lock(connection)
                yield connection
                self._check_file(what)

    def _check_file(self, what: str) -> None:
        if self._file is None or self._file == (found := _identity(self._path)):
            return
        change = "replaced" if found else "deleted"
        raise StoreError(
            f"store {self.url} cannot be used for {what}: its file was {change} while it was open, so "
            "nothing is decided on it and traffic is dense. Put the file back where it was, or restart "
            "Sentei on the one that is there now."
        )

    def next_number(self, connection: Connection) -> int:
        """Hand out the next number inside a write transaction: strictly growing in the order of commit."""
        statement = (
            sa.update(COUNTERS)
            .where(COUNTERS.c.name == WRITES)
            .values(value=COUNTERS.c.value + 1)
            .returning(COUNTERS.c.value)
        )
        return int(connection.execute(statement).scalar_one())

    def advance_numbers(self, connection: Connection, number: int) -> None:
        """Go on above `number` inside a write transaction; numbers never go back."""
        behind = (COUNTERS.c.name == WRITES) & (COUNTERS.c.value < number)
        connection.execute(sa.update(COUNTERS).where(behind).values(value=number))

    def not_ahead(self, connection: Connection, at_s: float) -> float:
        """Return a record's time, or the store's own time where it lies in the future."""
        if self.own_time is not None:
            now_s = self.own_time()
        elif connection.dialect.name == "sqlite":
            now_s = time.time()
        else:
            now_s = float(connection.execute(_CLOCK).scalar_one())
        return at_s if at_s <= now_s + AHEAD_S else now_s

    def last_number(self, connection: Connection) -> int:
        """Return the newest committed number: all rows up to it can be read."""
        return int(
            connection.execute(sa.select(COUNTERS.c.value).where(COUNTERS.c.name == WRITES)).scalar_one()
        )

    @contextmanager
    def _translate(self, action: str) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreError(_explain(self.url, action, error)) from error

    def _prepare(self) -> None:
        with self.read("revision") as connection:
            revision = find_revision(connection)
        if revision is None:
            try:
                revision = self._create_tables()
            except StoreError:
                # On Postgres two processes may create the same table at once; the second try finds it there.
                revision = self._create_tables()
        if text := refusal(self.url, revision):
            raise StoreVersionError(text)

    def _create_tables(self) -> str:
        """Make the tables of a new database and return the revision; of one that has tables, its own."""
        with self._translate("create tables"), self._engine.connect() as connection:
            connection = connection.execution_options(**{_IS_WRITE: True})
            with connection.begin():
                revision = find_revision(connection)
                if revision is None:
                    METADATA.create_all(connection)
                    connection.execute(sa.insert(COUNTERS).values(name=WRITES, value=0))
                    mark_revision(connection)
        return revision or HEAD


def _sqlite_path(url: str) -> str | None:
    """The file behind a URL; None for a server or a database in memory."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    return parsed.database if is_file else None


def _identity(path: str | None) -> tuple[int, int] | None:
    """Device and inode of a file, or None where there is none."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lock(connection: Connection) -> None:
    statement = sa.update(COUNTERS).where(COUNTERS.c.name == WRITES).values(value=COUNTERS.c.value)
    if connection.execute(statement).rowcount != 1:
        raise StoreError(f"the store has no counter {WRITES!r}: it was not made by Sentei, or was damaged.")


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(parsed, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:" and "uri" not in parsed.query:
        make_private(Path(parsed.database))
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    sa.event.listen(engine, "connect", _set_sqlite_options)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def make_private(path: Path) -> None:
    """Create a database's file for its owner alone; what SQLite keeps beside it gets the same mode.

    A file that is there keeps its mode, and where none can be made SQLite says why.
    """
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _set_sqlite_options(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we send BEGIN ourselves: Python would delay it past the first SELECT
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_TIMEOUT_MS}", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE waits for the write lock at once; a late upgrade would fail without waiting.
    is_write = connection.get_execution_options().get(_IS_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _driver_hint(error: Exception) -> str:
    is_driver = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("psycopg")
    return "Install it with: pip install 'sentei[postgres]'. " if is_driver else ""


SECRETS = ("password", "sslpassword")  # in the query of a URL, where SQLAlchemy does not hide them


def _printable(url: str) -> str:
    try:
        return make_url(url).difference_update_query(SECRETS).render_as_string(hide_password=True)
    except ArgumentError:
        return "<not a URL>"


def _explain(url: str, action: str, error: SQLAlchemyError) -> str:
    reason = str(error.orig) if isinstance(error, DBAPIError) and error.orig else str(error)
    return f"store {url} cannot {action}: {reason.strip()}. {_way_out(reason)}"


def _way_out(reason: str) -> str:
    known = (
        ("locked", "Another process holds the write lock: look for a stuck writer on this file."),
        (
            "full",
            "The disk is full: free some space; what was not written is lost, what was written is whole.",
        ),
        ("unable to open", "Check that the folder exists and that this user may write to it."),
        ("readonly", "The file is read-only: give this user the right to write it."),
        ("not a database", "The file is no SQLite database: move it away or point to another one."),
        ("malformed", "The file is damaged: restore a backup or point to a new database."),
    )
    for word, advice in known:
        if word in reason.lower():
            return advice
    return "Check that the database runs and can be reached; Sentei goes on as soon as it answers."
