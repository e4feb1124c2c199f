"""What a statistical unit is: one session in one half of a slice, at one rung, in one period of a phase.

Whether a row is a unit is decided when it is read, by the rows with smaller numbers, so nothing about phases
travels with requests, and reading the same cursor again finds the same units. Of a session's scored audits
within slice, rung, arm, half and period the first is the unit; a missing one counts until there is a score.
Of requests it is the first within slice, rung, share and period.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.records import AuditStatus
from sentei.monitors.tables import ARRIVALS, AUDITS, REQUESTS
from sentei.policies.signals import SliceLengths

Row = Mapping[str, Any]
Key = tuple[Any, ...]

BORDER_ROWS = 400  # requests before the phase whose median length halves a slice
MIN_BORDER_ROWS = 20  # with fewer the policy's own border stands
SESSIONS_AT_A_TIME = 500  # in one question to the store


@dataclass(frozen=True, slots=True)
class SignalQuery:
    """What to read for one rollout; made from the policy by whoever runs it."""

    rollout_id: str
    value_names: frozenset[str]
    health_window_s: float
    audit_limit_s: float  # a chosen request without a score after this time is a missing one
    replicas: Mapping[str, int] = field(default_factory=dict)  # ready replicas by variant
    num_numbers: int = 5_000  # how far one read may move the cursor: bounds the time of a tick
    since_s: float = 0.0  # when the present phase of the rollout began
    unit_period_s: float = math.inf  # after it a session counts as a unit again
    borders: Mapping[str, float] = field(default_factory=dict)  # prompt tokens that halve each slice
    artifact: str = ""  # digest of what the sparse replicas run
    metrics: Mapping[str, int] = field(default_factory=dict)  # of one's own: number of the last sample read


@dataclass(frozen=True, slots=True)
class Units:
    """The units among the rows above a cursor, in their order."""

    audits: tuple[Row, ...]
    requests: tuple[Row, ...]
    borders: Mapping[str, float]

    @property
    def numbers(self) -> Iterator[int]:
        """The numbers of the last unit of each kind, as far as there is one."""
        yield from (rows[-1]["seq"] for rows in (self.audits, self.requests) if rows)

    def half(self, row: Row) -> str:
        """The half of its slice that an audited request lies in; "" where its length is not known."""
        border, length = self.borders.get(row["slice_id"]), row["prompt_tokens"]
        return "" if border is None or length is None else "upper" if length >= border else "lower"


def read_units(connection: Connection, query: SignalQuery, *, after: int, upto: int) -> Units:
    """The units numbered from `after` (exclusive) to `upto`."""
    borders = _read_borders(connection, query)
    units = Units((), (), borders)

    def audit_key(row: Row) -> Key:
        place = (row["slice_id"], row["rung_id"], row["variant_served"], units.half(row))
        return (row["session_id"], *place, _period(query, row))

    def request_key(row: Row) -> Key:
        return (row["session_id"], row["slice_id"], row["rung_id"], row["share"], _period(query, row))

    rows = _read_rows(connection, _audits(), AUDITS, query.rollout_id, after, upto)
    seen = _keys_before(connection, query, rows, _audits(), AUDITS, audit_key, after)
    audits = tuple(_firsts(rows, seen, audit_key))
    plain = sa.select(REQUESTS)
    rows = _read_rows(connection, plain, REQUESTS, query.rollout_id, after, upto)
    seen = _keys_before(connection, query, rows, plain, REQUESTS, request_key, after)
    return Units(audits, tuple(_firsts(rows, seen, request_key)), borders)


def last_arrival(connection: Connection, rollout_id: str, after: int, upto: int) -> int:
    """The number of the newest session that arrived, 0 without one."""
    table = ARRIVALS.c
    query = sa.select(sa.func.max(table.seq)).where(
        table.rollout_id == rollout_id, table.seq > after, table.seq <= upto
    )
    return int(connection.execute(query).scalar() or 0)


def read_lengths(
    connection: Connection, query: SignalQuery, borders: Mapping[str, float], *, after: int, upto: int
) -> tuple[SliceLengths, ...]:
    """How many requests each slice had above the cursor, and how many in its upper half."""
    table = REQUESTS.c
    counts = []
    for slice_id, border in sorted(borders.items()):
        upper = sa.func.sum(sa.case((table.prompt_tokens >= border, 1), else_=0))
        found = connection.execute(
            sa.select(sa.func.count(), upper).where(
                table.rollout_id == query.rollout_id,
                table.slice_id == slice_id,
                table.seq > after,
                table.seq <= upto,
                table.at_s >= query.since_s,
            )
        ).one()
        if found[0]:
            counts.append(SliceLengths(slice_id, int(found[0]), int(found[1] or 0)))
    return tuple(counts)


def _read_borders(connection: Connection, query: SignalQuery) -> Mapping[str, float]:
    """Where each slice splits: the median of what was served just before the phase, else the policy's border.

    Rows of before the phase do not change any more, so the border stands as long as the phase does.
    """
    table = REQUESTS.c
    found = dict(query.borders)
    for slice_id in query.borders:
        newest = (
            sa.select(table.prompt_tokens)
            .where(
                table.rollout_id == query.rollout_id,
                table.slice_id == slice_id,
                table.at_s < query.since_s,
            )
            .order_by(table.at_s.desc(), table.seq.desc())
            .limit(BORDER_ROWS)
        )
        lengths = sorted(connection.execute(newest).scalars())
        if len(lengths) >= MIN_BORDER_ROWS:
            found[slice_id] = lengths[len(lengths) // 2]
    return found


def _audits() -> sa.Select[Any]:
    """Audits with the length and share of their request; where its record is not there, with their own."""
    kept = ("prompt_tokens", "share")
    known = [sa.func.coalesce(REQUESTS.c[name], AUDITS.c[name]).label(name) for name in kept]
    return sa.select(*(column for column in AUDITS.c if column.name not in kept), *known).outerjoin(
        REQUESTS, REQUESTS.c.request_id == AUDITS.c.request_id
    )


def _read_rows(
    connection: Connection, select: sa.Select[Any], table: sa.Table, rollout_id: str, after: int, upto: int
) -> list[Row]:
    query = select.where(table.c.rollout_id == rollout_id, table.c.seq > after, table.c.seq <= upto)
    return [dict(row) for row in connection.execute(query.order_by(table.c.seq)).mappings()]


def _period(query: SignalQuery, row: Row) -> int:
    """Which period of the phase a row was written in; negative before the phase began."""
    return (
        0
        if math.isinf(query.unit_period_s)
        else math.floor((row["at_s"] - query.since_s) / query.unit_period_s)
    )


def _keys_before(
    connection: Connection,
    query: SignalQuery,
    rows: Sequence[Row],
    select: sa.Select[Any],
    table: sa.Table,
    key: Callable[[Row], Key],
    after: int,
) -> dict[Key, bool]:
    """Keys that older rows of the same sessions have taken, and whether with a score."""
    if not rows:
        return {}
    begin_s = -math.inf
    if not math.isinf(query.unit_period_s):
        first = min(_period(query, row) for row in rows)
        begin_s = query.since_s + (first - 1) * query.unit_period_s  # one more: the key decides, not rounding
    begin_s = max(begin_s, query.since_s) if all(row["at_s"] >= query.since_s for row in rows) else begin_s
    sessions = sorted({row["session_id"] for row in rows})
    seen: dict[Key, bool] = {}
    for index in range(0, len(sessions), SESSIONS_AT_A_TIME):
        some = sessions[index : index + SESSIONS_AT_A_TIME]
        older = select.where(
            table.c.rollout_id == query.rollout_id,
            table.c.session_id.in_(some),
            table.c.seq <= after,
            table.c.at_s >= begin_s,
        )
        for row in connection.execute(older).mappings():
            place = key(dict(row))
            seen[place] = seen.get(place, False) or _is_scored(dict(row))
    return seen


def _firsts(rows: Iterable[Row], seen: dict[Key, bool], key: Callable[[Row], Key]) -> Iterator[Row]:
    """The rows that are units; `seen` is brought up to date on the way."""
    for row in rows:
        place, is_scored = key(row), _is_scored(row)
        if place not in seen or (is_scored and not seen[place]):
            yield row
        seen[place] = seen.get(place, False) or is_scored


def _is_scored(row: Row) -> bool:
    """Whether a row settles its unit; a request always does."""
    return bool(row.get("status", AuditStatus.SCORED.value) == AuditStatus.SCORED.value)
