"""One tick on its way through the steps: what it read, what it changed so far, why nothing grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sentei.policies.judge import GuardrailReport
from sentei.policies.machine import Event, Phase, SliceEvent, SlicePhase, Wait, next_phase, next_slice_phase
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Command, Signals
from sentei.policies.state import ARTIFACT, Quarantined, RolloutState, SliceState

ALERT, DENSE_DOWN, AUDITS_BLIND = "alert", "dense_down", "audits_blind"


@dataclass(frozen=True, slots=True)
class Action:
    """Something that happened and that the world should hear of; the routing table follows from the state."""

    kind: str  # an Event or SliceEvent of the machine, or "held", "bind" (an artifact), "refuse" or ALERT
    detail: str
    slice_id: str | None = None
    about: str = ""  # of an alert: DENSE_DOWN or AUDITS_BLIND


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick in progress; every step returns a new one."""

    policy: Policy
    state: RolloutState
    signals: Signals
    now_s: float
    reports: tuple[GuardrailReport, ...] = ()
    gains: tuple[GuardrailReport, ...] = ()  # of benefits
    actions: tuple[Action, ...] = ()
    approvals: tuple[Command, ...] = ()  # orders to approve that wait for the gate
    hold: str | None = None  # why nothing grows
    waits_for: Wait | None = None  # what it is that holds
    is_done: bool = False
    outcome: str | None = None  # the reason once something has happened

    @property
    def reason(self) -> str:
        """What this tick decided, in one sentence with its numbers."""
        return self.outcome or self.hold or self.state.reason

    def with_hold(self, wait: Wait, reason: str) -> Tick:
        """The same tick, holding; the first reason stays."""
        return self if self.hold is not None else replace(self, hold=reason, waits_for=wait)

    def with_action(self, kind: str, detail: str, slice_id: str | None = None) -> Tick:
        """The same tick with one more thing to tell."""
        return replace(self, actions=(*self.actions, Action(kind, detail, slice_id)))

    def with_alert(self, about: str, detail: str) -> Tick:
        """The same tick with something that people must hear."""
        return replace(self, actions=(*self.actions, Action(ALERT, detail, about=about)))

    def ended(self, reason: str) -> Tick:
        """The same tick, finished: no later step looks at it."""
        return replace(self, is_done=True, outcome=reason)


def effective_rung(policy: Policy, state: RolloutState, slice_id: str) -> str:
    """The rung of a slice now: the mildest of the stage's, its own limit and its ceiling; or "dense"."""
    item = next(item for item in policy.routed_slices if item.id == slice_id)
    own = state.slice_state(slice_id)
    if own.is_dense:
        return "dense"
    if state.phase == Phase.SHELTERED:
        return policy.rung_ids[0]
    limits = [policy.stage(state.stage_id).rung, item.max_rung, own.ceiling]
    return min((rung for rung in limits if rung is not None), key=policy.rung_ids.index)


def active_slices(policy: Policy, state: RolloutState) -> tuple[str, ...]:
    """The slices that are still routed."""
    return tuple(item.id for item in policy.routed_slices if not state.slice_state(item.id).is_dense)


def must_shelter(tick: Tick) -> bool:
    """Whether users are on sparse while dense is down: then dense must not get their traffic."""
    policy, state = tick.policy, tick.state
    share = policy.stage(state.stage_id).share if policy.spec.mode == "enforce" else 0.0
    return state.dense_down_since_s is not None and share > 0 and bool(active_slices(policy, state))


def roll_back(tick: Tick, by: str, reason: str, *, is_forced: bool = False) -> Tick:
    """All traffic to dense, at once; the digests and the rungs in use go into quarantine.

    While dense is down it becomes a shelter, unless an operator insists.
    """
    if must_shelter(tick) and not is_forced:
        return _shelter(tick, by, reason)
    phase = next_phase(tick.state.phase, Event.ROLLBACK)
    state = replace(
        tick.state,
        phase=phase.value,
        outcome="rolled_back",
        by=by,
        reason=reason,
        owed_reason=None,
        ended_s=tick.now_s,
        paused_at_s=None,
        quarantine=_quarantine(tick),
    )
    return replace(tick, state=state).with_action("rollback", reason).ended(reason)


def _shelter(tick: Tick, by: str, reason: str) -> Tick:
    """Sparse stays, at its mildest rung and with its share, until dense can take the traffic."""
    if tick.state.phase == Phase.SHELTERED:
        return tick.with_hold(Wait.DENSE, tick.state.reason)
    phase = next_phase(tick.state.phase, Event.SHELTER)
    rung = tick.policy.rung_ids[0]
    text = f"{reason}; dense is down, so sparse stays at rung {rung} until dense is back"
    state = replace(
        tick.state,
        phase=phase.value,
        outcome=None,
        by=by,
        reason=text,
        owed_reason=reason,
        ended_s=None,
        paused_at_s=None,
        quarantine=_quarantine(tick),
    )
    return replace(tick, state=state).with_action("shelter", text).ended(text)


def _quarantine(tick: Tick) -> tuple[Quarantined, ...]:
    """What is in quarantine already, and every digest this rollout has had at every rung in use."""
    policy, state = tick.policy, tick.state
    if state.phase == Phase.SHELTERED:  # what failed is in there since the shelter; its mild rung did not
        return state.quarantine
    rungs = {effective_rung(policy, state, slice_id) for slice_id in active_slices(policy, state)}
    return with_failed(state, rungs)


def with_failed(state: RolloutState, rungs: Iterable[str]) -> tuple[Quarantined, ...]:
    """The quarantine after these rungs failed: the artifact, whatever the policy's text.

    Where no artifact is known it is the policy; an edit does not hide the policy it started as.
    """
    digests = (
        (f"{ARTIFACT}{state.artifact}",) if state.artifact else (*state.former_digests, state.policy_digest)
    )
    failed = {Quarantined(digest, rung) for digest in digests for rung in rungs}
    return tuple(sorted({*state.quarantine, *failed}))


def fall_back(tick: Tick, report: GuardrailReport) -> Tick:
    """One slice a rung down, or to dense where there is no milder rung or the policy says so."""
    policy, state = tick.policy, tick.state
    own = state.slice_state(report.slice_id)
    rung = effective_rung(policy, state, report.slice_id)
    index = policy.rung_ids.index(rung)
    reason = f"{report.id} in {report.slice_id} at {rung}: {report.reason}"
    operational = {item.id for item in policy.spec.guardrails.items if item.metric.family == "operational"}
    cells = (c for c in state.cells if c.slice_id != own.slice_id or c.guardrail_id not in operational)
    state = replace(state, cells=tuple(cells), quarantine=with_failed(state, [rung]))
    tick = replace(tick, state=state)
    if report.action == "previous_rung" and index:
        milder = replace(own, ceiling=policy.rung_ids[index - 1], by=report.id, served_units=0, upper_units=0)
        return move_slice(
            tick, milder, SliceEvent.RUNG_DOWN, f"{reason}; falls back to rung {milder.ceiling}"
        )
    if must_shelter(tick):
        milder = replace(own, ceiling=policy.rung_ids[0], by=report.id, served_units=0, owes_dense=True)
        text = f"{reason}; dense is down, so it stays at rung {milder.ceiling} until dense is back"
        return move_slice(tick, milder, SliceEvent.SHELTER, text)
    dense = replace(own, is_dense=True, by=report.id)
    return move_slice(tick, dense, SliceEvent.TO_DENSE, f"{reason}; falls back to dense")


def move_slice(tick: Tick, changed: SliceState, event: SliceEvent, detail: str) -> Tick:
    """One event of one slice; IllegalEventError if it is on dense already."""
    before = tick.state.slice_state(changed.slice_id)
    next_slice_phase(SlicePhase.DENSE if before.is_dense else SlicePhase.ROUTED, event)
    tick = replace(tick, state=tick.state.with_slice(changed))
    return tick.with_action(event.value, detail, changed.slice_id)


def pause(tick: Tick, by: str, reason: str) -> Tick:
    """Shares stay as they are and nothing grows; IllegalEventError unless the rollout is running."""
    phase = next_phase(tick.state.phase, Event.PAUSE)
    state = replace(tick.state, phase=phase.value, by=by, reason=reason, paused_at_s=tick.now_s)
    return replace(tick, state=state).with_action("pause", reason).with_hold(Wait.ORDER, reason)


def hold_for_good(tick: Tick, by: str, reason: str) -> Tick:
    """Paused, with outcome `held`: this stage cannot end by evidence any more, and nobody falls back."""
    phase = next_phase(tick.state.phase, Event.PAUSE)
    state = replace(
        tick.state,
        phase=phase.value,
        outcome="held",
        by=by,
        reason=reason,
        paused_at_s=tick.now_s,
        ended_s=tick.now_s,
    )
    return replace(tick, state=state).with_action("held", reason)


def is_paused(state: RolloutState) -> bool:
    """Whether growth is stopped by an order or an alarm, or for want of dense."""
    return state.phase in (Phase.PAUSED, Phase.SHELTERED)
