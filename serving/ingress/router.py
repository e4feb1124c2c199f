"""Who answers a request. Pure: no clock but the one that is passed in, no I/O, no framework.

slice by prompt tokens -> nested sticky hash of the session -> variant, rung, and the probability with which
the answer will be audited (`draw` draws). All is decided before anything is served.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from sentei.policies.signals import RoutingTable, SliceRoute
from sentei.serving.engine.request import DENSE_RUNG

DENSE, SPARSE = "dense", "sparse"
NO_SLICE = "none"  # prompts that no route of the table covers


@dataclass(frozen=True, slots=True)
class Assignment:
    """What was decided for one request before it was served."""

    variant: str
    rung_id: str  # the rung of the slice's route, also where dense serves: a shadow audit replays it
    slice_id: str = NO_SLICE
    rollout_id: str = ""
    share: float = 0.0
    audit_probability: float = 0.0
    is_audited: bool = False
    span_place: float = 0.0  # of the audited span in its answer: from 0 for its first place to below 1
    artifact: str = ""  # digest of what a sparse replica must run; "": any
    reason: str = ""

    @property
    def serving_rung_id(self) -> str:
        """The rung that the answering variant runs at."""
        return self.rung_id if self.variant == SPARSE else DENSE_RUNG


def position(unit: str, salt: str, purpose: str = "assign") -> float:
    """Return a session's fixed place in [0, 1): growing shares keep the sessions they already have."""
    digest = hashlib.sha256(f"{purpose}\0{salt}\0{unit}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / float(1 << 56)


def find_route(table: RoutingTable, prompt_tokens: int) -> SliceRoute | None:
    """Return the slice that a prompt of this length falls into, or None."""
    return next((r for r in table.routes if r.min_tokens <= prompt_tokens < r.max_tokens), None)


def assign(table: RoutingTable | None, *, prompt_tokens: int, unit: str) -> Assignment:
    """Decide variant and rung for one request; without a table that can be trusted, dense."""
    if table is None:
        return Assignment(DENSE, DENSE_RUNG, reason="no_lease")
    route = find_route(table, prompt_tokens)
    if route is None:
        return Assignment(DENSE, DENSE_RUNG, rollout_id=table.rollout_id, reason="no_slice")
    is_candidate = route.rung_id != DENSE_RUNG and position(unit, table.salt) < route.share
    audit_share = route.audit_share_sparse if is_candidate else route.audit_share
    return Assignment(
        variant=SPARSE if is_candidate else DENSE,
        rung_id=route.rung_id,
        slice_id=route.slice_id,
        rollout_id=table.rollout_id,
        share=route.share,
        audit_probability=audit_share if route.rung_id != DENSE_RUNG else 0.0,
        artifact=table.artifact,
        reason="candidate" if is_candidate else "control",
    )


class Lease:
    """The last routing table, and whether it may still be obeyed.

    Only a growing renewal count proves that a controller lives. A fresh process cannot know how old the table
    is that it finds, so it trusts nothing until it has seen the count grow.
    """

    def __init__(self) -> None:
        self._table: RoutingTable | None = None
        self._renewals: int | None = None
        self._renewed_at_s: float | None = None
        self._read_at_s: float | None = None
        self._stopped: set[str] = set()

    def stop(self, rollout_id: str) -> None:
        """Obey no table of this rollout any more, whatever the store says."""
        self._stopped.add(rollout_id)

    def release(self, rollout_id: str) -> None:
        """Let the store say again what becomes of a rollout."""
        self._stopped.discard(rollout_id)

    def observe(self, table: RoutingTable, renewals: int, now_s: float) -> None:
        """Take in what the store says, read at `now_s` on a monotonic clock."""
        if self._renewals is not None and renewals > self._renewals:
            self._renewed_at_s = now_s
        elif self._renewals is not None and renewals < self._renewals:
            self._renewed_at_s = None  # another store or a restored one: start from nothing
        self._table, self._renewals, self._read_at_s = table, renewals, now_s

    def stamp(self, now_s: float) -> dict[str, Any]:
        """Say which table this is, and how long ago the store was asked for it."""
        if self._table is None or self._read_at_s is None:
            return {}
        return {
            "rollout_id": self._table.rollout_id,
            "version": self._table.version,
            "renewals": self._renewals,
            "read_ago_s": round(now_s - self._read_at_s, 3),
        }

    def table(self, now_s: float) -> RoutingTable | None:
        """Return the table while its lease lasts and nobody stopped its rollout here, else None."""
        is_stopped = self._table is not None and self._table.rollout_id in self._stopped
        return self._table if self.is_fresh(now_s) and not is_stopped else None

    def artifact(self) -> str:
        """Return the digest of what the newest table is bound to, fresh or not; "" if to nothing."""
        return "" if self._table is None else self._table.artifact

    def is_fresh(self, now_s: float) -> bool:
        """Whether the controller renewed the lease within the time that the table itself allows."""
        return (
            self._table is not None
            and self._renewed_at_s is not None
            and now_s - self._renewed_at_s <= self._table.lease_s
        )


class Breaker:
    """Spares users the wait for a variant that has just failed several times in a row.

    One session's failures alone never open it: they may be the session's own.
    Skipped requests still count against the candidate; the rollback itself is the policy's business.
    """

    def __init__(self, *, max_failures: int = 3, open_s: float = 5.0) -> None:
        self._max_failures = max_failures
        self._open_s = open_s
        self._failures: dict[str, int] = {}  # since the last success: of each unit, never enough to trip
        self._opened_at_s = 0.0

    def is_open(self, now_s: float) -> bool:
        """Whether requests should skip the variant; after `open_s` one more try is let through."""
        return self._is_tripped() and now_s - self._opened_at_s < self._open_s

    def record(self, *, is_ok: bool, unit: str, now_s: float) -> None:
        """Take in how one try of a unit ended."""
        if is_ok:
            self._failures.clear()
            return
        if not self._is_tripped():
            self._failures[unit] = min(self._failures.get(unit, 0) + 1, self._max_failures - 1)
        if self._is_tripped():
            self._opened_at_s = now_s

    def _is_tripped(self) -> bool:
        return sum(self._failures.values()) >= self._max_failures


class SeenUnits:
    """Remembers the newest units, so that each is taken for new once."""

    def __init__(self, max_units: int = 50_000) -> None:
        self._max_units = max_units
        self._units: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, unit: Hashable) -> bool:
        """Return whether the unit is new, and remember it."""
        is_new = unit not in self._units
        self._units[unit] = None
        self._units.move_to_end(unit)
        if len(self._units) > self._max_units:
            self._units.popitem(last=False)
        return is_new
