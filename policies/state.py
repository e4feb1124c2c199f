"""What a rollout remembers between two ticks, and its canonical bytes.

The state is the only memory of `decide`: a controller that is killed and started again from these bytes
goes on as if nothing had happened. Its size does not grow with the number of sessions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from sentei.errors import SenteiError
from sentei.policies.evidence import BetaBinomial, Betting, Detector, Evidence, Interval, Split

SCHEMA = 4
# 1 had no interval; 2 had quarantine as "digest+rung", and no owed_reason; 3 had no arms and no artifact.
READABLE = (1, 2, 3, SCHEMA)
ALL_SLICES = "*"
ARTIFACT = "artifact:"
CellKey = tuple[str, str, str, str]
ALL, SERVED = "all", "served"  # arms of quality: every audited unit, and those that sparse served


class PolicyStateError(SenteiError, ValueError):
    """A state that cannot be used: not readable, or made by another policy."""


@dataclass(frozen=True, slots=True)
class SliceState:
    """How far one slice has fallen back; `ceiling` is the boldest rung it may still use."""

    slice_id: str
    ceiling: str | None = None  # None: no limit of its own
    is_dense: bool = False
    owes_dense: bool = False  # it must go dense as soon as dense is up again
    by: str | None = None  # the guardrail that made it fall back
    served_units: int = 0  # audited units served by sparse in this stage
    upper_units: int = 0  # units of this stage's proof that are in the upper half of the slice
    requests: int = 0  # served in this stage, of any length
    upper_requests: int = 0  # and of the upper half


@dataclass(frozen=True, slots=True)
class Recent:
    """The audits of one part of the window in which missing ones count."""

    number: int  # of the part, since the epoch
    chosen: int = 0
    reasons: tuple[tuple[str, int], ...] = ()  # why audits are missing, and how many

    @property
    def missing(self) -> int:
        """How many of the chosen have no usable score."""
        return sum(count for _, count in self.reasons)


@dataclass(frozen=True, slots=True)
class Cell:
    """All evidence of one guardrail in one slice at one rung ("" where the rung does not matter) and arm.

    Of quality, `safe` and `interval` are of the present phase, all else of the whole try (F15).
    """

    guardrail_id: str
    slice_id: str
    rung_id: str
    harm: Evidence
    safe: Evidence | None = None
    watch: Detector | None = None
    interval: Interval | None = None  # for reports; no decision reads it
    missing: int = 0  # chosen for audit, never scored, or scored with a value that is no number
    candidate_units: int = 0  # of comparisons of two arms: units of the sparse arm
    control_units: int = 0  # and of the dense arm
    arm: str = ALL
    recent: tuple[Recent, ...] = ()  # of audits, oldest first

    @property
    def key(self) -> CellKey:
        """Guardrail, slice, rung, arm."""
        return (self.guardrail_id, self.slice_id, self.rung_id, self.arm)

    @property
    def units(self) -> int:
        """Units that were measured."""
        return self.harm.units

    @property
    def phase_units(self) -> int:
        """Units that were measured since the evidence of safety started."""
        return self.harm.units if self.interval is None else self.interval.units


@dataclass(frozen=True, slots=True)
class DriftTrack:
    """What one drift signal said last, and in how many windows in a row it reported drift."""

    signal_id: str
    status: str = "no_data"
    window_id: int = -1  # the newest window that was counted
    streak: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MetricTrack:
    """A metric of one's own: its newest sample, and since when samples have said the same."""

    metric_id: str
    status: str = "no_data"  # "within" or "out" of its bound; else why the newest sample is no number
    since_s: float = 0.0  # before the first sample: since when it is asked for, if that was in the stage
    at_s: float = 0.0
    value: float | None = None
    seq: int = 0  # of the newest sample that was counted; 0: none yet
    detail: str = ""
    is_lost: bool = False  # that there is no number was said


@dataclass(frozen=True, slots=True, order=True)
class Quarantined:
    """What failed at one rung: it cannot start there again by itself."""

    digest: str  # of the artifact, after ARTIFACT; of the policy where no artifact was known
    rung_id: str


@dataclass(frozen=True, slots=True)
class RolloutState:
    """One rollout at one moment; frozen, small, and equal after a round trip through its bytes."""

    rollout_id: str
    policy_digest: str  # of the policy that decides now
    phase: str
    stage_id: str
    started_s: float
    stage_entered_s: float
    waiting_since_s: float  # when silence began to count: start, resume, retry or the newest data
    version: int = 1  # of the routing table
    outcome: str | None = None  # "promoted", "rolled_back", or "held": paused for want of a gain
    by: str | None = None  # id of the guardrail or signal behind the outcome or the pause, else its kind
    reason: str = "started"
    owed_reason: str | None = None  # sheltered: why it goes back as soon as dense is up again
    paused_at_s: float | None = None
    ended_s: float | None = None
    is_approved: bool = False
    approved_by: str | None = None
    retries: int = 0
    former_tries: int = 0  # of the same artifact, in rollouts before this one
    artifact: str = ""  # digest of what is proven; "": not known yet
    cursor: int = 0
    command_seq: int = 0
    sparse_down_since_s: float | None = None
    dense_down_since_s: float | None = None
    is_blind: bool = False  # silence, or that no audit was scored, was said
    waits_for: str | None = None  # a value of machine.Wait while it is running and does not grow
    revision: int = 0  # the newest edit of the policy that was looked at
    former_digests: tuple[str, ...] = ()  # of the policies before their edits
    slices: tuple[SliceState, ...] = ()
    cells: tuple[Cell, ...] = ()
    drift: tuple[DriftTrack, ...] = ()
    metrics: tuple[MetricTrack, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()

    @property
    def since_s(self) -> float:
        """When the present phase began: its evidence of safety counts from here (F15).

        A first stage has all that the rollout has, also what was written before its first tick.
        """
        if self.stage_entered_s == self.started_s:
            return 0.0
        if self.phase == "promoted" and self.ended_s is not None:
            return self.ended_s
        return self.stage_entered_s

    @property
    def stay(self) -> str:
        """Which stay in which stage it is: what an answer from outside is about."""
        return f"{self.stage_id}, entered at {self.stage_entered_s:.3f}"

    @property
    def try_number(self) -> int:
        """Which try of this artifact it is, from 1."""
        return self.former_tries + self.retries + 1

    def slice_state(self, slice_id: str) -> SliceState:
        """The state of one slice; KeyError if the rollout has none of that id."""
        for item in self.slices:
            if item.slice_id == slice_id:
                return item
        raise KeyError(slice_id)

    def with_slice(self, changed: SliceState) -> RolloutState:
        """The same state with one slice replaced."""
        slices = tuple(changed if item.slice_id == changed.slice_id else item for item in self.slices)
        return replace(self, slices=slices)

    def cell(self, guardrail_id: str, slice_id: str, rung_id: str, arm: str = ALL) -> Cell | None:
        """The evidence of that key, or None before its first unit."""
        key = (guardrail_id, slice_id, rung_id, arm)
        return next((cell for cell in self.cells if cell.key == key), None)


_EVIDENCE: dict[str, Any] = {
    kind.__name__: kind for kind in (Betting, BetaBinomial, Split, Detector, Interval)
}
_PARTS = ("harm", "safe", "watch", "interval")


def state_to_json(state: RolloutState) -> bytes:
    """Canonical bytes: sorted keys, no spaces, ASCII, exact floats; equal states give equal bytes."""
    document = asdict(state) | {"schema": SCHEMA, "cells": [_pack_cell(cell) for cell in state.cells]}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def state_from_json(data: bytes | str) -> RolloutState:
    """The state behind those bytes; PolicyStateError if they are not one of ours."""
    try:
        document = json.loads(data)
        if (schema := document.pop("schema")) not in READABLE:
            raise PolicyStateError(f"a rollout state of schema {SCHEMA} is wanted")
        if schema < SCHEMA:
            _upgrade(document)
        document["slices"] = tuple(SliceState(**item) for item in document["slices"])
        document["drift"] = tuple(DriftTrack(**item) for item in document["drift"])
        document["metrics"] = tuple(MetricTrack(**item) for item in document.get("metrics", ()))
        document["quarantine"] = tuple(Quarantined(**item) for item in document["quarantine"])
        document["former_digests"] = tuple(document["former_digests"])
        document["cells"] = tuple(_unpack_cell(item) for item in document["cells"])
        return RolloutState(**document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PolicyStateError(f"these bytes are no rollout state of schema {SCHEMA}: {error}") from error


def _upgrade(document: dict[str, Any]) -> None:
    """Bring a state of an older schema to this one: what it proved was of its phase, in one arm."""
    kept = document.get("quarantine", ())
    document["quarantine"] = [_split_pair(item) if isinstance(item, str) else item for item in kept]
    document.setdefault("former_digests", [])
    if document["phase"] == "sheltered":
        document.setdefault("owed_reason", document["reason"])
    if document.get("waits_for") == "control":
        document["waits_for"] = "dense"


def _split_pair(text: str) -> dict[str, str]:
    digest, rung_id = text.split("+", 1)
    return {"digest": digest, "rung_id": rung_id}


def _pack_cell(cell: Cell) -> dict[str, Any]:
    packed = asdict(cell)
    for name in _PARTS:
        evidence = getattr(cell, name)
        packed[name] = None if evidence is None else {"kind": type(evidence).__name__} | asdict(evidence)
    return packed


def _unpack_cell(packed: dict[str, Any]) -> Cell:
    for name in _PARTS:
        if packed.get(name) is not None:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in packed[name].items()
            }
            packed[name] = _EVIDENCE[fields.pop("kind")](**fields)
    packed["recent"] = tuple(
        Recent(item["number"], item["chosen"], tuple((word, count) for word, count in item["reasons"]))
        for item in packed.get("recent", ())
    )
    return Cell(**packed)
