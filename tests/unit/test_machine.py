"""The table of phases and events, the slice axis, and the pure parts of a tick."""

from __future__ import annotations

import itertools

import pytest

from sentei.policies.machine import (
    TRANSITIONS,
    Event,
    IllegalEventError,
    Phase,
    SliceEvent,
    SlicePhase,
    is_possible,
    next_phase,
    next_slice_phase,
)

LEGAL = sorted(TRANSITIONS.items())
ILLEGAL = [pair for pair in itertools.product(Phase, Event) if pair not in TRANSITIONS]


@pytest.mark.parametrize(("pair", "target"), LEGAL)
def test_every_legal_event_leads_where_the_table_says(pair: tuple[Phase, Event], target: Phase) -> None:
    """The table is the machine: no second place decides."""
    assert next_phase(pair[0], pair[1]) is target
    assert is_possible(*pair)


@pytest.mark.parametrize(("phase", "event"), ILLEGAL)
def test_every_other_event_names_state_and_event(phase: Phase, event: Event) -> None:
    """An illegal event is one typed error that names both."""
    with pytest.raises(IllegalEventError, match=f'"{event}" is not possible while') as caught:
        next_phase(phase, event)

    assert (caught.value.state, caught.value.event) == (phase, event)
    assert not is_possible(phase, event)


def test_a_rollback_is_possible_from_every_phase_that_routes_traffic() -> None:
    """All but rolled back can go back; what is back cannot go back again."""
    assert [phase for phase in Phase if is_possible(phase, Event.ROLLBACK)] == [
        Phase.RUNNING,
        Phase.PAUSED,
        Phase.PROMOTED,
        Phase.SHELTERED,
    ]


def test_nothing_but_the_rollback_that_is_owed_leads_out_of_a_shelter() -> None:
    """While dense is down no order, edit or growth moves traffic."""
    assert [event for event in Event if is_possible(Phase.SHELTERED, event)] == [Event.ROLLBACK]


def test_only_a_retry_leads_out_of_rolled_back() -> None:
    """Nothing but an operator's order routes traffic again."""
    assert [event for event in Event if is_possible(Phase.ROLLED_BACK, event)] == [Event.RETRY]


def test_a_dense_slice_has_no_further_to_fall() -> None:
    """A slice may go down while it is routed; from dense there is no event."""
    assert next_slice_phase(SlicePhase.ROUTED, SliceEvent.RUNG_DOWN) is SlicePhase.ROUTED
    assert next_slice_phase(SlicePhase.ROUTED, SliceEvent.SHELTER) is SlicePhase.ROUTED
    assert next_slice_phase(SlicePhase.ROUTED, SliceEvent.TO_DENSE) is SlicePhase.DENSE
    for event in SliceEvent:
        with pytest.raises(IllegalEventError, match="while the rollout is dense"):
            next_slice_phase(SlicePhase.DENSE, event)
