"""What steers traffic: operators' commands, routing table, controller's lease, rollouts, named values."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.clock import SteadyClock, machine_id
from sentei.monitors.database import AHEAD_S, Database
from sentei.monitors.errors import StaleLeaseError, StoreError
from sentei.monitors.records import Revision, Rollout
from sentei.monitors.tables import COMMANDS, EVENTS, LEASES, REVISIONS, ROLLOUTS, ROUTING, VALUES
from sentei.policies.signals import RoutingTable, SliceRoute

log = logging.getLogger(__name__)

CONTROLLER = "controller"
CLOCK = "clock."  # + machine: the epoch second at which its monotonic clock was 0
ROUTES = "routes"
PRUNED = "pruned."  # + rollout id: records of before this second were deleted
STOP = "stop."  # + rollout id: the number of the command that stopped it


class Steering(Database):
    """Only the holder of the controller's lease may publish routes and append events; anybody may stop."""

    _foreign_lease: tuple[tuple[int, float], float] | None = None  # as last seen, and since when

    def add_command(
        self, rollout_id: str, kind: str, *, by: str, reason: str = "", at_s: float, stops: bool = False
    ) -> int:
        """Put an operator's command into the inbox and return its number.

        One that `stops` makes the routing table dense for whoever reads it, from this transaction on and
        whoever holds the lease; a retry ends that.
        """
        with self.write(f"command {kind!r}") as connection:
            seq = self.next_number(connection)
            row = {
                "seq": seq,
                "rollout_id": rollout_id,
                "at_s": at_s,
                "kind": kind,
                "by": by,
                "reason": reason,
            }
            connection.execute(sa.insert(COMMANDS).values(**row))
            if stops:
                _upsert(connection, VALUES, f"{STOP}{rollout_id}", {"value": str(seq)})
            elif kind == "retry":
                connection.execute(sa.delete(VALUES).where(VALUES.c.name == f"{STOP}{rollout_id}"))
        return seq

    def clock(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        machine: str | None = None,
    ) -> SteadyClock:
        """Return the clock that all processes of this machine share on this store.

        On a machine that the store does not know yet, or that was started again, it begins with the wall
        clock, but not before the newest event. From then on records are held against it, too.
        """
        machine = machine_id() if machine is None else machine
        with self.write("clock") as connection:
            name = f"{CLOCK}{machine}"
            found = connection.execute(sa.select(VALUES.c.value).where(VALUES.c.name == name)).scalar()
            clock = SteadyClock(wall, monotonic, offset_s=None if found is None else float(found))
            if found is None:
                newest = connection.execute(sa.select(EVENTS.c.at_s).order_by(EVENTS.c.seq.desc()).limit(1))
                clock.not_before(float(newest.scalar() or 0.0))
                if machine:
                    offset_s = clock() - monotonic()
                    _upsert(connection, VALUES, name, {"value": repr(offset_s)})
                    clock = SteadyClock(wall, monotonic, offset_s=offset_s)
        if abs(step_s := wall() - clock()) > AHEAD_S:
            text = "the wall clock is %+.0f s from the time that rollouts of this store go by"
            log.warning("%s, which goes on steadily until this machine starts again", text % step_s)
        self.own_time = clock
        return clock

    def newest_order(self, rollout_id: str) -> int:
        """Return the number of the newest command or edit for a rollout; 0 before the first."""
        newest = 0
        with self.read("newest order") as connection:
            for table in (COMMANDS, REVISIONS):
                query = sa.select(sa.func.max(table.c.seq)).where(table.c.rollout_id == rollout_id)
                newest = max(newest, connection.execute(query).scalar() or 0)
        return newest

    def publish_routing(self, table: RoutingTable, *, token: int, now_s: float) -> int:
        """Make the ingress obey `table` and renew its lease; returns the number of renewals so far."""
        with self.write("routing table") as connection:
            self.check_fence(connection, token)
            found = connection.execute(sa.select(ROUTING).where(ROUTING.c.name == ROUTES)).mappings().first()
            renewals = int(found["renewals"]) + 1 if found else 1
            if found and found["rollout_id"] == table.rollout_id and found["version"] > table.version:
                raise StoreError(
                    f"routing table version {table.version} is older than the published {found['version']} "
                    f"of rollout {table.rollout_id!r}: read the newest state from the event log first."
                )
            row = {
                "rollout_id": table.rollout_id,
                "version": table.version,
                "table_json": json.dumps(dataclasses.asdict(table), sort_keys=True),
                "renewals": renewals,
                "renewed_at_s": now_s,
            }
            _upsert(connection, ROUTING, ROUTES, row)
        return renewals

    def read_routing(self) -> tuple[RoutingTable, int] | None:
        """Return the routing table and how often its lease was renewed; None before the first one.

        Where an operator stopped the rollout it is dense, whatever a controller published since.
        """
        stop = sa.literal(STOP) + ROUTING.c.rollout_id
        query = (
            sa.select(ROUTING.c.table_json, ROUTING.c.renewals, VALUES.c.value.label("stop"))
            .outerjoin(VALUES, VALUES.c.name == stop)
            .where(ROUTING.c.name == ROUTES)
        )
        with self.read("routing table") as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        table = table_from_json(row.table_json)
        return table if row.stop is None else _all_dense(table), int(row.renewals)

    def read_renewed_at(self, rollout_id: str) -> float | None:
        """Return when a controller last published routes of this rollout; None if another's are there."""
        query = sa.select(ROUTING.c.renewed_at_s).where(
            ROUTING.c.name == ROUTES, ROUTING.c.rollout_id == rollout_id
        )
        with self.read("last renewal") as connection:
            found = connection.execute(query).scalar()
        return None if found is None else float(found)

    def acquire_lease(
        self, owner: str, *, ttl_s: float, now_s: float, monotonic_s: float | None = None
    ) -> int | None:
        """Take or renew the lease; returns the fencing token, or None while another owner holds it.

        A lease that was not renewed for `ttl_s` of our own monotonic time is over, whatever wall clocks say:
        one that stepped back would keep a dead owner's lease for as long as it stepped.
        """
        at_s = time.monotonic() if monotonic_s is None else monotonic_s
        with self.write("lease") as connection:
            found = (
                connection.execute(sa.select(LEASES).where(LEASES.c.name == CONTROLLER)).mappings().first()
            )
            is_mine = found is not None and found["owner"] == owner
            is_held = found is not None and not is_mine and found["expires_at_s"] > now_s
            if is_held and not self._is_unrenewed(found, ttl_s, at_s):
                return None
            token = (int(found["token"]) if found else 0) + (0 if is_mine else 1)
            row = {"owner": owner, "token": token, "expires_at_s": now_s + ttl_s}
            _upsert(connection, LEASES, CONTROLLER, row)
        return token

    def _is_unrenewed(self, lease: Any, ttl_s: float, at_s: float) -> bool:
        """Whether another owner's lease looks as it did `ttl_s` ago; remembers it if it looks new."""
        seen = (lease["token"], lease["expires_at_s"])
        if self._foreign_lease is None or self._foreign_lease[0] != seen:
            self._foreign_lease = (seen, at_s)
        return at_s - self._foreign_lease[1] >= ttl_s

    def check_fence(self, connection: Connection, token: int) -> None:
        """Raise StaleLeaseError inside a write transaction if `token` is not the newest of the lease."""
        newest = connection.execute(sa.select(LEASES.c.token).where(LEASES.c.name == CONTROLLER)).scalar()
        if newest != token:
            raise StaleLeaseError(
                f"fencing token {token} of the lease is not the newest ({newest}): another controller "
                "has taken over, this one must stop writing and ask for the lease again."
            )

    def add_rollout(self, rollout: Rollout) -> bool:
        """Write down a rollout; False if it was there already with the same policy."""
        with self.write(f"rollout {rollout.rollout_id!r}") as connection:
            query = sa.select(ROLLOUTS.c.policy_text).where(ROLLOUTS.c.rollout_id == rollout.rollout_id)
            found = connection.execute(query).scalar()
            if found is not None and found != rollout.policy_text:
                raise StoreError(
                    f"rollout {rollout.rollout_id!r} exists with another policy: choose a new rollout id."
                )
            if found is None:
                self.insert_rollout(connection, rollout)
        return found is None

    def start_rollout(self, rollout: Rollout, check: Callable[[str, str | None], None]) -> bool:
        """Write down a rollout after the newest one, in one transaction; False if there is one of its id.

        `check` is told the newest rollout and the state that its newest event left (None before the first),
        and raises where nothing may follow it; of two starts at once the second sees the first.
        """
        with self.write(f"start of rollout {rollout.rollout_id!r}") as connection:
            ids = sa.select(ROLLOUTS.c.rollout_id).order_by(ROLLOUTS.c.seq.desc())
            newest = connection.execute(ids.limit(1)).scalar()
            if newest is not None:
                states = sa.select(EVENTS.c.state_json).where(EVENTS.c.rollout_id == newest)
                check(newest, connection.execute(states.order_by(EVENTS.c.seq.desc()).limit(1)).scalar())
            same = ids.where(ROLLOUTS.c.rollout_id == rollout.rollout_id)
            if connection.execute(same).first() is not None:
                return False
            self.insert_rollout(connection, rollout)
        return True

    def insert_rollout(self, connection: Connection, rollout: Rollout) -> None:
        """Write a new rollout inside a write transaction."""
        row = {
            "rollout_id": rollout.rollout_id,
            "seq": self.next_number(connection),
            "policy_text": rollout.policy_text,
            "created_at_s": rollout.created_at_s,
            "about_json": json.dumps(rollout.about, sort_keys=True),
        }
        connection.execute(sa.insert(ROLLOUTS).values(**row))

    def read_rollouts(self) -> tuple[Rollout, ...]:
        """Return all rollouts, oldest first: the last one is the one to run."""
        with self.read("rollouts") as connection:
            rows = connection.execute(sa.select(ROLLOUTS).order_by(ROLLOUTS.c.seq)).mappings().all()
        return tuple(_rollout(row) for row in rows)

    def read_end(self, rollout_id: str) -> int | None:
        """Return the number at which the next rollout was started: what is recorded from there on is of
        another time, also where an audit that came late names this rollout. None for the newest.
        """
        own = sa.select(ROLLOUTS.c.seq).where(ROLLOUTS.c.rollout_id == rollout_id).scalar_subquery()
        with self.read(f"end of rollout {rollout_id!r}") as connection:
            return connection.execute(
                sa.select(sa.func.min(ROLLOUTS.c.seq)).where(ROLLOUTS.c.seq > own)
            ).scalar()

    def read_rollout(self, rollout_id: str) -> Rollout | None:
        """Return one rollout, or None."""
        with self.read(f"rollout {rollout_id!r}") as connection:
            query = sa.select(ROLLOUTS).where(ROLLOUTS.c.rollout_id == rollout_id)
            row = connection.execute(query).mappings().first()
        return _rollout(row) if row else None

    def add_revision(self, rollout_id: str, policy_text: str, *, by: str, at_s: float) -> int:
        """Put an edited policy into the inbox of a running rollout and return its number."""
        with self.write(f"edit of rollout {rollout_id!r}") as connection:
            seq = self.next_number(connection)
            self.insert_revision(connection, Revision(seq, rollout_id, at_s, by, policy_text))
        return seq

    def insert_revision(self, connection: Connection, revision: Revision) -> None:
        """Write an edit inside a write transaction."""
        connection.execute(sa.insert(REVISIONS).values(**dataclasses.asdict(revision)))

    def read_revisions(self, rollout_id: str, *, after: int = 0) -> tuple[Revision, ...]:
        """Return the edits numbered above `after`, oldest first."""
        query = (
            sa.select(REVISIONS)
            .where(REVISIONS.c.rollout_id == rollout_id, REVISIONS.c.seq > after)
            .order_by(REVISIONS.c.seq)
        )
        with self.read("edits") as connection:
            return tuple(Revision(**row) for row in connection.execute(query).mappings())

    def read_value(self, name: str) -> str | None:
        """Return a named value, such as the cursor of the MLflow mirror."""
        with self.read(f"value {name!r}") as connection:
            return connection.execute(sa.select(VALUES.c.value).where(VALUES.c.name == name)).scalar()

    def read_pruned(self, rollout_id: str) -> float | None:
        """Return before which second records of a rollout were deleted; None where all are there."""
        found = self.read_value(f"{PRUNED}{rollout_id}")
        return None if found is None else float(found)

    def read_values(self, prefix: str) -> dict[str, str]:
        """Return all named values whose names begin so."""
        query = sa.select(VALUES.c.name, VALUES.c.value).where(
            VALUES.c.name.startswith(prefix, autoescape=True)
        )
        with self.read(f"values {prefix!r}") as connection:
            return {row.name: row.value for row in connection.execute(query)}

    def save_value(self, name: str, value: str) -> None:
        """Set a named value."""
        with self.write(f"value {name!r}") as connection:
            _upsert(connection, VALUES, name, {"value": value})

    def delete_value(self, name: str) -> None:
        """Forget a named value."""
        with self.write(f"value {name!r}") as connection:
            connection.execute(sa.delete(VALUES).where(VALUES.c.name == name))


def _upsert(connection: Connection, table: sa.Table, name: str, row: dict[str, Any]) -> None:
    changed = connection.execute(sa.update(table).where(table.c.name == name).values(**row))
    if changed.rowcount == 0:
        connection.execute(sa.insert(table).values(name=name, **row))


def _rollout(row: Any) -> Rollout:
    return Rollout(
        rollout_id=row["rollout_id"],
        policy_text=row["policy_text"],
        created_at_s=row["created_at_s"],
        about=json.loads(row["about_json"]),
    )


def _all_dense(table: RoutingTable) -> RoutingTable:
    return dataclasses.replace(
        table,
        routes=tuple(
            dataclasses.replace(route, share=0.0, rung_id="dense", audit_share=0.0, audit_share_sparse=0.0)
            for route in table.routes
        ),
    )


def table_from_json(text: str) -> RoutingTable:
    """Return the routing table behind a row; raises what its fields raise where it is none."""
    raw = json.loads(text)
    routes = tuple(SliceRoute(**route) for route in raw.pop("routes"))
    return RoutingTable(routes=routes, **raw)
