"""The event log, read as news: what of each event people are told. Pure: no clock, no store, no network.

A `Place` is how far somebody has read. It holds what the next event is compared with, so a reader that
stopped anywhere goes on and says the same; the id of a notice is made of the hash of its event.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sentei.monitors.events import Event
from sentei.policies.machine import Phase, Wait
from sentei.policies.schema.integrations.notify import HELD_LONG
from sentei.policies.state import RolloutState, state_from_json
from sentei.policies.steps.tick import ALERT, AUDITS_BLIND, DENSE_DOWN

_DEEDS = {  # of an action: what it is called in a policy's `events`
    "rollback": "rolled_back",
    "rung_down": "slice_fell",
    "to_dense": "slice_fell",
    "shelter": "sheltered",
    "pause": "paused",
    "held": "paused",
    "promote": "promoted",
    "lost_metric": "metric_lost",
}
_STANDS = (Phase.RUNNING, Phase.PAUSED, Phase.SHELTERED)  # in these a rollout may be held for too long


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to tell."""

    notice_id: str  # the same whenever it is told again
    kind: str  # a Happening of the policy, or HELD_LONG
    at_s: float
    rollout_id: str
    event_seq: int
    event_hash: str
    policy_digest: str
    phase: str
    stage_id: str
    reason: str
    slice_id: str | None = None
    by: str | None = None
    outcome: str | None = None
    waits_for: str | None = None
    held_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stay:
    """A stretch in one phase of one stage."""

    key: str
    event_hash: str
    seq: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Place:
    """How far a log was read: all events up to `seq`, and of the next one so many notices."""

    seq: int = 0
    told: int = 0
    stay: Stay | None = None
    is_stay_told: bool = False
    waits_for: str | None = None
    is_blind: bool = False
    is_dense_down: bool = False

    def to_json(self) -> str:
        """The place as it is kept."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None) -> Place:
        """The place behind those bytes; the beginning where there are none."""
        if text is None:
            return cls()
        fields: dict[str, Any] = json.loads(text)
        stay = fields.pop("stay")
        return cls(**fields, stay=None if stay is None else Stay(**stay))


def read_event(place: Place, event: Event) -> tuple[tuple[Notice, ...], Place]:
    """All that an event has to tell, in the order in which it happened, and the place behind it."""
    state = state_from_json(event.state)
    found = tuple(_number(event, state, _happenings(place, event, state)))
    key = f"{state.phase}/{state.stage_id}/{state.retries}"
    stay = place.stay
    if stay is None or stay.key != key:
        stay = Stay(key, event.hash, event.seq, event.at_s)
    after = Place(
        seq=event.seq,
        stay=stay,
        is_stay_told=place.is_stay_told and stay == place.stay,
        waits_for=state.waits_for,
        is_blind=state.is_blind,
        is_dense_down=state.dense_down_since_s is not None,
    )
    return found, after


def read_time(place: Place, last: Event | None, limit_s: float | None, now_s: float) -> Notice | None:
    """That a rollout has stood in one stage for longer than `limit_s`, once; `last`: the event at `place`."""
    if limit_s is None or last is None or place.stay is None or place.is_stay_told:
        return None
    held_s = now_s - place.stay.since_s
    state = state_from_json(last.state)
    if held_s < limit_s or Phase(state.phase) not in _STANDS or state.outcome == "replaced":
        return None
    return Notice(
        notice_id=_notice_id(place.stay.event_hash, HELD_LONG),
        kind=HELD_LONG,
        at_s=place.stay.since_s + limit_s,
        reason=str(last.payload.get("reason", "")),
        held_s=limit_s,
        **_of_state(last, state),
    )


def told_time(place: Place) -> Place:
    """The same place after it was told that its stay is long."""
    return replace(place, is_stay_told=True)


def _happenings(place: Place, event: Event, state: RolloutState) -> Iterator[tuple[str, str, str | None]]:
    """Kind, reason and slice of what happened."""
    # Alerts of logs that were written before they said what they are about: in the order of the steps.
    alerts = []
    if state.dense_down_since_s is not None and not place.is_dense_down:
        alerts.append(DENSE_DOWN)
    if state.is_blind and not place.is_blind:
        alerts.append(AUDITS_BLIND)
    for action in event.payload.get("actions", ()):
        if action["kind"] == ALERT:
            about = action.get("about") or (alerts.pop(0) if alerts else None)
            if about is not None:
                yield about, action["detail"], None
        elif action["kind"] in _DEEDS:
            yield _DEEDS[action["kind"]], action["detail"], action["slice_id"]
    if state.waits_for == Wait.APPROVAL and place.waits_for != Wait.APPROVAL:
        yield "approval_wanted", str(event.payload.get("reason", "")), None


def _number(
    event: Event, state: RolloutState, found: Iterator[tuple[str, str, str | None]]
) -> Iterator[Notice]:
    for number, (kind, reason, slice_id) in enumerate(found):
        yield Notice(
            notice_id=_notice_id(event.hash, str(number)),
            kind=kind,
            at_s=event.at_s,
            reason=reason,
            slice_id=slice_id,
            **_of_state(event, state),
        )


def _of_state(event: Event, state: RolloutState) -> dict[str, Any]:
    return {
        "rollout_id": event.rollout_id,
        "event_seq": event.seq,
        "event_hash": event.hash,
        "policy_digest": state.policy_digest,
        "phase": state.phase,
        "stage_id": state.stage_id,
        "by": state.by,
        "outcome": state.outcome,
        "waits_for": state.waits_for,
    }


def _notice_id(event_hash: str, part: str) -> str:
    """No full stop in it: the signature is made over id, time and body with full stops between them."""
    return f"ntc_{hashlib.sha256(f'{event_hash}/{part}'.encode()).hexdigest()[:32]}"
