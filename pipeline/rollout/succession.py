"""Which rollout may follow which: one at a time, and a promoted one is never dropped without a word.

A start looks at the newest rollout and writes the new one in one transaction, so of two starts at once one
wins and the other is told. The controller that takes up the new rollout closes the one before it with a last
event: only the holder of the lease may add to the log.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sentei.errors import SenteiError
from sentei.monitors.events import EventLog
from sentei.monitors.records import Rollout
from sentei.monitors.store import Store
from sentei.policies.engine import state_from_json, state_to_json
from sentei.policies.state import RolloutState

CLOSED = "close"
REPLACED = "replaced"


class StartRefusedError(SenteiError):
    """Another rollout stands in the way of a start; the message names it and the way out.

    `can_replace` says that it is promoted, so that the start may be asked for again with `replaces`.
    """

    def __init__(self, message: str, *, can_replace: bool = False) -> None:
        super().__init__(message)
        self.can_replace = can_replace


def add_successor(store: Store, rollout: Rollout, *, replaces: bool) -> None:
    """Write a new rollout down, unless the newest one is not over; StartRefusedError says why.

    With `replaces` a promoted rollout may be followed: its share ends when the new one is taken up.
    """
    serves = _what_is_served(store)

    def check(rollout_id: str, state: str | None) -> None:
        _check_is_over(rollout_id, None if state is None else json.loads(state), serves, replaces=replaces)

    if not store.start_rollout(rollout, check):
        raise StartRefusedError(
            f"rollout {rollout.rollout_id!r} exists: wait a second or give another rollout id"
        )


def find_former(store: Store, rollout_id: str) -> str | None:
    """The rollout that was started before this one, or None."""
    ids = [item.rollout_id for item in store.read_rollouts()]
    place = ids.index(rollout_id) if rollout_id in ids else 0
    return ids[place - 1] if place else None


def close_former(store: Store, rollout: Rollout, *, token: int, now_s: float) -> None:
    """Give the rollout before this one its last event, unless it was rolled back or has one already."""
    former = find_former(store, rollout.rollout_id)
    log = EventLog(store)
    event = log.resume(former) if former is not None else None
    if former is None or event is None:
        return
    state = state_from_json(event.state)
    if state.outcome in (REPLACED, "rolled_back"):
        return
    closed = _closed(state, rollout, now_s)
    payload: dict[str, Any] = {
        "before": {name: getattr(state, name) for name in ("phase", "stage_id", "retries", "cursor")},
        "reason": closed.reason,
        "successor": rollout.rollout_id,
    }
    text = state_to_json(closed).decode()
    log.append(former, CLOSED, payload=payload, state_after=text, token=token, at_s=now_s)


def _closed(state: RolloutState, rollout: Rollout, now_s: float) -> RolloutState:
    was = (state.outcome or state.phase).replace("_", " ")
    by = rollout.about.get("started_by", "")
    reason = f"replaced by rollout {rollout.rollout_id}{f', started by {by}' if by else ''}; it was {was}"
    return replace(state, outcome=REPLACED, by=f"rollout:{rollout.rollout_id}", reason=reason, ended_s=now_s)


def _check_is_over(
    rollout_id: str, state: dict[str, Any] | None, serves: dict[str, str], *, replaces: bool
) -> None:
    outcome = state["outcome"] if state is not None else None
    if outcome is None:
        phase = state["phase"] if state is not None else "waiting for the controller's first tick"
        raise StartRefusedError(f"rollout {rollout_id!r} is {phase}; abort it first")
    if outcome in ("promoted", "held") and not replaces:
        what = " and ".join(part for part in (f"is {outcome}", serves.get(rollout_id)) if part)
        raise StartRefusedError(
            f"rollout {rollout_id!r} {what}; a new rollout begins at its own first stage, so that would end "
            "at once. Start with --replace (over HTTP: replace=true) if that is meant; else leave it",
            can_replace=True,
        )


def _what_is_served(store: Store) -> dict[str, str]:
    """What the published routes send to sparse, by rollout id, in words."""
    found = store.read_routing()
    if found is None:
        return {}
    routes = [f"{r.share:.0%} of {r.slice_id} at rung {r.rung_id}" for r in found[0].routes if r.share > 0]
    return {found[0].rollout_id: f"sends {', '.join(routes) or 'nothing'} to sparse"}
