"""The event log: append-only, each event chained to the one before it by SHA-256, in the store's database.

Each event carries the whole state that it left behind, so the fold over the log is its newest event, and no
later version of the code has to repeat old arithmetic. Each append checks the writer's fencing token in the
same transaction, so a controller without the lease cannot add to the history. The hash of the newest event is
kept beside the log, so events cut off at the end are noticed too: nothing is appended to, and no rollout goes
on from, a log whose end is not what was written. A log can be exported as JSON lines, and imported into
another store, where rollouts go on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from sentei.errors import SenteiError
from sentei.monitors.records import Revision, Rollout
from sentei.monitors.store import Store
from sentei.monitors.tables import DECISIONS, EVENTS, VALUES

GENESIS = "0" * 64
_HEAD = "events.head"
COUNT = "events.count."  # + rollout id
_PAGE = 500
_WAY_OUT = (
    "Restore the database from a backup, or export the log and import it into an empty store "
    "(docs/guides/records.md, A log that was changed); until then nothing is decided and traffic is dense."
)


class BrokenChainError(SenteiError):
    """The event log is not what was written; the message names the first event that is wrong."""


@dataclass(frozen=True, slots=True)
class Event:
    """One decision or deed with the state that it left behind."""

    seq: int  # 1, 2, 3 ... over all rollouts of the store
    rollout_id: str
    at_s: float
    kind: str
    payload: dict[str, Any]
    state: str  # canonical JSON, see policies.engine.state_to_json
    token: int  # fencing token of the controller that wrote it
    prev_hash: str
    hash: str


class EventLog:
    """Appends to and reads from the log of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(
        self,
        rollout_id: str,
        kind: str,
        *,
        payload: dict[str, Any],
        state_after: str,
        token: int,
        at_s: float,
    ) -> Event:
        """Add one event; writes nothing and raises StaleLeaseError if `token` is not the newest, or
        BrokenChainError if the end of the log is not what was written.
        """
        with self._store.write(f"event {kind!r}") as connection:
            self._store.check_fence(connection, token)
            seq, prev_hash = _check_tail(connection)
            row = {
                "seq": seq + 1,
                "rollout_id": rollout_id,
                "at_s": float(at_s),
                "kind": kind,
                "payload_json": _canonical(payload),
                "state_json": state_after,
                "token": token,
                "prev_hash": prev_hash,
            }
            row["hash"] = _hash(row)
            num_events = _count(connection, rollout_id) + 1
            connection.execute(sa.insert(EVENTS).values(**row))
            _save(connection, _HEAD, f"{row['seq']}:{row['hash']}")
            _save(connection, f"{COUNT}{rollout_id}", str(num_events))
        return _event(row)

    def read(
        self, rollout_id: str | None = None, *, after: int = 0, kinds: Sequence[str] = ()
    ) -> Iterator[Event]:
        """Yield events above `after`, oldest first, page by page; unnamed is any rollout, any kind."""
        while True:
            with self._store.read("events") as connection:
                rows = _page(connection, rollout_id, after, kinds)
            yield from (_event(row) for row in rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1]["seq"]

    def latest(self, rollout_id: str) -> Event | None:
        """Return the newest event of a rollout, or None."""
        with self._store.read("newest event") as connection:
            row = connection.execute(_newest(rollout_id)).mappings().first()
        return _event(row) if row else None

    def latest_state(self, rollout_id: str) -> str | None:
        """Return the state to go on from after a restart, or None before the first event."""
        event = self.latest(rollout_id)
        return event.state if event else None

    def decisions(self, rollout_id: str, *, before: int | None = None, limit: int = 50) -> list[Event]:
        """Return the newest `limit` events below `before` that are more than evidence, oldest first."""
        query = sa.select(EVENTS).where(EVENTS.c.rollout_id == rollout_id, sa.text(DECISIONS))
        if before is not None:
            query = query.where(EVENTS.c.seq < before)
        with self._store.read("decisions") as connection:
            rows = connection.execute(query.order_by(EVENTS.c.seq.desc()).limit(limit)).mappings().all()
        return [_event(row) for row in reversed(rows)]

    def count(self, rollout_id: str) -> int:
        """Return how many events a rollout has, from the number that each append keeps."""
        with self._store.read("number of events") as connection:
            return _count(connection, rollout_id)

    def resume(self, rollout_id: str) -> Event | None:
        """Return the event to go on from, or None before the first; raises BrokenChainError where it, or the
        end of the log, is not what was written. It costs the same however long the log is.
        """
        with self._store.read("event to go on from") as connection:
            tail_seq, _ = _check_tail(connection)
            row = connection.execute(_newest(rollout_id)).mappings().first()
            if row is None:
                return None
            _check_link(row, row["seq"], row["prev_hash"])
            if row["seq"] < tail_seq:  # another rollout has gone on: its event must go on from this one
                rest = sa.select(EVENTS).where(EVENTS.c.seq > row["seq"]).order_by(EVENTS.c.seq).limit(1)
                following = connection.execute(rest).mappings().one()
                _check_link(following, row["seq"] + 1, row["hash"])
        return _event(row)

    def verify(self) -> int:
        """Check the whole chain and return its length; raises BrokenChainError at the first wrong event."""
        with self._store.read("events") as connection:
            seq, prev_hash = 0, GENESIS
            while rows := _page(connection, None, seq):
                for row in rows:
                    _check_link(row, seq + 1, prev_hash)
                    seq, prev_hash = row["seq"], row["hash"]
            _check_head(connection, seq, prev_hash)
        return seq

    def export(self, path: Path) -> int:
        """Write all events as JSON lines and return how many."""
        num_events = 0
        with path.open("w", encoding="utf-8") as file:
            for event in self.read():
                file.write(_canonical(asdict(event)) + "\n")
                num_events += 1
        return num_events

    def load(self, path: Path) -> int:
        """Add the events of an export that this log has not, and return how many.

        The log must be empty or the beginning of the export. Raises BrokenChainError, and adds nothing, for
        a file whose chain is broken or tells another story. Rollouts come back from their first events, and
        the store's numbers go on above those that the states remember, so that new records count.
        """
        rows = [_parse(text, number) for number, text in enumerate(_lines(path), 1)]
        prev_hash = GENESIS
        for number, row in enumerate(rows, 1):
            _check_link(row, number, prev_hash)
            prev_hash = row["hash"]
        with self._store.write("imported events") as connection:
            seq, last_hash = _check_tail(connection)
            if seq > len(rows) or (seq and rows[seq - 1]["hash"] != last_hash):
                raise BrokenChainError(
                    f"the log of this store is not the beginning of {path.name}: "
                    f"it has {seq} events of another story. Import into an empty store."
                )
            for row in rows[seq:]:
                connection.execute(sa.insert(EVENTS).values(**row))
                _restore(self._store, connection, _event(row))
            if rows[seq:]:
                _save(connection, _HEAD, f"{len(rows)}:{prev_hash}")
            for rollout_id, num_events in Counter(row["rollout_id"] for row in rows).items():
                _save(connection, f"{COUNT}{rollout_id}", str(num_events))
        return len(rows) - seq


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _parse(text: str, number: int) -> dict[str, Any]:
    """A row of the table from one line of an export."""
    try:
        event = json.loads(text)
        event["payload_json"] = _canonical(event.pop("payload"))
        event["state_json"] = event.pop("state")
        row = {name: event.pop(name) for name in EVENTS.c.keys()}  # noqa: SIM118
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BrokenChainError(f"line {number} is no event: {error!r}. Export the log again.") from error
    return row


def _restore(store: Store, connection: Connection, event: Event) -> None:
    """What else a store must know to go on from an imported event."""
    state, text = json.loads(event.state), event.payload.get("policy_text")
    newest = max(int(state.get(name, 0)) for name in ("cursor", "command_seq", "revision"))
    store.advance_numbers(connection, newest)
    if text is not None and "created_at_s" in event.payload:
        rollout = Rollout(
            rollout_id=event.rollout_id,
            policy_text=text,
            created_at_s=event.payload["created_at_s"],
            about=event.payload["about"],
        )
        store.insert_rollout(connection, rollout)
    elif text is not None:
        revision = Revision(state["revision"], event.rollout_id, event.at_s, event.payload["by"], text)
        store.insert_revision(connection, revision)


def _page(
    connection: Connection, rollout_id: str | None, after: int, kinds: Sequence[str] = ()
) -> list[RowMapping]:
    # `+ 0`: of few kinds the index by kind is wanted, not a walk over all events in their order.
    order = EVENTS.c.seq + 0 if kinds else EVENTS.c.seq
    query = sa.select(EVENTS).where(EVENTS.c.seq > after).order_by(order).limit(_PAGE)
    if rollout_id is not None:
        query = query.where(EVENTS.c.rollout_id == rollout_id)
    if kinds:
        query = query.where(EVENTS.c.kind.in_(kinds))
    return list(connection.execute(query).mappings())


def _newest(rollout_id: str) -> sa.Select[Any]:
    return sa.select(EVENTS).where(EVENTS.c.rollout_id == rollout_id).order_by(EVENTS.c.seq.desc()).limit(1)


def _tail(connection: Connection) -> RowMapping | None:
    return connection.execute(sa.select(EVENTS).order_by(EVENTS.c.seq.desc()).limit(1)).mappings().first()


def _check_tail(connection: Connection) -> tuple[int, str]:
    """Number and hash of the newest event, which is what was written and what the kept head names."""
    row = _tail(connection)
    seq, tail_hash = (int(row["seq"]), str(row["hash"])) if row else (0, GENESIS)
    _check_head(connection, seq, tail_hash)
    if row is not None:
        _check_link(row, seq, row["prev_hash"])
    return seq, tail_hash


def _check_head(connection: Connection, seq: int, tail_hash: str) -> None:
    head = connection.execute(sa.select(VALUES.c.value).where(VALUES.c.name == _HEAD)).scalar()
    if head == (f"{seq}:{tail_hash}" if seq else None):
        return
    kept = "unknown" if head is None else f"event {head.split(':')[0]}"
    if head is not None and int(head.split(":")[0]) > seq:
        raise BrokenChainError(
            f"event {seq + 1} is missing: the log ends at {seq}, its head is {kept}. {_WAY_OUT}"
        )
    raise BrokenChainError(f"event {seq} is broken: it is not the head that was kept, {kept}. {_WAY_OUT}")


def _count(connection: Connection, rollout_id: str) -> int:
    """The kept number, or that of the rows in a log of a version that kept none."""
    kept = sa.select(VALUES.c.value).where(VALUES.c.name == f"{COUNT}{rollout_id}")
    text = connection.execute(kept).scalar()
    if text is not None:
        return int(text)
    query = sa.select(sa.func.count()).where(EVENTS.c.rollout_id == rollout_id)
    return int(connection.execute(query).scalar_one())


def _save(connection: Connection, name: str, value: str) -> None:
    changed = connection.execute(sa.update(VALUES).where(VALUES.c.name == name).values(value=value))
    if changed.rowcount == 0:
        connection.execute(sa.insert(VALUES).values(name=name, value=value))


def _check_link(row: RowMapping | dict[str, Any], seq: int, prev_hash: str) -> None:
    found: str | None = None
    if row["seq"] != seq:
        found = f"the next event is {row['seq']}"
    elif row["prev_hash"] != prev_hash:
        found = "it does not continue the event before it"
    elif row["hash"] != _hash(row):
        found = "its content was changed after it was written"
    if found:
        raise BrokenChainError(f"event {seq} is broken: {found}. {_WAY_OUT}")


def _hash(row: dict[str, Any] | RowMapping) -> str:
    content = {name: row[name] for name in EVENTS.c.keys() if name != "hash"}  # noqa: SIM118
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _event(row: dict[str, Any] | RowMapping) -> Event:
    return Event(
        seq=int(row["seq"]),
        rollout_id=row["rollout_id"],
        at_s=float(row["at_s"]),
        kind=row["kind"],
        payload=json.loads(row["payload_json"]),
        state=row["state_json"],
        token=int(row["token"]),
        prev_hash=row["prev_hash"],
        hash=row["hash"],
    )
