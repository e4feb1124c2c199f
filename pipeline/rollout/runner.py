"""One tick of a rollout: read, decide, append, publish; once each, and nothing is kept in memory in between.

State is what the newest event left behind. Whatever happens between two steps, the next tick starts from
that event and comes to the same place: reading the same cursor gives the same observations, and
publishing is repeatable. So a tick in which only evidence has grown need not be written down: the next one
reads the same sessions again and adds its own. Every decision is an event, every change of what the rollout
waits for, and every thing that was seen only at that moment; evidence alone is one now and then (`is_kept`).
A store that does not answer means no renewal of the router's lease, so traffic goes dense by itself.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError
from sentei.monitors.drift import DriftSpec, run_drift
from sentei.monitors.errors import StoreError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import ROLLOUT_ID, DriftResult, Rollout
from sentei.monitors.signals_reader import SignalQuery, read_signals
from sentei.monitors.store import Store
from sentei.pipeline.plain import to_plain
from sentei.pipeline.rollout.revisions import STARTED, PolicyBook, take_revision
from sentei.pipeline.rollout.succession import REPLACED, add_successor, close_former
from sentei.policies.engine import (
    Decision,
    RolloutState,
    decide,
    initial_state,
    routing,
    state_from_json,
    state_to_json,
)
from sentei.policies.machine import Phase
from sentei.policies.schema.kept import keep_policy
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import Signals
from sentei.policies.state import ARTIFACT, MetricTrack, Quarantined

logger = logging.getLogger(__name__)

EVIDENCE = "evidence"
HOLD = "hold"
MIN_AUDIT_LIMIT_S = 60.0
ARTIFACT_NAME = (
    "artifact"  # in what is kept about a rollout: the digest of what sparse ran when it was started
)
KEEP_TICKS = 10  # evidence alone is kept every tenth tick, or once per data.max_age if that is sooner
KEEP_NUMBERS = 1_000  # and whenever so many numbers of the store were read: bounds what is read again
TAKE_UP = "take_up"
MACHINE = "machine."  # + rollout id: whose clock its newest controller went by
LOOK = "look."  # + rollout id: what the newest tick saw, overwritten by the next one; no part of the log


class RolloutError(SenteiError):
    """A rollout that cannot be run as asked; the message names it and the way out."""


@dataclass(frozen=True, slots=True)
class TickResult:
    """What one tick did; exactly one of decision, waiting for the lease, or error."""

    decision: Decision | None = None
    event: Event | None = None  # what was appended; None where nothing changed
    has_lease: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What the policy does not say: who runs it, and what only the running system knows."""

    owner: str  # unique per process: two controllers of one name would not fence each other
    replicas: Callable[[], Mapping[str, int]] = field(default=lambda: {"dense": 1, "sparse": 1})
    audit_limit_s: float | None = None  # default: data.max_age, at least a minute
    artifact: Callable[[], str] = field(default=lambda: "")  # digest of what sparse runs; "": not known
    machine: str = ""  # whose monotonic clock it goes by; "": not known, and no other is looked for


def start_rollout(
    store: Store,
    policy_text: str,
    *,
    now_s: float,
    about: Mapping[str, str] | None = None,
    rollout_id: str | None = None,
    releases_quarantine: bool = False,
    replaces: bool = False,
) -> Rollout:
    """Write a rollout down; the controller takes up the newest one.

    Raises PolicyError, RolloutError for an id that cannot name a folder, QuarantineError if this policy was
    rolled back at one of its rungs before and the operator does not release it, and StartRefusedError while
    another rollout is not over, or is promoted and the operator does not say that this one `replaces` it.
    """
    policy = load_policy(policy_text, "policy")
    moment = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%d-%H%M%S")
    rollout_id = rollout_id or f"{policy.metadata.name}-{moment}"
    if not re.fullmatch(ROLLOUT_ID, rollout_id):
        raise RolloutError(
            f"rollout id {rollout_id!r} cannot be used: give 1 to 100 letters, digits, dots, dashes or _."
        )
    if not releases_quarantine:
        artifact = (about or {}).get(ARTIFACT_NAME, "")
        initial_state(policy, rollout_id, now_s, quarantine=read_quarantine(store), artifact=artifact)
    rollout = Rollout(
        rollout_id=rollout_id,
        policy_text=policy_text,
        created_at_s=now_s,
        about=dict(about or {}),
    )
    add_successor(store, rollout, replaces=replaces)
    return rollout


def read_quarantine(store: Store) -> tuple[Quarantined, ...]:
    """Return what was rolled back in this store, by the digest of then and by the one it would have today."""
    log, book = EventLog(store), PolicyBook(store)
    found: set[Quarantined] = set()
    for rollout in store.read_rollouts():
        text = log.latest_state(rollout.rollout_id)
        for item in state_from_json(text).quarantine if text is not None else ():
            found.add(item)
            if not item.digest.startswith(ARTIFACT):
                policy = book.find(rollout.rollout_id, item.digest)
                found.add(replace(item, digest=policy.own_digest))
    return tuple(sorted(found))


def count_tries(store: Store, artifact: str, *, before: str) -> int:
    """Return how many tries of an artifact failed in other rollouts of this store: they share alpha_total."""
    if not artifact:
        return 0
    log = EventLog(store)
    texts = (log.latest_state(r.rollout_id) for r in store.read_rollouts() if r.rollout_id != before)
    states = (state_from_json(text) for text in texts if text is not None)
    return sum(
        state.retries + 1
        for state in states
        if any(item.digest == f"{ARTIFACT}{artifact}" for item in state.quarantine)
    )


class RolloutRunner:
    """Runs one rollout; `tick` never raises."""

    def __init__(self, store: Store, rollout: Rollout, options: RunnerOptions) -> None:
        self.rollout = rollout
        self.num_errors = 0
        self._store = store
        self._log = EventLog(store)
        self._book = PolicyBook(store)
        self.policy = self._book.first(rollout)
        self._options = options
        self._is_taken_up = False

    @classmethod
    def open(cls, store: Store, rollout_id: str, options: RunnerOptions) -> RolloutRunner:
        """Take up a rollout that was started before, in this process or in another."""
        rollout = store.read_rollout(rollout_id)
        if rollout is None:
            known = ", ".join(repr(r.rollout_id) for r in store.read_rollouts()[-5:]) or "none"
            raise RolloutError(
                f"rollout {rollout_id!r} is not in store {store.url}; the newest are: {known}."
            )
        return cls(store, rollout, options)

    def tick(self, now_s: float) -> TickResult:
        """Read, decide, append, publish; an error is logged and counted, and the next tick tries again."""
        try:
            token = self._store.acquire_lease(
                self._options.owner, ttl_s=self.policy.spec.data.monitor_lease, now_s=now_s
            )
            if token is None:
                return TickResult(has_lease=False)
            state, kept_at_s = self._resume(token, now_s)
            state = self._revise(state, token, now_s)
            decision = decide(self.policy, state, self._read(state, now_s), now_s)
            event = None
            if is_kept(self.policy, state, decision, since_s=now_s - kept_at_s):
                event = self._append(state, decision, token, now_s)
            self._store.publish_routing(routing(self.policy, decision.state), token=token, now_s=now_s)
            if decision.changed and event is None:
                self._store.save_value(f"{LOOK}{self.rollout.rollout_id}", _look(decision, now_s))
        except Exception as error:
            # One of the two places where everything is caught: the loop must outlive any fault, and without
            # a renewal the router is dense by itself.
            self.num_errors += 1
            logger.warning("tick %s of %s failed: %s", self.num_errors, self.rollout.rollout_id, error)
            return TickResult(error=f"{type(error).__name__}: {error}")
        return TickResult(decision, event)

    def check_drift(self, folder: Path, now_s: float) -> list[DriftResult]:
        """Run the policy's drift checks that have a new full window; seconds long, so run it in a thread."""
        return run_drift(
            self._store, self.rollout.rollout_id, drift_specs(self.policy), folder=folder, now_s=now_s
        )

    def state(self) -> RolloutState | None:
        """Return the newest state, or None before the first tick."""
        text = self._log.latest_state(self.rollout.rollout_id)
        return None if text is None else state_from_json(text)

    def _resume(self, token: int, now_s: float) -> tuple[RolloutState, float]:
        """Return the state of the newest event and its time; the first event if there is none."""
        event = self._log.resume(self.rollout.rollout_id)
        if event is not None:
            state = state_from_json(event.state)
            if state.outcome == REPLACED:
                raise RolloutError(f"rollout {state.rollout_id!r} is over: {state.reason}.")
            if state.policy_digest != self.policy.digest:  # edited, by this controller or another
                self.policy = self._book.find(self.rollout.rollout_id, state.policy_digest)
            return self._take_up(state, token, now_s), event.at_s
        close_former(self._store, self.rollout, token=token, now_s=now_s)
        name = self.rollout.rollout_id
        former_tries = count_tries(self._store, self._options.artifact(), before=name)
        state = initial_state(self.policy, name, now_s, former_tries=former_tries)
        payload = {
            "reason": "started",
            "created_at_s": self.rollout.created_at_s,
            "about": self.rollout.about,
            **keep_policy(self.policy, self.rollout.policy_text),
        }
        self._write(state, STARTED, payload, token=token, now_s=now_s)
        return self._take_up(state, token, now_s), now_s

    def _take_up(self, state: RolloutState, token: int, now_s: float) -> RolloutState:
        """Once per process: what passed while nobody looked is no time of a hold where it cannot be known.

        Within one start of one machine the monotonic clock has counted it. Elsewhere only wall clocks tell,
        and they step: a hold that one step of them would end has not been held.
        """
        machine, name = self._options.machine, f"{MACHINE}{self.rollout.rollout_id}"
        if self._is_taken_up or not machine:
            return state
        former = self._store.read_value(name)
        if former not in (None, machine) and state.phase == Phase.RUNNING:
            seen_s = self._store.read_renewed_at(self.rollout.rollout_id) or state.stage_entered_s
            gap_s = max(0.0, now_s - max(seen_s, state.stage_entered_s))
            gap = format_duration(round(gap_s))
            text = f"taken up by another machine: {gap} unwatched are no time of a hold"
            state = replace(state, stage_entered_s=state.stage_entered_s + gap_s)
            self._write(state, TAKE_UP, {"reason": text, "actions": []}, token=token, now_s=now_s)
        if former != machine:
            self._store.save_value(name, machine)
        self._is_taken_up = True
        return state

    def _revise(self, state: RolloutState, token: int, now_s: float) -> RolloutState:
        """Take or refuse the edits that wait, each as an event of its own."""
        for revision in self._store.read_revisions(self.rollout.rollout_id, after=state.revision):
            taken = take_revision(self.policy, state, revision, now_s)
            self._write(taken.state, taken.kind, taken.payload, token=token, now_s=now_s)
            self.policy, state = taken.policy, taken.state
        return state

    def _read(self, state: RolloutState, now_s: float) -> Signals:
        query = signal_query(
            self.policy,
            self.rollout.rollout_id,
            replicas=self._options.replicas(),
            audit_limit_s=self._options.audit_limit_s,
            since_s=state.since_s,
            artifact=self._options.artifact(),
        )
        query = replace(query, metrics={track.metric_id: track.seq for track in state.metrics})
        try:
            return read_signals(
                self._store, query, cursor=state.cursor, command_cursor=state.command_seq, now_s=now_s
            )
        except StoreError as error:
            return Signals(cursor=state.cursor, read_error=str(error))

    def _append(self, before: RolloutState, decision: Decision, token: int, now_s: float) -> Event:
        kind, payload = event_kind(decision, before), event_payload(before, decision)
        return self._write(decision.state, kind, payload, token=token, now_s=now_s)

    def _write(
        self, state: RolloutState, kind: str, payload: dict[str, Any], *, token: int, now_s: float
    ) -> Event:
        return self._log.append(
            self.rollout.rollout_id,
            kind,
            payload=payload,
            state_after=state_to_json(state).decode(),
            token=token,
            at_s=now_s,
        )


def is_kept(policy: Policy, before: RolloutState, decision: Decision, *, since_s: float) -> bool:
    """Whether a decision must be written down: it did or waits for something else, saw what cannot be read
    again, or the evidence since the last event is old or long.
    """
    after = decision.state
    if decision.actions or _without_evidence(after) != _without_evidence(before):
        return True
    if not decision.changed:
        return False
    every_s = min(policy.spec.data.max_age, KEEP_TICKS * policy.spec.schedule.check_every)
    return not 0 <= since_s < every_s or after.cursor - before.cursor >= KEEP_NUMBERS


def _without_evidence(state: RolloutState) -> RolloutState:
    """The state without what reading the same cursor again gives back."""
    slices = tuple(
        replace(item, served_units=0, upper_units=0, requests=0, upper_requests=0) for item in state.slices
    )
    metrics = tuple(MetricTrack(item.metric_id, item.status, is_lost=item.is_lost) for item in state.metrics)
    return replace(state, cells=(), cursor=0, waiting_since_s=0.0, slices=slices, metrics=metrics)


def _look(decision: Decision, now_s: float) -> str:
    seen = {"at_s": now_s, "reason": decision.reason, "verdicts": to_plain(decision.verdicts)}
    return json.dumps(seen, sort_keys=True)


def read_look(store: Store, rollout_id: str, *, after_s: float) -> dict[str, Any] | None:
    """Return what the newest tick saw, if that was after the newest event; for display only."""
    text = store.read_value(f"{LOOK}{rollout_id}")
    look: dict[str, Any] | None = None if text is None else json.loads(text)
    return look if look is not None and look["at_s"] > after_s else None


def event_kind(decision: Decision, before: RolloutState | None = None) -> str:
    """Return the name of what was decided: the last deed, else a refusal, a new wait, or more evidence."""
    if decision.actions:
        deeds = [item.kind for item in decision.actions if item.kind != "refuse"]
        return str(deeds[-1] if deeds else "refuse")
    is_new_wait = before is not None and decision.state.waits_for != before.waits_for
    return HOLD if is_new_wait else EVIDENCE


def event_payload(before: RolloutState, decision: Decision) -> dict[str, Any]:
    """Return the decision with its evidence as plain values, and where it came from."""
    return {
        "before": {name: getattr(before, name) for name in ("phase", "stage_id", "retries", "cursor")},
        "reason": decision.reason,
        "waits_for": decision.state.waits_for,
        "actions": to_plain(decision.actions),
        "verdicts": to_plain(decision.verdicts),
        "metrics": to_plain(decision.state.metrics),
    }


def signal_query(
    policy: Policy,
    rollout_id: str,
    *,
    replicas: Mapping[str, int],
    audit_limit_s: float | None = None,
    since_s: float = 0.0,
    artifact: str = "",
) -> SignalQuery:
    """Return what has to be read for a policy in the phase that began at `since_s`."""
    spec = policy.spec
    names = {item.value for item in spec.guardrails.items} | {item.value for item in spec.benefit}
    return SignalQuery(
        rollout_id=rollout_id,
        value_names=frozenset(names),
        health_window_s=spec.breaker.variant.window,
        audit_limit_s=max(MIN_AUDIT_LIMIT_S, spec.data.max_age) if audit_limit_s is None else audit_limit_s,
        replicas=replicas,
        since_s=since_s,
        unit_period_s=spec.audit.select.period,
        borders={item.id: item.middle for item in policy.routed_slices},
        artifact=artifact,
    )


def drift_specs(policy: Policy) -> tuple[DriftSpec, ...]:
    """Return the policy's drift checks, each with the excess that its guardrails allow on that column."""
    return tuple(
        DriftSpec(
            signal_id=signal.id,
            column=signal.column,
            window_units=signal.window_units,
            allowed_excess=_allowed_excess(policy, signal.column),
        )
        for signal in policy.spec.signals
    )


def _allowed_excess(policy: Policy, column: str) -> float | None:
    bounds = [item.bound for item in policy.spec.guardrails.items if item.value == f"audit.{column}"]
    allowed = [b.excess_over_floor or b.max for b in bounds if b is not None]
    return min((value for value in allowed if value is not None), default=None)
