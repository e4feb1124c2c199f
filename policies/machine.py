"""The life of a rollout: every phase, every event, every legal transition, every reason to wait.

A rollout is `running` from its start. A running rollout may `advance` one stage at a time; after its last
stage has baked it is `promote`d. An operator, or a sample-ratio alarm, may `pause` it: shares stay as they
are, nothing grows, and every protective event still applies. `resume` goes on; time spent paused does not
count as time in the stage. A `rollback` is legal from every phase that routes traffic, also from
`promoted`, because the watch goes on after the last stage. From `rolled_back` only an operator's `retry`
leads out, with fresh evidence, after the cool-off; what failed is in quarantine until then.

A rollback needs a dense pool that can take the traffic. While dense is down a rollback becomes a `shelter`:
sparse keeps its share, at its mildest rung, and somebody is alerted; when dense is back the rollback that is
owed is carried out. In `sheltered` nothing else is possible but an operator's abort, which does not wait.

Where the gain that a policy asks for is proven absent, the rollout is paused with the outcome `held`: its
stage can never end by evidence any more. An operator resumes or aborts it, or starts another in its place; an
`edit` leaves it paused.

An `edit` of a running policy is legal while it can only make things safer (`policies.edits`).

Slices are the second axis, in table SLICE_TRANSITIONS: a slice is `routed` at a rung, may go a `rung_down`
(it stays routed, at a milder rung, until there is none), or `to_dense`, from where only the retry of the
whole rollout leads back. `shelter` is its `to_dense` while dense is down. When no slice is routed any more
the whole rollout is rolled back.

A running rollout that does not grow waits for something. `Wait` names it, in the order in which a decision
asks; the first one is the answer. A wait is no phase: it never stands in the way of a protective event.
"""

from __future__ import annotations

from enum import StrEnum

from sentei.errors import SenteiError


class Phase(StrEnum):
    """Where a rollout stands."""

    RUNNING = "running"
    PAUSED = "paused"
    PROMOTED = "promoted"
    SHELTERED = "sheltered"
    ROLLED_BACK = "rolled_back"


class Event(StrEnum):
    """What can happen to a rollout."""

    ADVANCE = "advance"
    PROMOTE = "promote"
    APPROVE = "approve"
    PAUSE = "pause"
    RESUME = "resume"
    EDIT = "edit"
    SHELTER = "shelter"
    ROLLBACK = "rollback"
    RETRY = "retry"


class SlicePhase(StrEnum):
    """Where a slice stands."""

    ROUTED = "routed"
    DENSE = "dense"


class SliceEvent(StrEnum):
    """What can happen to a slice."""

    RUNG_DOWN = "rung_down"
    SHELTER = "shelter"
    TO_DENSE = "to_dense"


class Wait(StrEnum):
    """What a running rollout waits for before it grows."""

    DENSE = "dense"  # dense to be up again
    ORDER = "order"  # the operator who paused it, or the next tick after a resume
    REPLICAS = "replicas"  # a ready sparse replica
    ASSIGNMENT = "assignment"  # sessions that go where they should
    DATA = "data"  # news
    SIGNAL = "signal"  # drift to clear, or its first window; a metric of one's own to be within its bound
    TIME = "time"  # least time, bake, longest time, units
    EVIDENCE = "evidence"  # proof of safety
    BENEFIT = "benefit"  # proof of the gain
    APPROVAL = "approval"  # people, or a gate
    FREEZE = "freeze"  # the end of a freeze window


TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.RUNNING, Event.ADVANCE): Phase.RUNNING,
    (Phase.RUNNING, Event.APPROVE): Phase.RUNNING,
    (Phase.RUNNING, Event.PAUSE): Phase.PAUSED,
    (Phase.RUNNING, Event.PROMOTE): Phase.PROMOTED,
    (Phase.RUNNING, Event.EDIT): Phase.RUNNING,
    (Phase.RUNNING, Event.SHELTER): Phase.SHELTERED,
    (Phase.RUNNING, Event.ROLLBACK): Phase.ROLLED_BACK,
    (Phase.PAUSED, Event.APPROVE): Phase.PAUSED,
    (Phase.PAUSED, Event.RESUME): Phase.RUNNING,
    (Phase.PAUSED, Event.EDIT): Phase.PAUSED,
    (Phase.PAUSED, Event.SHELTER): Phase.SHELTERED,
    (Phase.PAUSED, Event.ROLLBACK): Phase.ROLLED_BACK,
    (Phase.PROMOTED, Event.EDIT): Phase.PROMOTED,
    (Phase.PROMOTED, Event.SHELTER): Phase.SHELTERED,
    (Phase.PROMOTED, Event.ROLLBACK): Phase.ROLLED_BACK,
    (Phase.SHELTERED, Event.ROLLBACK): Phase.ROLLED_BACK,
    (Phase.ROLLED_BACK, Event.RETRY): Phase.RUNNING,
}

SLICE_TRANSITIONS: dict[tuple[SlicePhase, SliceEvent], SlicePhase] = {
    (SlicePhase.ROUTED, SliceEvent.RUNG_DOWN): SlicePhase.ROUTED,
    (SlicePhase.ROUTED, SliceEvent.SHELTER): SlicePhase.ROUTED,
    (SlicePhase.ROUTED, SliceEvent.TO_DENSE): SlicePhase.DENSE,
}


class IllegalEventError(SenteiError, ValueError):
    """An event that the present phase does not allow; nothing has changed."""

    def __init__(self, state: str, event: str) -> None:
        super().__init__(f'"{event}" is not possible while the rollout is {state.replace("_", " ")}')
        self.state = state
        self.event = event


def next_phase(phase: str, event: Event) -> Phase:
    """The phase after the event; IllegalEventError where the table has no entry."""
    try:
        return TRANSITIONS[(Phase(phase), event)]
    except KeyError:
        raise IllegalEventError(phase, event) from None


def next_slice_phase(phase: SlicePhase, event: SliceEvent) -> SlicePhase:
    """The slice's phase after the event; IllegalEventError where the table has no entry."""
    try:
        return SLICE_TRANSITIONS[(phase, event)]
    except KeyError:
        raise IllegalEventError(phase, event) from None


def is_possible(phase: str, event: Event) -> bool:
    """Whether the event is legal now; no side effect."""
    return (Phase(phase), event) in TRANSITIONS
