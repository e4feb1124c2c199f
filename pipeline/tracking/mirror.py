"""The event log and the drift reports, replayed into an experiment tracker: a mirror, never the truth.

The mirror keeps its own cursors in the store and moves them only after the tracker has taken everything
before them. While the tracker is away the cursors stand still and decisions go on; when it is back it is
told the rest, and in the end holds the same as if it had never been away. What it refuses for good, such as
anything of a deleted experiment, is said and passed over, event by event.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from sentei.monitors.errors import StoreError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.means import read_means
from sentei.monitors.records import DriftResult, Rollout
from sentei.monitors.store import Store
from sentei.pipeline.reports.rollout_report import build_report, render_html, render_json, routed_share
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.tracking.comparison import (
    NAME_TAG,
    NOTE_TAG,
    decision_figures,
    describe_decision,
    name_decision,
)
from sentei.pipeline.tracking.tracker import MetricPoint, RefusedError, RunSpec, Tracker, TrackingError
from sentei.policies.schema.policy import Policy
from sentei.policies.state import ALL_SLICES, RolloutState, state_from_json

logger = logging.getLogger(__name__)

EVENT_CURSOR = "mirror.events"
DRIFT_CURSOR = "mirror.drift"
BATCH = 100
_COMPARED = ("model", "engine")  # of what is known about a rollout
_EVIDENCE = ("log_e_harm", "log_e_safe", "log_e_watch", "units", "mean")


@dataclass(frozen=True, slots=True)
class StageKey:
    """One stay in one stage."""

    rollout_id: str
    stage_id: str
    retries: int


@dataclass(frozen=True, slots=True)
class Moment:
    """One event, the outcome before it, the state that it left behind, and its points on the charts."""

    event: Event
    former: str | None  # the outcome that stood until then; None: it was under way
    state: RolloutState
    points: tuple[MetricPoint, ...]

    @property
    def has_turned(self) -> bool:
        """Whether it ended, went on after an end, or ended in another way."""
        return self.state.outcome != self.former


@dataclass(frozen=True, slots=True)
class MirrorResult:
    """How much was mirrored, and why it stopped early."""

    num_events: int = 0
    num_drift: int = 0
    reason: str = ""  # "" where everything was mirrored or passed over
    refused: tuple[str, ...] = ()  # why something was passed over, each reason once


class Mirror:
    """Copies one store into one tracker; run it now and then, and once at the end."""

    def __init__(self, store: Store, tracker: Tracker) -> None:
        self._store = store
        self._log = EventLog(store)
        self._tracker = tracker
        self._rollouts: dict[str, Rollout] = {}
        self._book = PolicyBook(store)
        self._has_policy_file: set[str] = set()
        self._refused: dict[str, None] = {}  # reasons of this run, in their order

    def run_once(self) -> MirrorResult:
        """Mirror what is new; a tracker that is away gives a reason instead of an error."""
        num_events = num_drift = 0
        self._refused = {}
        try:
            for batch in self._batches():
                self._mirror_events(batch)
                self._store.save_value(EVENT_CURSOR, str(batch[-1].seq))
                num_events += len(batch)
            num_drift = self._mirror_drift()
        except (TrackingError, StoreError) as error:
            return MirrorResult(num_events, num_drift, str(error), tuple(self._refused))
        return MirrorResult(num_events, num_drift, "", tuple(self._refused))

    def _mirror_events(self, batch: Sequence[Event]) -> None:
        """Mirror a batch; where something in it is refused, each event alone, so that only that is lost."""
        try:
            self._mirror_batch(batch)
        except RefusedError as error:
            if len(batch) == 1:
                self._pass_over(f"event {batch[0].seq} of rollout {batch[0].rollout_id}", error)
                return
            for event in batch:
                self._mirror_events([event])

    def _pass_over(self, what: str, error: RefusedError) -> None:
        if str(error) not in self._refused:
            logger.warning("%s is passed over: %s", what, error)
        self._refused[str(error)] = None

    def _batches(self) -> Iterator[list[Event]]:
        events = self._log.read(after=self._cursor(EVENT_CURSOR))
        for _, of_rollout in groupby(events, key=lambda event: event.rollout_id):
            while batch := list(islice(of_rollout, BATCH)):
                yield batch

    def _cursor(self, name: str) -> int:
        return int(self._store.read_value(name) or 0)

    def _mirror_batch(self, batch: Sequence[Event]) -> None:
        rollout, policy = self._rollout(batch[0].rollout_id)
        parent = self._ensure_parent(rollout, policy)
        moments = self._moments(batch)
        self._tracker.log(parent, (), _tags(moments[-1]))
        course = self._ensure_course(parent, rollout, policy)
        self._tracker.log(course, [p for m in moments for p in m.points], {})
        for stage, members in groupby(moments, key=lambda moment: _stage_key(moment.state)):
            self._mirror_stage(parent, stage, list(members))
        for moment in moments:
            if moment.has_turned:
                self._describe(parent, moment)

    def _mirror_stage(self, parent: str, stage: StageKey, members: Sequence[Moment]) -> None:
        first, last = members[0], members[-1]
        policy = self._policy(first.state)
        left = _stage_key_before(first.event)
        if left is not None and left != stage and first.former is None:  # else it has ended, well or not
            run = self._tracker.ensure_run(
                _experiment(policy), _stage_spec(policy, left, parent, first.event)
            )
            self._tracker.finish(run, first.event.at_s, is_ok=True)
        run = self._tracker.ensure_run(_experiment(policy), _stage_spec(policy, stage, parent, first.event))
        self._tracker.log(run, [point for moment in members for point in moment.points], _tags(last))
        if last.state.outcome or any(moment.has_turned for moment in members):
            self._set_status([run], last)

    def _describe(self, parent: str, moment: Moment) -> None:
        """Say of the rollout's run what stands now, also where a decision stands no more."""
        rollout, policy = self._rollout(moment.event.rollout_id)
        report = build_report(self._store, rollout.rollout_id, upto_event=moment.event.seq)
        if moment.state.outcome and report.rung_id:
            self._tracker.ensure_run(_experiment(policy), _parent_spec(rollout, policy, report.rung_id))
        self._tracker.save_text(parent, render_html(report), "reports/comparison.html")
        self._tracker.save_text(parent, render_json(report), "reports/comparison.json")
        points = list(_points(decision_figures(report), 0, moment.event.at_s))
        tags = {
            NAME_TAG: name_decision(report),
            NOTE_TAG: describe_decision(report),
            "decided": report.decided,
        }
        self._tracker.log(parent, points, tags)
        self._set_status([self._ensure_course(parent, rollout, policy), parent], moment)

    def _set_status(self, run_ids: Sequence[str], moment: Moment) -> None:
        """Mark runs as ended, or as going on where the rollout does."""
        for run_id in run_ids:
            if moment.state.outcome is None:
                self._tracker.reopen(run_id)
            else:
                is_ok = moment.state.outcome != "rolled_back"
                self._tracker.finish(run_id, moment.event.at_s, is_ok=is_ok)

    def _mirror_drift(self) -> int:
        num_results = 0
        for rollout in self._store.read_rollouts():
            cursor_name = f"{DRIFT_CURSOR}.{rollout.rollout_id}"
            for seq, result in self._store.read_drift(rollout.rollout_id, after=self._cursor(cursor_name)):
                try:
                    self._mirror_drift_result(result)
                except RefusedError as error:
                    self._pass_over(f"drift {seq} of rollout {rollout.rollout_id}", error)
                self._store.save_value(cursor_name, str(seq))
                num_results += 1
        return num_results

    def _mirror_drift_result(self, result: DriftResult) -> None:
        rollout, policy = self._rollout(result.rollout_id)
        parent = self._ensure_parent(rollout, policy)
        path = Path(result.html_path)
        if result.html_path and path.is_file():
            self._tracker.save_file(parent, path, "evidently")
        prefix = f"drift/{result.signal_id}"
        values = {
            f"{prefix}/score": result.score,
            f"{prefix}/threshold": result.threshold,
            f"{prefix}/is_drift": float(result.status == "drift"),
        }
        course = self._ensure_course(parent, rollout, policy)
        self._tracker.log(course, list(_points(values, result.window_id, result.at_s)), {})

    def _rollout(self, rollout_id: str) -> tuple[Rollout, Policy]:
        """The rollout and the policy that it was started with."""
        if rollout_id not in self._rollouts:
            rollout = self._store.read_rollout(rollout_id)
            if rollout is None:
                raise LookupError(f"events of rollout {rollout_id!r}, which the store does not know")
            self._rollouts[rollout_id] = rollout
        rollout = self._rollouts[rollout_id]
        return rollout, self._book.first(rollout)

    def _policy(self, state: RolloutState) -> Policy:
        """The policy that decided then: an edit may have changed it."""
        return self._book.find(state.rollout_id, state.policy_digest)

    def _ensure_parent(self, rollout: Rollout, policy: Policy) -> str:
        run_id = self._tracker.ensure_run(_experiment(policy), _parent_spec(rollout, policy))
        if rollout.rollout_id not in self._has_policy_file:
            self._tracker.save_text(run_id, rollout.policy_text, "policy/policy.yaml")
            self._has_policy_file.add(rollout.rollout_id)
        return run_id

    def _ensure_course(self, parent: str, rollout: Rollout, policy: Policy) -> str:
        """The run of what changes from event to event; the rollout's own has only what to compare it by."""
        spec = RunSpec(
            key=f"rollout:{rollout.rollout_id}:course",
            name="course of events",
            start_s=rollout.created_at_s,
            parent_run_id=parent,
            tags={"sentei.kind": "course", "rollout_id": rollout.rollout_id},
        )
        return self._tracker.ensure_run(_experiment(policy), spec)

    def _moments(self, batch: Sequence[Event]) -> list[Moment]:
        """The events of one rollout, each with the outcome that stood before it."""
        first = batch[0]
        before = self._log.decisions(first.rollout_id, before=first.seq, limit=1)
        former = state_from_json(before[0].state).outcome if before else None
        moments = []
        for event in batch:
            moments.append(self._moment(event, former))
            former = moments[-1].state.outcome
        return moments

    def _moment(self, event: Event, former: str | None) -> Moment:
        state = state_from_json(event.state)
        policy = self._policy(state)
        values: dict[str, float | None] = {
            "policy/share": routed_share(policy, state),
            "policy/stage": float(policy.stage_index(state.stage_id)),
            "policy/hold_min_s": policy.stage(state.stage_id).hold_min,
            "policy/audit_share": policy.audit_share(policy.stage(state.stage_id)),
            "policy/dense_slices": float(sum(item.is_dense for item in state.slices)),
        }
        for verdict in event.payload.get("verdicts", ()):
            slice_id = "all" if verdict["slice_id"] == ALL_SLICES else verdict["slice_id"]
            for name in _EVIDENCE:
                values[f"evidence/{verdict['id']}/{slice_id}/{name}"] = verdict[name]
        after = event.payload.get("before", {}).get("cursor", state.cursor)
        values |= read_means(self._store, event.rollout_id, after=after, upto=state.cursor)
        return Moment(event, former, state, tuple(_points(values, event.seq, event.at_s)))


def _points(values: Mapping[str, float | None], step: int, at_s: float) -> Iterator[MetricPoint]:
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            yield MetricPoint(name, float(value), step, at_s)


def _tags(moment: Moment) -> dict[str, str]:
    """What stands after an event; "" where nothing does, as a tag stays until it has another value."""
    state = moment.state
    return {
        "phase": state.phase,
        "stage": state.stage_id,
        "reason": str(moment.event.payload.get("reason", "")),
        "outcome": state.outcome or "",
        "by": state.by or "",
    }


def _experiment(policy: Policy) -> str:
    return policy.spec.record.mlflow.experiment


def _parent_spec(rollout: Rollout, policy: Policy, rung_id: str = "") -> RunSpec:
    """The run of a rollout; `rung_id` is the rung that it reached, "" before it has ended.

    Params are what runs are compared by; digests, folders and people are tags.
    """
    return RunSpec(
        key=f"rollout:{rollout.rollout_id}",
        name=rollout.rollout_id,
        start_s=rollout.created_at_s,
        params={
            "policy": policy.metadata.name,
            **({"rung": rung_id} if rung_id else {}),
            **{name: value for name, value in rollout.about.items() if name in _COMPARED},
        },
        tags={
            "sentei.kind": "rollout",
            "rollout_id": rollout.rollout_id,
            "policy_digest": policy.digest,
            **{name: value for name, value in rollout.about.items() if name not in _COMPARED},
        },
    )


def _stage_key(state: RolloutState) -> StageKey:
    return StageKey(state.rollout_id, state.stage_id, state.retries)


def _stage_key_before(event: Event) -> StageKey | None:
    before = event.payload.get("before")
    return StageKey(event.rollout_id, before["stage_id"], before["retries"]) if before else None


def _stage_spec(policy: Policy, key: StageKey, parent: str, event: Event) -> RunSpec:
    stage = policy.stage(key.stage_id)
    retry = f" (retry {key.retries})" if key.retries else ""
    return RunSpec(
        key=f"rollout:{key.rollout_id}:stage:{key.stage_id}:{key.retries}",
        name=f"{key.stage_id}{retry}",
        start_s=event.at_s,
        parent_run_id=parent,
        params={
            "share": str(stage.share),
            "rung": stage.rung,
            "audit_share": str(policy.audit_share(stage)),
            "hold_min_s": str(stage.hold_min),
        },
        tags={"sentei.kind": "stage", "rollout_id": key.rollout_id},
    )
