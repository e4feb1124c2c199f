"""decide(): policy, state, signals and the time in; new state, actions and a reason out.

Every tick walks STEPS in order. A step may *protect* (roll back, fall back, pause), may *hold* (name why
nothing grows), or may do nothing. The first hold gives the decision its reason, but neither a hold nor the
fall of one slice stops the walk: a later step still protects, so nothing can delay a rollback. Steps that
grow traffic do nothing once something holds, so a tick advances exactly one stage at most, also after an
outage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sentei.errors import SenteiError
from sentei.policies.judge import GuardrailReport
from sentei.policies.machine import Phase
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import RoutingTable, Signals, SliceRoute
from sentei.policies.state import (
    ARTIFACT,
    DriftTrack,
    MetricTrack,
    PolicyStateError,
    Quarantined,
    RolloutState,
    SliceState,
    state_from_json,
    state_to_json,
)
from sentei.policies.steps.dense import check_dense
from sentei.policies.steps.gates import (
    check_approval,
    check_benefit,
    check_freeze,
    check_hold,
    check_safe,
    grow,
)
from sentei.policies.steps.guards import (
    check_artifact,
    check_breaker,
    check_data,
    check_harm,
    check_signals,
    check_srm,
    handle_commands,
    observe,
)
from sentei.policies.steps.metrics import check_metrics
from sentei.policies.steps.tick import Action, Tick, effective_rung

__all__ = [
    "STEPS",
    "Action",
    "Decision",
    "PolicyStateError",
    "QuarantineError",
    "RolloutState",
    "decide",
    "initial_state",
    "routing",
    "state_from_json",
    "state_to_json",
]

STEPS = (
    observe,  # not a decision: new units become evidence, evidence becomes verdicts
    check_dense,  # not one either: whether dense could take the traffic that the others may send it
    handle_commands,  # 1 manual abort, and the other orders
    check_artifact,  # whether it is what was proven
    check_breaker,  # 2
    check_harm,  # 3
    check_srm,  # 4
    check_data,  # 5 stale or no data
    check_signals,  # 6
    check_metrics,  # 6, too
    check_hold,  # 7 least time, longest time, least units
    check_safe,  # 8
    check_benefit,  # 9
    check_approval,  # 10
    check_freeze,  # 11
    grow,  # 12 one stage
)


class QuarantineError(SenteiError, ValueError):
    """This artifact, or this policy, failed at this rung before; it cannot start again by itself."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one tick decided; `changed` says whether the state differs from the one before."""

    state: RolloutState
    actions: tuple[Action, ...]
    reason: str
    verdicts: tuple[GuardrailReport, ...]
    changed: bool


def initial_state(
    policy: Policy,
    rollout_id: str,
    now_s: float,
    *,
    quarantine: tuple[Quarantined, ...] = (),
    artifact: str = "",
    former_tries: int = 0,
) -> RolloutState:
    """A new rollout in its first stage; QuarantineError if its artifact or policy failed at one of its rungs.

    `former_tries` are those of the same artifact in older rollouts: all of them share alpha_total.
    """
    for stage in policy.spec.stages:
        if artifact and Quarantined(f"{ARTIFACT}{artifact}", stage.rung) in quarantine:
            raise QuarantineError(
                f'artifact {artifact[:12]} was rolled back at rung "{stage.rung}" before; change the adapter '
                "(another policy lifts no quarantine), retry the old rollout, or release it"
            )
        if Quarantined(policy.digest, stage.rung) in quarantine:
            raise QuarantineError(
                f'policy "{policy.metadata.name}" was rolled back at rung "{stage.rung}" before; '
                "change the policy, or retry the old rollout"
            )
    return RolloutState(
        rollout_id=rollout_id,
        policy_digest=policy.digest,
        phase=Phase.RUNNING.value,
        stage_id=policy.spec.stages[0].id,
        started_s=now_s,
        stage_entered_s=now_s,
        waiting_since_s=now_s,
        slices=tuple(SliceState(item.id) for item in policy.routed_slices),
        drift=tuple(DriftTrack(item.id) for item in policy.spec.signals),
        metrics=tuple(MetricTrack(item.id) for item in policy.spec.guardrails.prometheus),
        quarantine=quarantine,
        artifact=artifact,
        former_tries=former_tries,
    )


def decide(policy: Policy, state: RolloutState, signals: Signals, now_s: float) -> Decision:
    """One decision; the same inputs give the same bytes. PolicyStateError for another policy's state."""
    if state.policy_digest != policy.digest:
        raise PolicyStateError(
            f"the state of rollout {state.rollout_id!r} belongs to policy digest {state.policy_digest[:12]}, "
            f"not {policy.digest[:12]}; an edited policy starts a new rollout"
        )
    if not signals.has_lease:  # step 0: another controller decides
        return Decision(state, (), "this controller does not hold the lease", (), False)
    tick = Tick(policy, state, signals, now_s)
    for step in STEPS:
        tick = step(tick)
        if tick.is_done:
            break
    is_waiting = tick.state.phase == Phase.RUNNING and tick.outcome is None
    wait = tick.waits_for if is_waiting else None
    new_state = replace(tick.state, waits_for=wait and wait.value)
    new_state = with_version(routing(policy, state), routing(policy, new_state), new_state)
    return Decision(new_state, tick.actions, tick.reason, (*tick.reports, *tick.gains), new_state != state)


def routing(policy: Policy, state: RolloutState) -> RoutingTable:
    """Where requests go: dense for everybody once it is rolled back, and always in mode `advise`."""
    stage = policy.stage(state.stage_id)
    is_off = state.phase == Phase.ROLLED_BACK
    routes = []
    for item in policy.spec.slices.buckets:
        rung = "dense" if item.is_pinned or is_off else effective_rung(policy, state, item.id)
        is_dense = rung == "dense"
        odds = (0.0, 0.0) if is_dense else policy.audit_odds(stage)
        routes.append(
            SliceRoute(
                slice_id=item.id,
                min_tokens=item.range[0],
                max_tokens=item.range[1],
                share=0.0 if is_dense or policy.spec.mode == "advise" else stage.share,
                rung_id=rung,
                audit_share=odds[0],
                audit_share_sparse=odds[1],
            )
        )
    return RoutingTable(
        rollout_id=state.rollout_id,
        version=state.version,
        salt=policy.spec.assignment.salt,
        lease_s=policy.spec.data.monitor_lease,
        routes=tuple(routes),
        artifact=state.artifact,
    )


def with_version(old: RoutingTable, new: RoutingTable, state: RolloutState) -> RolloutState:
    """The state with the next version of the routing table if any route has changed."""
    is_same = (new.routes, new.artifact) == (old.routes, old.artifact)
    return state if is_same else replace(state, version=old.version + 1)
