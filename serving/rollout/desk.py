"""What operators may ask and order of rollouts; it reads the store and writes orders, never decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sentei.monitors.errors import StoreError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import ROLLOUT_ID, Rollout
from sentei.monitors.store import Store
from sentei.pipeline.plain import to_plain
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import RolloutError, read_look, read_quarantine, start_rollout
from sentei.pipeline.rollout.succession import StartRefusedError
from sentei.policies.edits import EditError, check_edit
from sentei.policies.engine import QuarantineError
from sentei.policies.machine import Phase
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.serving.errors import RequestError
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.ingress.router import SPARSE

MAX_EVENTS = 500  # of one page
NUM_SHOWN = 20  # newest decisions in a status
AT_TICK = "at the controller's next tick"


class StartBody(BaseModel):
    """POST /admin/v1/rollouts."""

    model_config = ConfigDict(extra="forbid")
    policy: str
    source: str = "policy.yaml"
    release_quarantine: bool = False  # start a policy that was rolled back before
    replace: bool = False  # follow a promoted rollout: its share ends
    rollout_id: str | None = Field(default=None, pattern=ROLLOUT_ID)


class CommandBody(BaseModel):
    """POST /admin/v1/rollouts/{id}/commands."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["pause", "resume", "promote", "approve", "abort", "retry"]
    reason: str = Field(default="", max_length=1000)


class EditBody(BaseModel):
    """POST /admin/v1/rollouts/{id}/policy."""

    model_config = ConfigDict(extra="forbid")
    policy: str
    source: str = "policy.yaml"


class RolloutDesk:
    """Reads and writes rollouts in the store; blocking, so it is called in threads."""

    def __init__(
        self, gateway: Gateway, store: Store, about: dict[str, str], now_s: Callable[[], float]
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._log = EventLog(store)
        self._about = about
        self._now_s = now_s

    def start(self, body: StartBody, by: str) -> dict[str, Any]:
        """Check a policy against what runs here and write the rollout down; the controller takes it up."""
        try:
            policy = load_policy(body.policy, body.source)
        except PolicyError as error:
            raise RequestError(str(error), code="invalid_policy", param="policy") from error
        self._check_rungs([rung.id for rung in policy.spec.ladder])
        try:
            rollout = start_rollout(
                self._store,
                body.policy,
                now_s=self._now_s(),
                about={**self._about, "started_by": by},
                rollout_id=body.rollout_id,
                releases_quarantine=body.release_quarantine,
                replaces=body.replace,
            )
        except StartRefusedError as error:
            code = "rollout_promoted" if error.can_replace else "rollout_running"
            raise RequestError(str(error), status=409, code=code) from error
        except QuarantineError as error:
            text = f"{error}; send release_quarantine=true to try it again"
            raise RequestError(text, status=409, code="quarantined", param="policy") from error
        except (RolloutError, StoreError) as error:
            raise RequestError(str(error), code="invalid_value", param="rollout_id") from error
        return {"rollout_id": rollout.rollout_id, "policy_name": policy.metadata.name}

    def list_all(self) -> list[dict[str, Any]]:
        """Return all rollouts, newest first, without their events."""
        return [self._summary(rollout) for rollout in reversed(self._store.read_rollouts())]

    def status(self, rollout_id: str) -> dict[str, Any]:
        """Return one rollout with routes, newest verdicts and decisions; no longer log makes it dearer."""
        rollout = self._find(rollout_id)
        found = self._store.read_routing()
        routes = found[0].routes if found is not None and found[0].rollout_id == rollout_id else ()
        newest = self._log.latest(rollout_id)
        decisions = self._log.decisions(rollout_id, limit=NUM_SHOWN)
        look = read_look(self._store, rollout_id, after_s=newest.at_s) if newest is not None else None
        told = [event for event in (newest, *reversed(decisions)) if event and "verdicts" in event.payload]
        verdicts = look["verdicts"] if look is not None else told[0].payload["verdicts"] if told else []
        summary = self._summary(rollout)
        why = look["reason"] if look is not None else told[0].payload["reason"] if told else ""
        return {
            **summary,
            "about": rollout.about,
            "waits_because": why if summary["waits_for"] else "",
            "approvals": [_event_view(item) for item in self._log.read(rollout_id, kinds=("approve",))],
            "routes": to_plain(routes),
            "verdicts": [{"guardrail_id": verdict["id"], **verdict} for verdict in verdicts],
            "events": [_event_view(event) for event in decisions],
            "num_events": self._log.count(rollout_id),
        }

    def events(self, rollout_id: str, before: int | None, limit: int) -> dict[str, Any]:
        """Return a page of decisions, oldest first, and below which seq the page before it lies, if any."""
        self._find(rollout_id)
        page = self._log.decisions(rollout_id, before=before, limit=min(max(limit, 1), MAX_EVENTS))
        has_more = bool(page) and bool(self._log.decisions(rollout_id, before=page[0].seq, limit=1))
        events = [_event_view(event) for event in page]
        return {"rollout_id": rollout_id, "events": events, "before": page[0].seq if has_more else None}

    def command(self, rollout_id: str, body: CommandBody, by: str) -> dict[str, Any]:
        """Put an order into the inbox, and say when it acts; an abort stops traffic at once."""
        acts = AT_TICK
        if is_stop := body.kind == "abort":
            is_stop, acts = self._stop_here(rollout_id)
        try:
            self._find(rollout_id)
            self._check_is_newest(rollout_id)
            seq = self._store.add_command(
                rollout_id, body.kind, by=by, reason=body.reason, at_s=self._now_s(), stops=is_stop
            )
        except RequestError:
            self._gateway.lease.release(rollout_id)
            raise
        except StoreError as error:
            text = f"the store did not take the order, so give it again ({error})"
            if is_stop:
                text = f"this ingress serves dense from now on, others until their lease runs out; {text}"
            raise RequestError(text, status=503, code="store_away", retry_after_s=1) from error
        return {"rollout_id": rollout_id, "seq": seq, "kind": body.kind, "acts": acts}

    def _stop_here(self, rollout_id: str) -> tuple[bool, str]:
        """Stop a rollout in this ingress, and say when the others follow; not while dense is down."""
        with suppress(StoreError):  # an operator's stop does not wait for a store
            text = self._log.latest_state(rollout_id)
            state = json.loads(text) if text is not None else {}
            if state.get("dense_down_since_s") is not None and state["phase"] != Phase.SHELTERED:
                return False, "dense is down: sparse stays until dense is back; abort again to insist"
        self._gateway.lease.stop(rollout_id)
        return True, f"at once: every ingress serves dense within {self._gateway.limits.poll_every_s:g} s"

    def edit(self, rollout_id: str, body: EditBody, by: str) -> dict[str, Any]:
        """Put a safer policy into the inbox of a running rollout; what is not safer is refused by field."""
        self._find(rollout_id)
        self._check_is_newest(rollout_id)
        event = self._log.latest(rollout_id)
        if event is None:
            text = f"rollout {rollout_id!r} has not begun; edit it after the controller's first tick"
            raise RequestError(text, status=409, code="not_begun", param="rollout_id")
        running = PolicyBook(self._store).find(rollout_id, json.loads(event.state)["policy_digest"])
        try:
            policy = load_policy(body.policy, body.source)
            changes = check_edit(running, policy)
        except PolicyError as error:
            raise RequestError(str(error), code="invalid_policy", param="policy") from error
        except EditError as error:
            raise RequestError(str(error), status=409, code="unsafe_edit", param="policy") from error
        if any(item.digest == policy.digest for item in read_quarantine(self._store)):
            text = "this policy was rolled back before; start a new rollout with release_quarantine=true"
            raise RequestError(text, status=409, code="quarantined", param="policy")
        seq = self._store.add_revision(rollout_id, body.policy, by=by, at_s=self._now_s())
        return {"rollout_id": rollout_id, "seq": seq, "changes": [str(item) for item in changes]}

    def request(self, request_id: str) -> dict[str, Any]:
        """Return one request's record, with what its attention kept where it was thinned; never its text."""
        row = self._store.read_request(request_id)
        if row is None:
            text = (
                f"request {request_id[:80]!r} is not recorded; its id is the response's x-sentei-request-id"
            )
            raise RequestError(text, status=404, code="request_not_found", param="request_id")
        attention = str(row["attention"])
        return {**row, "attention": json.loads(attention) if attention else None}

    def routing(self) -> dict[str, Any]:
        """Return the routing table and whether this ingress obeys it now."""
        found = self._store.read_routing()
        readiness = self._gateway.readiness()
        table = to_plain(found[0]) if found is not None else None
        return {
            "table": table,
            "renewals": found[1] if found is not None else 0,
            "is_obeyed": readiness["lease_is_fresh"],
        }

    def _find(self, rollout_id: str) -> Rollout:
        rollout = self._store.read_rollout(rollout_id)
        if rollout is None:
            text = f"rollout {rollout_id[:80]!r} does not exist; list them with GET /admin/v1/rollouts"
            raise RequestError(text, status=404, code="rollout_not_found", param="rollout_id")
        return rollout

    def _check_rungs(self, wanted: list[str]) -> None:
        if SPARSE not in self._gateway.variants:
            text = f"no sparse variant runs here ({self._gateway.note}); distill an adapter and deploy again"
            raise RequestError(text, status=409, code="no_sparse_variant")
        card = self._gateway.cards.get(SPARSE)
        if card is None:
            raise RequestError("the sparse variant is still loading; retry soon", status=503, code="loading")
        if missing := [rung for rung in wanted if rung not in card.rung_ids]:
            text = f"ladder has rung {missing[0]!r}; the adapter has {', '.join(card.rung_ids)}"
            raise RequestError(text, code="unknown_rung", param="policy")

    def _check_is_newest(self, rollout_id: str) -> None:
        """The controller runs the newest rollout only: what is said to another is never obeyed."""
        newest = self._store.read_rollouts()[-1].rollout_id
        if newest != rollout_id:
            text = f"rollout {rollout_id!r} is over: rollout {newest!r} was started after it"
            raise RequestError(text, status=409, code="rollout_over", param="rollout_id")

    def _summary(self, rollout: Rollout) -> dict[str, Any]:
        book, event = PolicyBook(self._store), self._log.latest(rollout.rollout_id)
        state = json.loads(event.state) if event is not None else {}
        policy = book.find(rollout.rollout_id, state["policy_digest"]) if state else book.first(rollout)
        stage_id = state.get("stage_id", "")
        return {
            "rollout_id": rollout.rollout_id,
            "policy_name": policy.metadata.name,
            "created_at_s": rollout.created_at_s,
            "phase": state.get("phase", "waiting"),
            "outcome": state.get("outcome"),
            "by": state.get("by"),
            "stage_id": stage_id,
            "waits_for": state.get("waits_for"),
            "stage_entered_s": state.get("stage_entered_s"),
            "ended_s": state.get("ended_s"),
            "approved_by": state.get("approved_by"),
            "rung_id": policy.stage(stage_id).rung if stage_id else "",
            "reason": state.get("reason") or "waiting for the controller's first tick",
        }


def _event_view(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "at_s": event.at_s,
        "kind": event.kind,
        "stage_id": json.loads(event.state).get("stage_id", ""),
        "reason": event.payload.get("reason", ""),
        "hash": event.hash,
    }
