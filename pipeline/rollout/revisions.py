"""Which policy decides: the one a rollout was started with, or the newest edit that was taken.

An edit waits in the store's inbox. The controller takes it, or refuses it, between two decisions, and either
is an event. Start and edit carry the resolved policy, so the chain says under which policy each decision was
made, and a version with other defaults goes on with the ones of then (`policies.schema.kept`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sentei.monitors.events import EventLog
from sentei.monitors.records import Revision, Rollout
from sentei.monitors.store import Store
from sentei.policies.edits import EditError, edited_state, review_edit
from sentei.policies.engine import RolloutState, routing, with_version
from sentei.policies.machine import IllegalEventError
from sentei.policies.schema.kept import keep_policy, read_kept, read_text
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.policies.schema.policy import Policy

STARTED = "started"
EDITED = "edit"
REFUSED = "refuse"


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one edit: the policy and the state from now on, and the event that says so."""

    policy: Policy
    state: RolloutState
    kind: str  # EDITED or REFUSED
    payload: dict[str, Any]


class PolicyBook:
    """Finds the policy behind a state by its digest, among those that the log keeps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._log = EventLog(store)
        self._known: dict[str, Policy] = {}

    def find(self, rollout_id: str, digest: str) -> Policy:
        """Return the policy of that digest; LookupError if neither log nor text of this rollout is of it."""
        for learn in (self._learn_log, self._learn_text):
            if digest not in self._known:
                learn(rollout_id)
        if digest not in self._known:
            raise LookupError(f"rollout {rollout_id!r} has no policy of digest {digest[:12]} in this store")
        return self._known[digest]

    def _learn_log(self, rollout_id: str) -> None:
        for event in self._log.read(rollout_id, kinds=(STARTED, EDITED)):
            if "policy_digest" in event.payload:
                self._known[event.payload["policy_digest"]] = read_kept(event.payload)

    def _learn_text(self, rollout_id: str) -> None:
        """What is left where somebody has changed the log."""
        rollout = self._store.read_rollout(rollout_id)
        if rollout is not None:
            policy = read_text(rollout.policy_text, rollout_id)
            self._known[policy.digest] = policy

    def first(self, rollout: Rollout) -> Policy:
        """Return the policy that a rollout began with: of its first event, or of its text before that."""
        for event in self._log.read(rollout.rollout_id, kinds=(STARTED,)):
            if "policy_digest" in event.payload:
                return read_kept(event.payload)
        return read_text(rollout.policy_text, rollout.rollout_id)


def take_revision(policy: Policy, state: RolloutState, revision: Revision, now_s: float) -> Taken:
    """Apply one edit to a running rollout, or refuse it with every reason; the state notes it either way."""
    noted = replace(state, revision=revision.seq)
    try:
        edited = load_policy(revision.policy_text, f"edit {revision.seq}")
        changes = [str(item) for item in review_edit(policy, edited)]
        after = edited_state(policy, edited, noted, now_s)
    except (PolicyError, EditError, IllegalEventError) as error:
        return Taken(policy, noted, REFUSED, {"reason": f"edit by {revision.by} refused: {error}"})
    after = with_version(routing(policy, state), routing(edited, after), after)
    payload = {
        "reason": f"policy edited by {revision.by}: {'; '.join(changes)}",
        "by": revision.by,
        **keep_policy(edited, revision.policy_text),
    }
    return Taken(edited, after, EDITED, payload)
