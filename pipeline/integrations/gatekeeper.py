"""Asks the webhook of an approval, and writes a yes into the inbox as an order by the gate's name.

A decision knows no network: the next tick finds the order as it finds an operator's, and takes it only for
the stay in the stage that was asked about. Anything but 200 is no order, so the stage holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sentei.errors import SenteiError
from sentei.monitors.events import Event
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import Secrets, call
from sentei.pipeline.integrations.newest import NewestRollout, Pace
from sentei.pipeline.integrations.shapes import readable_moment, sign
from sentei.pipeline.rollout.runner import read_look
from sentei.policies.machine import Phase, Wait
from sentei.policies.schema.integrations.gate import GATE_ORDER, ApprovalWebhook
from sentei.policies.schema.policy import Policy
from sentei.policies.state import RolloutState

HEADERS = {"content-type": "application/json", "user-agent": "sentei-gate/1"}
APPROVES = 200
MAX_REASON_CHARS = 300
_NUMBERS = ("mean", "low", "high", "bound", "units")


class GateKeeper:
    """Asks for the newest rollout; run it now and then in a thread of its own, one run at a time."""

    def __init__(self, store: Store, secrets: Secrets, *, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._newest = NewestRollout(store)
        self._secrets = secrets
        self._wall = wall
        self._pace = Pace()  # of each stay

    def run_once(self, now_s: float) -> str | None:
        """Ask if it is time: why it was not approved, "" where it was, None where nobody was asked."""
        found = self._newest.read()
        if found is None:
            return None
        policy, state = found.policy, found.state
        gate = self._gate(policy, state)
        if gate is None or self._is_answered(state) or not self._pace.is_due(state.stay, gate.every, now_s):
            return None
        self._pace.note(state.stay, now_s)
        document = question(policy, state, found.event, self._evidence(found.event), asked_s=now_s)
        try:
            answer = asyncio.run(self._ask(gate, document))
        except SenteiError as error:
            return f"gate {gate.id}: {error}"
        if answer != APPROVES:
            return f"gate {gate.id}: answered {answer}, which holds"
        self._store.add_command(state.rollout_id, GATE_ORDER, by=gate.approver, reason=state.stay, at_s=now_s)
        return ""

    def _gate(self, policy: Policy, state: RolloutState) -> ApprovalWebhook | None:
        """The gate that the rollout waits for now."""
        if state.phase != Phase.RUNNING or state.waits_for != Wait.APPROVAL or state.is_approved:
            return None
        approval = policy.stage(state.stage_id).approval
        return approval.webhook if approval is not None else None

    def _is_answered(self, state: RolloutState) -> bool:
        """Whether an order waits that the next tick will see first."""
        return self._store.newest_order(state.rollout_id) > max(state.command_seq, state.revision)

    def _evidence(self, event: Event) -> list[Mapping[str, Any]]:
        """The newest verdicts: of the last tick, or of the event."""
        look = read_look(self._store, event.rollout_id, after_s=event.at_s)
        return list((look or event.payload).get("verdicts", ()))

    async def _ask(self, gate: ApprovalWebhook, document: dict[str, Any]) -> int:
        body = json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode()
        headers = dict(HEADERS)
        if gate.secret is not None:
            headers |= sign(document["id"], body, self._secrets.read(gate.secret), int(self._wall()))
        url = self._secrets.url(gate)
        answer = await call("POST", url, headers=headers, content=body, timeout_s=gate.timeout)
        return answer.status


def question(
    policy: Policy, state: RolloutState, event: Event, verdicts: list[Mapping[str, Any]], *, asked_s: float
) -> dict[str, Any]:
    """What a gate is asked: rollout, stage, what follows it, the evidence; each time by an id of its own.

    A receiver that answers an id which it has seen by 200, as receivers of notices should, approves nothing.
    """
    index = policy.stage_index(state.stage_id)
    following = policy.spec.stages[index + 1 : index + 2]
    asked = f"{state.rollout_id}/{state.stay}/{asked_s!r}"
    return {
        "id": f"ask_{hashlib.sha256(asked.encode()).hexdigest()[:32]}",
        "type": "rollout.approval",
        "timestamp": readable_moment(event.at_s),
        "data": {
            "rollout_id": state.rollout_id,
            "policy": policy.metadata.name,
            "owner": policy.metadata.owner,
            "artifact": state.artifact,
            "stage": _stage(policy, state.stage_id),
            "next_stage": _stage(policy, following[0].id) if following else None,  # null: promoted
            "event_seq": event.seq,
            "event_hash": event.hash,
            "reason": str(event.payload.get("reason", ""))[:MAX_REASON_CHARS],
            "evidence": list(_evidence(verdicts)),
        },
    }


def _stage(policy: Policy, stage_id: str) -> dict[str, Any]:
    stage = policy.stage(stage_id)
    return {"id": stage.id, "share": stage.share, "rung": stage.rung}


def _evidence(verdicts: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in verdicts:
        yield {
            "id": item["id"],
            "slice": item["slice_id"],
            "rung": item["rung_id"],
            "verdict": item["verdict"],
            **{name: item.get(name) for name in _NUMBERS},  # null where there is none that is finite
            "reason": str(item["reason"])[:MAX_REASON_CHARS],
        }
