"""HTTP: the OpenAI API and the health pages; what a request means is `gateway`'s business."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from sentei.serving import wire
from sentei.serving.answer import Delta, Progress, Question
from sentei.serving.errors import RequestError
from sentei.serving.gateway import REQUEST_HEADER, Gateway
from sentei.serving.openai import ChatRequest, CompletionRequest, GenerationRequest, error_body, parse_request

log = logging.getLogger(__name__)


class _EventStream(StreamingResponse):
    """A stream that closes its generator at once when the client goes away, so that its cache is freed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


def build_api(gateway: Gateway) -> FastAPI:
    """Return the ASGI app over a gateway; its lifespan starts and stops the gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    api = FastAPI(title="Sentei", lifespan=lifespan, docs_url=None, redoc_url=None)
    api.add_exception_handler(RequestError, _answer_request_error)
    api.add_exception_handler(StarletteHTTPException, _answer_http_error)
    _add_openai_routes(api, gateway)
    _add_health_routes(api, gateway)
    return api


def _add_openai_routes(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(wire.models_body(gateway.model_name, gateway.created_s))

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name != gateway.model_name:
            text = f"model {name[:80]!r} does not exist; this server has {gateway.model_name!r}"
            raise RequestError(text, status=404, code="model_not_found", param="model")
        return JSONResponse(wire.model_body(name, gateway.created_s))

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await _answer(gateway, request, ChatRequest)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await _answer(gateway, request, CompletionRequest)


def _add_health_routes(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"ok": True})

    @api.get("/readyz")
    async def readyz() -> JSONResponse:
        readiness = gateway.readiness()
        return JSONResponse(readiness, status_code=200 if readiness["ready"] else 503)


async def _answer(
    gateway: Gateway, http: Request, kind: type[ChatRequest] | type[CompletionRequest]
) -> JSONResponse | StreamingResponse:
    body = await _read_body(http, gateway.limits.max_body_bytes)
    request: GenerationRequest = parse_request(kind, body)
    question = await gateway.check(request, http.headers)
    progress, deltas = gateway.begin(question)
    writer = wire.Wire(
        request_id=question.request_id,
        model_name=gateway.model_name,
        is_chat=isinstance(request, ChatRequest),
        tokenizer=gateway.tokenizer,
        has_logprobs=question.sampling.num_top_logprobs is not None,
    )
    num_prompt = len(question.prompt_ids)
    if not request.stream:
        async with aclosing(deltas):
            pieces = [delta async for delta in deltas]
        whole = writer.whole(pieces, progress, num_prompt)
        return JSONResponse(whole, headers=_headers(http, question, progress))
    # The first piece decides the status and the headers, so it is awaited before anything is sent.
    first = await anext(deltas)
    usage_for = num_prompt if request.wants_usage() else None
    events = _events(writer, deltas, progress, first=first, usage_for=usage_for)
    return _EventStream(events, media_type="text/event-stream", headers=_headers(http, question, progress))


async def _events(
    writer: wire.Wire,
    deltas: AsyncGenerator[Delta, None],
    progress: Progress,
    *,
    first: Delta,
    usage_for: int | None,
) -> AsyncGenerator[str, None]:
    async with aclosing(deltas):
        yield wire.event(writer.chunk(first, progress, is_first=True))
        try:
            async for delta in deltas:
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    yield wire.event(writer.chunk(delta, progress, is_first=False))
        except RequestError as error:  # headers are out: the error must travel inside the stream
            yield wire.error_event(error)
            return
        if usage_for is not None:
            yield wire.event(writer.usage_chunk(progress, usage_for))
        yield wire.DONE


def _headers(http: Request, question: Question, progress: Progress) -> dict[str, str]:
    """Say who answers; in a stream, who sent the first token."""
    headers = {
        "x-sentei-request-id": question.request_id,
        "x-sentei-variant": progress.variant,
        "x-sentei-rung": progress.rung_id,
        "x-sentei-slice": question.assignment.slice_id,
    }
    # Ray's proxy gives every request an id and sends it back itself.
    return headers if REQUEST_HEADER in http.headers else {REQUEST_HEADER: question.request_id, **headers}


async def _read_body(http: Request, limit_bytes: int) -> bytes:
    """Read a body of limited size; raises RequestError as soon as it is too long."""
    announced = http.headers.get("content-length", "0")
    parts: list[bytes] = []
    size = int(announced) if announced.isdigit() else 0
    if size <= limit_bytes:
        size = 0
        async for part in http.stream():
            size += len(part)
            if size > limit_bytes:
                break
            parts.append(part)
    if size > limit_bytes:
        text = f"the body has more than {limit_bytes} bytes; send a shorter prompt"
        raise RequestError(text, status=413, code="request_too_large")
    return b"".join(parts)


async def _answer_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _answer_http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException | StarletteHTTPException)
    text = f"{http.method} {http.url.path}: {error.detail}"
    code = "not_found" if error.status_code == 404 else "http_error"
    return JSONResponse(
        error_body(RequestError(text, status=error.status_code, code=code)), status_code=error.status_code
    )
