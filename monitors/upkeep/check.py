"""Whether a store is whole: revision, tables, the database itself, the event log, and what refers to it.

Nothing is changed, and one fault does not hide the next: what cannot be read is a finding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.errors import SenteiError
from sentei.monitors.database import WRITES
from sentei.monitors.events import COUNT, EventLog
from sentei.monitors.migrations.revision import find_revision, refusal
from sentei.monitors.steering import table_from_json
from sentei.monitors.store import Store
from sentei.monitors.tables import COUNTERS, EVENTS, METADATA, ROLLOUTS, ROUTING, VALUES
from sentei.policies.state import PolicyStateError, state_from_json

RESTORE = "restore a backup (sentei store backup made it), or see docs/guides/store.md"
NUMBERED = tuple(table for table in METADATA.sorted_tables if "seq" in table.c and table is not EVENTS)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_ok: bool
    found: str
    way_out: str = ""


def check_store(store: Store) -> tuple[Finding, ...]:
    """Look at everything; `store` may be one that `Store.open` refuses (`Store.connect`)."""
    looks: tuple[tuple[str, Callable[[Store], Finding]], ...] = (
        ("revision", _revision),
        ("tables", _tables),
        ("database", _database),
        ("event log", _log),
        ("numbers of events", _counts),
        ("rollouts", _rollouts),
        ("numbering", _numbering),
        ("routing table", _routing),
    )
    return tuple(_try(name, look, store) for name, look in looks)


def _try(name: str, look: Callable[[Store], Finding], store: Store) -> Finding:
    try:
        return look(store)
    except (SenteiError, ValueError) as error:
        return Finding(name, False, str(error), RESTORE)


def _revision(store: Store) -> Finding:
    with store.read("revision") as connection:
        revision = find_revision(connection)
    if revision is None:
        return Finding("revision", False, "none: Sentei has no tables here", "check the address")
    text = refusal(store.url, revision)
    return Finding("revision", text is None, revision, text or "")


def _tables(store: Store) -> Finding:
    """Every table, column and index that this version reads or writes."""
    with store.read("tables") as connection:
        missing = list(_missing(sa.inspect(connection)))
    found = f"missing: {', '.join(missing)}" if missing else f"all {len(METADATA.tables)}, with their indexes"
    return Finding("tables", not missing, found, "run: sentei store upgrade" if missing else "")


def _missing(inspector: sa.Inspector) -> Iterator[str]:
    there = set(inspector.get_table_names())
    for table in METADATA.sorted_tables:
        if table.name not in there:
            yield table.name
            continue
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        indexes = {index["name"] for index in inspector.get_indexes(table.name)}
        yield from (f"{table.name}.{column.name}" for column in table.columns if column.name not in columns)
        yield from (str(index.name) for index in table.indexes if index.name not in indexes)


def _database(store: Store) -> Finding:
    """What the database says of itself; Postgres has no such question, so each row of each table is read."""
    with store.read("all pages") as connection:
        if connection.dialect.name == "sqlite":
            rows = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check(10)")]
            is_ok = rows == ["ok"]
            return Finding("database", is_ok, "; ".join(rows), "" if is_ok else RESTORE)
        num_rows = sum(_read_through(connection, name) for name in sa.inspect(connection).get_table_names())
    return Finding("database", True, f"{num_rows} rows read")


def _read_through(connection: Connection, name: str) -> int:
    quoted = connection.dialect.identifier_preparer.quote(name)
    found = connection.exec_driver_sql(f"SELECT count(md5({quoted}::text)) FROM {quoted}")
    return int(found.scalar_one())


def _log(store: Store) -> Finding:
    return Finding("event log", True, f"{EventLog(store).verify()} events, chain whole")


def _counts(store: Store) -> Finding:
    """The kept number of each rollout's events is that of its rows."""
    query = sa.select(EVENTS.c.rollout_id, sa.func.count()).group_by(EVENTS.c.rollout_id)
    with store.read("numbers of events") as connection:
        rows = {name: int(number) for name, number in connection.execute(query)}
        kept = connection.execute(sa.select(VALUES).where(VALUES.c.name.startswith(COUNT, autoescape=True)))
        wrong = {name.removeprefix(COUNT): int(value) for name, value in kept}
    wrong = {name: number for name, number in wrong.items() if rows.get(name, 0) != number}
    found = "; ".join(f"{name}: {number} kept, {rows.get(name, 0)} there" for name, number in wrong.items())
    found = found or f"right for {len(rows)} rollouts"
    return Finding("numbers of events", not wrong, found, RESTORE if wrong else "")


def _rollouts(store: Store) -> Finding:
    """Each rollout with events is written down, and its newest state is one, of that rollout."""
    newest = sa.select(sa.func.max(EVENTS.c.seq)).group_by(EVENTS.c.rollout_id)
    query = sa.select(EVENTS.c.rollout_id, EVENTS.c.state_json).where(EVENTS.c.seq.in_(newest))
    with store.read("rollouts") as connection:
        known = set(connection.execute(sa.select(ROLLOUTS.c.rollout_id)).scalars())
        states = connection.execute(query).all()
    wrong = [f"{name} is not written down" for name, _ in states if name not in known]
    wrong += [f"the newest state of {name} {fault}" for name, text in states if (fault := _fault(name, text))]
    found = "; ".join(wrong) or f"{len(known)}, {len(states)} of them with events"
    return Finding("rollouts", not wrong, found, RESTORE if wrong else "")


def _numbering(store: Store) -> Finding:
    """The counter is at or above every number that was handed out."""
    with store.read("numbering") as connection:
        counter = connection.execute(sa.select(COUNTERS.c.value).where(COUNTERS.c.name == WRITES)).scalar()
        there = set(sa.inspect(connection).get_table_names())
        highest = max(
            int(connection.execute(sa.select(sa.func.max(table.c.seq))).scalar() or 0)
            for table in NUMBERED
            if table.name in there
        )
    is_ok = counter is not None and counter >= highest
    return Finding("numbering", is_ok, f"counter {counter}, highest {highest}", "" if is_ok else RESTORE)


def _routing(store: Store) -> Finding:
    query = sa.select(ROUTING.c.rollout_id, ROUTING.c.table_json)
    with store.read("routing table") as connection:
        rows = connection.execute(query).all()
        known = set(connection.execute(sa.select(ROLLOUTS.c.rollout_id)).scalars())
    wrong = [row.rollout_id for row in rows if row.rollout_id not in known or not _is_table(row.table_json)]
    found = f"of {', '.join(row.rollout_id for row in rows)}" if rows else "none yet"
    way_out = "restart the app: its controller publishes a new one" if wrong else ""
    return Finding("routing table", not wrong, found, way_out)


def _fault(rollout_id: str, text: str) -> str:
    """What is wrong with a state's bytes: a controller reads the same ones when it takes the rollout up."""
    try:
        state = state_from_json(text)
    except PolicyStateError as error:
        return f"cannot be read: {error}"
    return "" if state.rollout_id == rollout_id else f"is one of {state.rollout_id}"


def _is_table(text: str) -> bool:
    try:
        table_from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
