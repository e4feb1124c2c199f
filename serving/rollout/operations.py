"""The operations API behind a bearer token: start, watch, steer rollouts; it writes orders, never decides."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict

from sentei.monitors.store import Store
from sentei.pipeline.plain import to_plain
from sentei.serving.errors import ConfigError, RequestError, ServingError
from sentei.serving.front.access import Operator, OperatorBook, Role
from sentei.serving.front.admission import BodyDesk
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.ingress.router import SPARSE
from sentei.serving.openai.document import describe
from sentei.serving.openai.fields import parse_request
from sentei.serving.replica.loading import make_fault
from sentei.serving.rollout.desk import CommandBody, EditBody, RolloutDesk, StartBody

log = logging.getLogger(__name__)

APPROVALS = ("promote", "approve")
ERRORS = (400, 401, 403, 404, 409, 413, 429, 503)
MAX_BODY_BYTES = 1 << 20
STATUS_TIMEOUT_S = 3.0

StatusCall = Callable[[], Awaitable[Any]]


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

    async def read_here(request: Request) -> None:
        request.state.bodies = bodies

    router = APIRouter(prefix="/admin/v1", dependencies=[Depends(read_here), needs(book, Role.LOOK)])
    desk = RolloutDesk(gateway, store, about or {}, now_s)

    @router.get("/rollouts", **describe(errors=(401, 403, 404, 429)))
    async def rollouts() -> Any:
        return {"rollouts": await asyncio.to_thread(desk.list_all)}

    @router.get("/rollouts/{rollout_id}", **describe(errors=(401, 403, 404, 429)))
    async def rollout(rollout_id: str) -> Any:
        return await asyncio.to_thread(desk.status, rollout_id)

    @router.get("/rollouts/{rollout_id}/events", **describe(errors=(401, 403, 404, 429)))
    async def events(rollout_id: str, before: int | None = None, limit: int = 100) -> Any:
        return await asyncio.to_thread(desk.events, rollout_id, before, limit)

    @router.get("/requests/{request_id:path}", **describe(errors=(401, 403, 404, 429)))
    async def request_record(request_id: str) -> Any:
        return await asyncio.to_thread(desk.request, request_id)

    @router.get("/routing", **describe(errors=(401, 403, 404, 429)))
    async def routing() -> Any:
        return await asyncio.to_thread(desk.routing)

    @router.get("/status", **describe(errors=(401, 403, 404, 429)))
    async def status() -> Any:
        calls = {**{v.name: v.describe for v in gateway.variants.values()}, **(workers or {})}
        answers = await asyncio.gather(*(ask_worker(call) for call in calls.values()))
        return {**gateway.readiness(), "workers": dict(zip(calls, answers, strict=True))}

    _add_order_routes(router, gateway, desk, book=book)
    _add_fault_route(router, gateway, allow_faults, needs(book, Role.OPERATE))
    api.include_router(router)


def _add_order_routes(router: APIRouter, gateway: Gateway, desk: RolloutDesk, *, book: OperatorBook) -> None:
    operate = needs(book, Role.OPERATE)

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


def needs(book: OperatorBook, role: Role) -> Any:
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


async def ask_worker(call: StatusCall) -> dict[str, Any]:
    """Ask one worker how it fares; one that is away says so instead of holding up the others."""
    try:
        return {"is_up": True, **to_plain(await asyncio.wait_for(call(), STATUS_TIMEOUT_S))}
    except Exception as error:  # whatever Ray wraps it in: a page for operators must come
        return {"is_up": False, "error": f"{type(error).__name__}: {error}"[:300]}


async def _body(request: Request) -> bytes:
    bodies: BodyDesk = request.state.bodies
    async with bodies.body(request, MAX_BODY_BYTES) as body:
        return body
