"""The operations API behind a bearer token: start, watch, steer rollouts; it writes orders, never decides."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from sentei.monitors.errors import StoreError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import ROLLOUT_ID, Rollout
from sentei.monitors.store import Store
from sentei.pipeline.plain import to_plain
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import EVIDENCE, RolloutError, read_look, read_quarantine, start_rollout
from sentei.pipeline.rollout.succession import StartRefusedError
from sentei.policies.edits import EditError, check_edit
from sentei.policies.engine import QuarantineError
from sentei.policies.machine import Phase
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.serving.access import Operator, OperatorBook, Role
from sentei.serving.admission import BodyDesk
from sentei.serving.errors import ConfigError, RequestError, ServingError
from sentei.serving.gateway import Gateway
from sentei.serving.loading import make_fault
from sentei.serving.openai.document import describe
from sentei.serving.openai.fields import parse_request
from sentei.serving.router import SPARSE

log = logging.getLogger(__name__)

APPROVALS = ("promote", "approve")
ERRORS = (400, 401, 403, 404, 409, 413, 429, 503)
MAX_BODY_BYTES = 1 << 20
MAX_EVENTS = 500
AT_TICK = "at the controller's next tick"
STATUS_TIMEOUT_S = 3.0

StatusCall = Callable[[], Awaitable[Any]]


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


class FaultBody(BaseModel):
    """PUT /admin/v1/fault."""

    model_config = ConfigDict(extra="forbid")
    fault: dict[str, Any] | None


def add_admin_routes(
    api: FastAPI,
    gateway: Gateway,
    store: Store,
    *,
    operators: OperatorBook | None = None,
    allow_faults: bool = False,
    about: dict[str, str] | None = None,
    workers: Mapping[str, StatusCall] | None = None,
    now_s: Callable[[], float] = time.time,
) -> None:
    """Add `/admin/v1` to the app."""
    book = operators or OperatorBook.read(None)
    # A desk of its own: whatever callers of `/v1` leave half-sent, an order to abort is read.
    bodies = BodyDesk(gateway.limits.bodies)

    async def set_up(request: Request) -> None:
        request.state.bodies = bodies

    router = APIRouter(prefix="/admin/v1", dependencies=[_needs(book, Role.LOOK), Depends(set_up)])
    desk = RolloutDesk(gateway, store, about or {}, now_s)

    @router.get("/rollouts", **describe(errors=(401, 403, 404, 429)))
    async def rollouts() -> Any:
        return {"rollouts": await asyncio.to_thread(desk.list_all)}

    @router.get("/rollouts/{rollout_id}", **describe(errors=(401, 403, 404, 429)))
    async def rollout(rollout_id: str) -> Any:
        return await asyncio.to_thread(desk.status, rollout_id)

    @router.get("/requests/{request_id:path}", **describe(errors=(401, 403, 404, 429)))
    async def request_record(request_id: str) -> Any:
        return await asyncio.to_thread(desk.request, request_id)

    @router.get("/routing", **describe(errors=(401, 403, 404, 429)))
    async def routing() -> Any:
        return await asyncio.to_thread(desk.routing)

    @router.get("/status", **describe(errors=(401, 403, 404, 429)))
    async def status() -> Any:
        calls = {**{v.name: v.describe for v in gateway.variants.values()}, **(workers or {})}
        answers = await asyncio.gather(*(_ask(call) for call in calls.values()))
        return {**gateway.readiness(), "workers": dict(zip(calls, answers, strict=True))}

    _add_order_routes(router, gateway, desk, book=book)
    _add_fault_route(router, gateway, allow_faults, _needs(book, Role.OPERATE))
    api.include_router(router)


def _add_order_routes(router: APIRouter, gateway: Gateway, desk: RolloutDesk, *, book: OperatorBook) -> None:
    operate = _needs(book, Role.OPERATE)

    @router.post("/rollouts", status_code=201, dependencies=[operate], **describe(StartBody, errors=ERRORS))
    async def start(request: Request) -> Any:
        body = parse_request(StartBody, await _body(request))
        return await asyncio.to_thread(desk.start, body, request.state.operator.name)

    @router.post("/rollouts/{rollout_id}/commands", status_code=202, **describe(CommandBody, errors=ERRORS))
    async def command(rollout_id: str, request: Request) -> Any:
        body = parse_request(CommandBody, await _body(request))
        needed = Role.APPROVE if body.kind in APPROVALS else Role.OPERATE
        who = _operator(book, request, needed)
        answer = await asyncio.to_thread(desk.command, rollout_id, body, who.name)
        if body.kind == "abort":
            await gateway.read_routing_once()
            gateway.lease.release(rollout_id)  # the store stops it from here on
        return answer

    @router.post(
        "/rollouts/{rollout_id}/policy",
        status_code=202,
        dependencies=[operate],
        **describe(EditBody, errors=ERRORS),
    )
    async def edit(rollout_id: str, request: Request) -> Any:
        body = parse_request(EditBody, await _body(request))
        return await asyncio.to_thread(desk.edit, rollout_id, body, request.state.operator.name)


def _needs(book: OperatorBook, role: Role) -> Any:
    """Return the dependency that lets a route's caller in, and tells the route who it is."""

    async def let_in(request: Request) -> None:
        request.state.operator = _operator(book, request, role)

    return Depends(let_in)


def _operator(book: OperatorBook, request: Request, needed: Role) -> Operator:
    caller = request.client.host if request.client is not None else "unknown"
    return book.check(request.headers.get("authorization", ""), caller, needed)


def _add_fault_route(router: APIRouter, gateway: Gateway, allow_faults: bool, operate: Any) -> None:
    @router.put("/fault", dependencies=[operate], **describe(FaultBody, errors=ERRORS))
    async def fault(request: Request) -> Any:
        body = parse_request(FaultBody, await _body(request))
        if not allow_faults or SPARSE not in gateway.variants:
            text = "faults cannot be planted here; start the app with `allow_faults: true` and an adapter"
            raise RequestError(text, status=403, code="faults_disabled")
        try:
            await asyncio.to_thread(make_fault, body.fault)  # here, where its words are ours alone
            await gateway.variants[SPARSE].plant(body.fault)
        except ConfigError as error:
            raise RequestError(str(error), code="invalid_value", param="fault") from error
        except ServingError as error:
            log.warning("fault was not planted: %s", error)
            text = "not every sparse replica took the fault; the server's log says why"
            raise RequestError(text, status=503, code="variant_away") from error
        return {"fault": body.fault}


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
        """Return one rollout with routes, newest verdicts and decisions."""
        rollout = self._find(rollout_id)
        found = self._store.read_routing()
        routes = found[0].routes if found is not None and found[0].rollout_id == rollout_id else ()
        events = list(self._log.read(rollout_id))
        look = read_look(self._store, rollout_id, after_s=events[-1].at_s) if events else None
        verdicts: list[dict[str, Any]] = next(
            (e.payload["verdicts"] for e in reversed(events) if "verdicts" in e.payload), []
        )
        verdicts = verdicts if look is None else look["verdicts"]
        decisions = [_event_view(event) for event in events if event.kind != EVIDENCE]
        return {
            **self._summary(rollout),
            "about": rollout.about,
            "routes": to_plain(routes),
            "verdicts": [{"guardrail_id": verdict["id"], **verdict} for verdict in verdicts],
            "events": decisions[-MAX_EVENTS:],
            "num_events": len(events),
        }

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
            "rung_id": next((s.rung for s in policy.spec.stages if s.id == stage_id), ""),
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


async def _ask(call: StatusCall) -> dict[str, Any]:
    """Ask one worker how it fares; one that is away says so instead of holding up the others."""
    try:
        return {"is_up": True, **to_plain(await asyncio.wait_for(call(), STATUS_TIMEOUT_S))}
    except Exception as error:  # whatever Ray wraps it in: a page for operators must come
        return {"is_up": False, "error": f"{type(error).__name__}: {error}"[:300]}


async def _body(request: Request) -> bytes:
    bodies: BodyDesk = request.state.bodies
    async with bodies.body(request, MAX_BODY_BYTES) as body:
        return body
