"""Any policy over a recorded rollout: the same sessions at the same times, and where the decisions part.

The log says up to which record each event had read, so there a replay has read the same. Between two events
it ticks at its own `check_every` and reads what was written by then, so that evidence, times and holds of
the other policy run as they would have, to the end of the records. What people were served is history: a
replayed share changes no record. So quality evidence is what that policy would have had, whereas operational
evidence is that of the shares of then, and a guardrail over two arms is meant only while both stand at one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import FAILED_OUTCOMES
from sentei.monitors.signals_reader import read_signals
from sentei.monitors.store import Store
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import RolloutError, event_kind, signal_query
from sentei.policies.engine import Decision, RolloutState, decide, initial_state, state_from_json
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import DriftSignal, MetricSample, Signals, VariantHealth

MAX_TICKS_BETWEEN = 1000  # two events; a longer silence is walked in longer steps
QUIET = "evidence"
REPLICAS = {"dense": 1, "sparse": 1}  # how many there were is not recorded


@dataclass(frozen=True, slots=True)
class Step:
    """One decision that did something; of growing evidence nothing is kept."""

    at_s: float
    kind: str
    stage_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replay:
    """Two histories of one rollout."""

    rollout_id: str
    is_same_policy: bool
    recorded: tuple[Step, ...]
    replayed: tuple[Step, ...]
    recorded_end: str  # outcome, or the phase it is in
    replayed_end: str
    ticks: int
    tolerance_s: float  # checks are not on the second

    @property
    def first_difference(self) -> int | None:
        """Which decision is the first that differs in what, or when, or at which stage; None if none does."""
        pairs = zip(self.recorded, self.replayed, strict=False)
        for index, (old, new) in enumerate(pairs):
            is_late = abs(old.at_s - new.at_s) > self.tolerance_s
            if is_late or (old.kind, old.stage_id) != (new.kind, new.stage_id):
                return index
        shorter = min(len(self.recorded), len(self.replayed))
        return None if len(self.recorded) == len(self.replayed) else shorter


def replay(store: Store, rollout_id: str, policy: Policy) -> Replay:
    """Decide a recorded rollout again by `policy`; nothing is written."""
    events = list(EventLog(store).read(rollout_id))
    if not events:
        known = ", ".join(item.rollout_id for item in store.read_rollouts()[-5:]) or "none"
        raise RolloutError(f"rollout {rollout_id!r} has no events in {store.url}; the newest are: {known}.")
    if (before_s := store.read_pruned(rollout_id)) is not None and before_s > events[0].at_s:
        moment = datetime.fromtimestamp(before_s, UTC).strftime("%Y-%m-%d %H:%M")
        raise RolloutError(
            f"rollout {rollout_id!r} cannot be replayed: its records of before {moment} UTC were pruned; "
            "replay it on a backup of before."
        )
    first, last = state_from_json(events[0].state), state_from_json(events[-1].state)
    state = replace(
        initial_state(policy, rollout_id, first.started_s), cursor=first.cursor, command_seq=first.command_seq
    )
    past = _Past(store, rollout_id, policy)
    steps: list[Step] = []
    ticks = 0
    for at_s, signals in past.read(events):
        decision = decide(policy, state, signals, at_s)
        steps += _steps(decision, at_s)
        state, ticks = decision.state, ticks + 1
    recorded = PolicyBook(store).find(rollout_id, first.policy_digest)
    return Replay(
        rollout_id=rollout_id,
        is_same_policy=recorded.own_digest == policy.own_digest,
        recorded=tuple(step for event in events[1:] for step in _recorded(event)),
        replayed=tuple(steps),
        recorded_end=last.outcome or last.phase,
        replayed_end=state.outcome or state.phase,
        ticks=ticks,
        tolerance_s=policy.spec.schedule.check_every,
    )


class _Past:
    """What the store held at any moment of a rollout, as its ticks had read it."""

    def __init__(self, store: Store, rollout_id: str, policy: Policy) -> None:
        self._store, self._policy = store, policy
        self._every_s = policy.spec.schedule.check_every
        self._query = signal_query(
            policy, rollout_id, replicas=REPLICAS, audit_limit_s=math.inf
        )  # nothing is overdue: what was given up then is written as missing
        rows = store.read_requests(rollout_id)
        self._requests = sorted(
            (float(row["at_s"]), str(row["variant_assigned"]), row["outcome"] in FAILED_OUTCOMES)
            for row in rows
        )
        audits = [(int(row["seq"]), float(row["at_s"])) for row in store.read_audits(rollout_id)]
        ends = [(int(row["seq"]), float(row["at_s"])) for row in rows]
        self._written: list[tuple[int, float]] = []  # number and when it was there, both growing
        for seq, at_s in sorted([*audits, *ends]):
            self._written.append((seq, max(at_s, self._written[-1][1]) if self._written else at_s))
        self._samples = [
            MetricSample(seq, item.metric_id, item.at_s, item.status, item.value, item.detail)
            for seq, item in store.read_metrics(rollout_id)
        ]
        self._num_sampled = 0
        self._drift = [item for _, item in store.read_drift(rollout_id)]

    def read(self, events: Sequence[Event]) -> Iterator[tuple[float, Signals]]:
        """What each event had read, and what ticks between two events, and after the last, can have read."""
        before = state_from_json(events[0].state)
        since_s, cursor = events[0].at_s, before.cursor
        for event in events[1:]:
            after = state_from_json(event.state)
            for at_s in _between(since_s, event.at_s, self._every_s):
                upto = min(self._written_by(at_s), after.cursor)
                yield at_s, replace(self._signals(cursor, upto, before, at_s), commands=())
                cursor = max(cursor, upto)
            found = self._signals(cursor, after.cursor, before, event.at_s)
            orders = tuple(item for item in found.commands if item.seq <= after.command_seq)
            yield event.at_s, replace(found, commands=orders, newest_data_at_s=after.waiting_since_s)
            before, since_s, cursor = after, event.at_s, max(cursor, after.cursor)
        end_s = self._written[-1][1] if self._written else since_s
        for at_s in _between(since_s, end_s + self._every_s, self._every_s):
            upto = max(self._written_by(at_s), cursor)
            yield at_s, replace(self._signals(cursor, upto, before, at_s), commands=())
            cursor = upto

    def _signals(self, cursor: int, upto: int, before: RolloutState, at_s: float) -> Signals:
        """The records above a cursor, as far as `upto`, and the orders that were not obeyed yet."""
        found = read_signals(
            self._store,
            replace(self._query, num_numbers=max(upto - cursor, 0), since_s=before.since_s),
            cursor=cursor,
            command_cursor=before.command_seq,
            now_s=at_s,
        )
        return replace(
            found,
            health=self._health(at_s),
            drift=self._windows(at_s),
            samples=self._sampled(at_s),
            cursor=max(upto, cursor),
            newest_data_at_s=self._newest_by(at_s),
        )

    def _sampled(self, at_s: float) -> tuple[MetricSample, ...]:
        """What metrics of one's own were since the last call, as far as that moment."""
        begin = self._num_sampled
        self._num_sampled = bisect.bisect_right(self._samples, at_s, lo=begin, key=lambda item: item.at_s)
        return tuple(self._samples[begin : self._num_sampled])

    def _written_by(self, at_s: float) -> int:
        """The number up to which every record was there at that moment."""
        index = bisect.bisect_right(self._written, at_s, key=lambda row: row[1])
        return self._written[index - 1][0] if index else 0

    def _newest_by(self, at_s: float) -> float | None:
        index = bisect.bisect_right(self._written, at_s, key=lambda row: row[1])
        return self._written[index - 1][1] if index else None

    def _health(self, at_s: float) -> tuple[VariantHealth, ...]:
        window_s = self._policy.spec.breaker.variant.window
        begin = bisect.bisect_right(self._requests, at_s - window_s, key=lambda row: row[0])
        end = bisect.bisect_right(self._requests, at_s, key=lambda row: row[0])
        rows = self._requests[begin:end]
        return tuple(
            VariantHealth(
                variant,
                window_s,
                sum(row[1] == variant for row in rows),
                sum(row[1] == variant and row[2] for row in rows),
                replicas,
            )
            for variant, replicas in REPLICAS.items()
        )

    def _windows(self, at_s: float) -> tuple[DriftSignal, ...]:
        """The newest window of each check at that moment."""
        newest = {item.signal_id: item for item in self._drift if item.at_s <= at_s}
        return tuple(
            DriftSignal(
                item.signal_id,
                item.status,
                item.score,
                item.threshold,
                item.window_units,
                item.window_id,
                item.detail,
            )
            for item in newest.values()
        )


def _between(begin_s: float, end_s: float, every_s: float) -> Iterator[float]:
    """The checks strictly between two moments."""
    step = max(every_s, (end_s - begin_s) / MAX_TICKS_BETWEEN)
    index = 1
    while begin_s + index * step < end_s - step / 2:  # the check that is the event itself comes after
        yield begin_s + index * step
        index += 1


def _steps(decision: Decision, at_s: float) -> tuple[Step, ...]:
    if not decision.actions:
        return ()
    return (Step(at_s, event_kind(decision), decision.state.stage_id, decision.reason),)


def _recorded(event: Event) -> tuple[Step, ...]:
    if event.kind == QUIET or not event.payload.get("actions"):
        return ()
    stage_id = state_from_json(event.state).stage_id
    return (Step(event.at_s, event.kind, stage_id, str(event.payload.get("reason", ""))),)


def to_difference(found: Replay) -> dict[str, Any]:
    """The two histories as plain values, side by side from where they part."""
    index = found.first_difference
    return {
        "rollout_id": found.rollout_id,
        "same_policy": found.is_same_policy,
        "ticks": found.ticks,
        "recorded": {"outcome": found.recorded_end, "decisions": [_plain(s) for s in found.recorded]},
        "replayed": {"outcome": found.replayed_end, "decisions": [_plain(s) for s in found.replayed]},
        "first_difference": index,
    }


def _plain(step: Step) -> dict[str, Any]:
    return {"at_s": step.at_s, "kind": step.kind, "stage_id": step.stage_id, "reason": step.reason}
