"""One tick on its way through the steps: what it read, what it changed so far, why nothing grows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sentei.policies.judge import GuardrailReport
from sentei.policies.machine import Event, Phase, SliceEvent, SlicePhase, next_phase, next_slice_phase
from sentei.policies.schema import Policy
from sentei.policies.signals import Command, Signals
from sentei.policies.state import RolloutState


@dataclass(frozen=True, slots=True)
class Action:
    """Something that happened and that the world should hear of; the routing table follows from the state."""

    kind: str  # advance, promote, rollback, rung_down, to_dense, pause, resume, approve, retry, refuse
    detail: str
    slice_id: str | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick in progress; every step returns a new one."""

    policy: Policy
    state: RolloutState
    signals: Signals
    now_s: float
    reports: tuple[GuardrailReport, ...] = ()
    actions: tuple[Action, ...] = ()
    approvals: tuple[Command, ...] = ()  # orders to approve that wait for the gate
    hold: str | None = None  # why nothing grows
    is_done: bool = False
    outcome: str | None = None  # the reason once something has happened

    @property
    def reason(self) -> str:
        """What this tick decided, in one sentence with its numbers."""
        return self.outcome or self.hold or self.state.reason

    def with_hold(self, reason: str) -> Tick:
        """The same tick, holding; the first reason stays."""
        return self if self.hold is not None else replace(self, hold=reason)

    def with_action(self, kind: str, detail: str, slice_id: str | None = None) -> Tick:
        """The same tick with one more thing to tell."""
        return replace(self, actions=(*self.actions, Action(kind, detail, slice_id)))

    def ended(self, reason: str) -> Tick:
        """The same tick, finished: no later step looks at it."""
        return replace(self, is_done=True, outcome=reason)


def effective_rung(policy: Policy, state: RolloutState, slice_id: str) -> str:
    """The rung of a slice now: the mildest of the stage's, its own limit and its ceiling; or "dense"."""
    item = next(item for item in policy.routed_slices if item.id == slice_id)
    own = state.slice_state(slice_id)
    if own.is_dense:
        return "dense"
    limits = [policy.stage(state.stage_id).rung, item.max_rung, own.ceiling]
    return min((rung for rung in limits if rung is not None), key=policy.rung_ids.index)


def active_slices(policy: Policy, state: RolloutState) -> tuple[str, ...]:
    """The slices that are still routed."""
    return tuple(item.id for item in policy.routed_slices if not state.slice_state(item.id).is_dense)


def roll_back(tick: Tick, by: str, reason: str) -> Tick:
    """All traffic to dense, at once; the digest and the rungs in use go into quarantine."""
    state = tick.state
    phase = next_phase(state.phase, Event.ROLLBACK)
    rungs = {effective_rung(tick.policy, state, slice_id) for slice_id in active_slices(tick.policy, state)}
    failed = {f"{state.policy_digest}+{rung}" for rung in rungs}
    state = replace(
        state,
        phase=phase.value,
        outcome="rolled_back",
        by=by,
        reason=reason,
        ended_s=tick.now_s,
        paused_at_s=None,
        quarantine=tuple(sorted({*state.quarantine, *failed})),
    )
    return replace(tick, state=state).with_action("rollback", reason).ended(reason)


def fall_back(tick: Tick, report: GuardrailReport) -> Tick:
    """One slice a rung down, or to dense where there is no milder rung or the policy says so."""
    policy, state = tick.policy, tick.state
    own = state.slice_state(report.slice_id)
    rung = effective_rung(policy, state, report.slice_id)
    index = policy.rung_ids.index(rung)
    reason = f"{report.id} in {report.slice_id} at {rung}: {report.reason}"
    state = replace(state, quarantine=tuple(sorted({*state.quarantine, f"{state.policy_digest}+{rung}"})))
    operational = {item.id for item in policy.spec.guardrails.items if item.metric.family == "operational"}
    cells = (c for c in state.cells if c.slice_id != own.slice_id or c.guardrail_id not in operational)
    state = replace(state, cells=tuple(cells))
    event = SliceEvent.RUNG_DOWN if report.action == "previous_rung" and index else SliceEvent.TO_DENSE
    next_slice_phase(SlicePhase.ROUTED, event)
    if event is SliceEvent.RUNG_DOWN:
        milder = policy.rung_ids[index - 1]
        state = state.with_slice(replace(own, ceiling=milder, by=report.id, served_units=0))
        detail = f"{reason}; falls back to rung {milder}"
        return replace(tick, state=state).with_action("rung_down", detail, own.slice_id)
    state = state.with_slice(replace(own, is_dense=True, by=report.id))
    detail = f"{reason}; falls back to dense"
    return replace(tick, state=state).with_action("to_dense", detail, own.slice_id)


def pause(tick: Tick, by: str, reason: str) -> Tick:
    """Shares stay as they are and nothing grows; IllegalEventError unless the rollout is running."""
    phase = next_phase(tick.state.phase, Event.PAUSE)
    state = replace(tick.state, phase=phase.value, by=by, reason=reason, paused_at_s=tick.now_s)
    return replace(tick, state=state).with_action("pause", reason).with_hold(reason)


def is_paused(state: RolloutState) -> bool:
    """Whether growth is stopped by an order or an alarm."""
    return state.phase == Phase.PAUSED
