"""Where the newest rollout stands, and when others were last asked: what all who ask for it share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from sentei.monitors.events import Event, EventLog
from sentei.monitors.store import Store
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.policies.schema.policy import Policy
from sentei.policies.state import RolloutState, state_from_json

MAX_ASKED = 1000  # things whose last time is remembered


@dataclass(frozen=True, slots=True)
class Standing:
    """A rollout by its newest event, and the policy that it runs by then."""

    policy: Policy
    state: RolloutState
    event: Event


class NewestRollout:
    """Reads the newest rollout of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._log = EventLog(store)
        self._book = PolicyBook(store)

    def read(self) -> Standing | None:
        """Return where it stands; None where there is none, or none that has begun."""
        rollouts = self._store.read_rollouts()
        event = self._log.latest(rollouts[-1].rollout_id) if rollouts else None
        if event is None:
            return None
        state = state_from_json(event.state)
        return Standing(self._book.find(state.rollout_id, state.policy_digest), state, event)


class Pace:
    """When each of several things was last asked."""

    def __init__(self) -> None:
        self._asked_s: dict[Hashable, float] = {}

    def is_due(self, thing: Hashable, every_s: float, now_s: float) -> bool:
        """Whether it is time to ask again; at once for what was never asked, and where a clock went back."""
        asked_s = self._asked_s.get(thing)
        return asked_s is None or not 0 <= now_s - asked_s < every_s

    def note(self, thing: Hashable, now_s: float) -> None:
        """Note that it is asked now."""
        self._asked_s.pop(thing, None)
        self._asked_s[thing] = now_s
        if len(self._asked_s) > MAX_ASKED:
            self._asked_s.pop(next(iter(self._asked_s)))
