"""Bring a store of an older version to this version's tables: all of it in one transaction, or none of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.database import Database
from sentei.monitors.errors import StoreError, StoreVersionError
from sentei.monitors.events import EventLog
from sentei.monitors.migrations import revision as revisions
from sentei.monitors.steering import CONTROLLER
from sentei.monitors.store import Store
from sentei.monitors.tables import EVENTS, LEASES
from sentei.monitors.upkeep.backup import back_up

MIGRATIONS = Path(revisions.__file__).parent


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What an upgrade did; both revisions are the same where there was nothing to do."""

    url: str
    before: str
    after: str
    backup: Path | None  # a copy of before
    events: int  # of the log, whose chain was whole before and after


def upgrade_store(
    url: str,
    *,
    keeps_copy: bool = True,
    is_forced: bool = False,
    clock: Callable[[], float] = time.time,
) -> Upgraded:
    """Upgrade a store and check its event log before and after.

    A file is copied first, beside it, unless `keeps_copy` is off; a copy of a server's database is up to its
    operator. Raises StoreError while a controller holds the lease, unless `is_forced`; StoreVersionError for
    a database that is not Sentei's or of a newer version; BrokenChainError, and changes nothing, for a log
    that is not what was written.
    """
    with Store.connect(url) as store:
        before = _upgradable(store)
        log = EventLog(store)
        if before == revisions.HEAD:
            return Upgraded(store.url, before, before, None, log.verify())
        if not is_forced:
            with store.read("lease") as connection:  # before a copy that takes long
                _check_nobody_decides(store, connection, clock())
        num_events = log.verify()
        copy = None
        if keeps_copy and store.path is not None:
            copy = back_up(url, store.path.with_name(f"{store.path.name}.{before}-{_stamp(clock())}"))
        now_s = clock()
        with store.write("upgraded tables") as connection:  # nobody else writes until it ends
            if not is_forced:
                _check_nobody_decides(store, connection, now_s)
            _check_count(store, connection, num_events, "while it was looked at: stop the app that writes it")
            run_migrations(connection)
            _check_count(store, connection, num_events, "by the upgrade, which is undone")
        return Upgraded(store.url, before, revisions.HEAD, copy, log.verify())


def run_migrations(connection: Connection, target: str = revisions.HEAD) -> None:
    """Run Alembic's migrations up to `target` in the transaction of `connection`."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, target)


def _upgradable(store: Database) -> str:
    with store.read("revision") as connection:
        found = revisions.find_revision(connection)
    if found is None:
        raise StoreVersionError(f"database {store.url} has no tables of Sentei: check the address")
    if not found.isdigit() or found > revisions.HEAD:
        raise StoreVersionError(str(revisions.refusal(store.url, found)))
    return found


def _check_nobody_decides(store: Database, connection: Connection, now_s: float) -> None:
    """A lease that still runs says that an app is at work; one that was stopped leaves it to run out."""
    query = sa.select(LEASES.c.owner, LEASES.c.expires_at_s).where(LEASES.c.name == CONTROLLER)
    lease = connection.execute(query).first()
    if lease is not None and lease.expires_at_s > now_s:
        raise StoreError(
            f"store {store.url} is in use: the lease of controller {lease.owner!r} runs for "
            f"{lease.expires_at_s - now_s:.0f} s more. Stop the app and wait that long, or give --force."
        )


def _check_count(store: Database, connection: Connection, wanted: int, why: str) -> None:
    """The log is the one whose chain was found whole."""
    found = int(connection.execute(sa.select(sa.func.count()).select_from(EVENTS)).scalar_one())
    if found != wanted:
        raise StoreError(f"the log of {store.url} had {wanted} events and has {found}, changed {why}")


def _stamp(now_s: float) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(now_s))
