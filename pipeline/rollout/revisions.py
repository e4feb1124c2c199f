"""Which policy decides: the text a rollout was started with, or the newest edit that was taken.

An edit waits in the store's inbox. The controller takes it, or refuses it, between two decisions, and either
is an event: the edited text stands in the log, so the chain says under which policy each decision was made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sentei.monitors.records import Revision
from sentei.monitors.store import Store
from sentei.policies.edits import EditError, edited_state, review_edit
from sentei.policies.engine import RolloutState, routing, with_version
from sentei.policies.machine import IllegalEventError
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.policies.schema.policy import Policy

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
    """Finds the policy behind a state by its digest, among the texts that the store keeps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Policy] = {}

    def find(self, rollout_id: str, digest: str) -> Policy:
        """Return the policy of that digest; LookupError if the store has no such text of this rollout."""
        if digest not in self._known:
            self._load(rollout_id)
        if digest not in self._known:
            raise LookupError(f"rollout {rollout_id!r} has no policy of digest {digest[:12]} in this store")
        return self._known[digest]

    def _load(self, rollout_id: str) -> None:
        rollout = self._store.read_rollout(rollout_id)
        texts = [] if rollout is None else [rollout.policy_text]
        texts += [item.policy_text for item in self._store.read_revisions(rollout_id)]
        for text in texts:
            try:
                policy = load_policy(text, rollout_id)
            except PolicyError:  # an edit that was refused
                continue
            self._known[policy.digest] = policy


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
        "policy_digest": edited.digest,
        "policy_text": revision.policy_text,
        "by": revision.by,
    }
    return Taken(edited, after, EDITED, payload)
