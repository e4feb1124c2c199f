"""HTTP: the OpenAI API and the health pages; what a request means is `gateway`'s business."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from sentei.serving.errors import RequestError
from sentei.serving.front.access import KeyBook
from sentei.serving.front.admission import BodyDesk
from sentei.serving.front.bodies import LIMIT_HEADER
from sentei.serving.front.journal import HEADER, NEW, Journal, JournalWriter
from sentei.serving.front.middleware import add_middleware, error_response
from sentei.serving.front.traced import RequestSpans, span_of
from sentei.serving.ingress import wire
from sentei.serving.ingress.answer import Delta, Progress, Question
from sentei.serving.ingress.choices import interleave
from sentei.serving.ingress.gateway import REQUEST_HEADER, Gateway
from sentei.serving.openai.answers import (
    ChatChunk,
    ChatCompletion,
    Model,
    ModelList,
    TextChunk,
    TextCompletion,
    Tokens,
)
from sentei.serving.openai.document import add_document, describe
from sentei.serving.openai.fields import error_body, parse_request
from sentei.serving.openai.requests import ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest

log = logging.getLogger(__name__)


class _EventStream(StreamingResponse):
    """A stream that closes its generator at once when the client goes away, so that its cache is freed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


def build_api(
    gateway: Gateway,
    *,
    keys: KeyBook | None = None,
    cors_origins: Sequence[str] = (),
    has_keeper: bool = False,
) -> FastAPI:
    """Return the ASGI app over a gateway; its lifespan starts and stops the gateway.

    `has_keeper` says that `front/keeper.py` stands before it and takes journals away that clients send;
    without it nobody is given a journal, and none is taken.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    api = FastAPI(title="Sentei", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_exception_handler(RequestError, _answer_request_error)
    api.add_exception_handler(StarletteHTTPException, _answer_http_error)
    api.add_exception_handler(Exception, _answer_surprise)
    _add_openai_routes(api, gateway, has_keeper=has_keeper)
    _add_health_routes(api, gateway)
    add_middleware(api, keys or KeyBook(), cors_origins)
    if gateway.tracer.is_on:
        api.add_middleware(RequestSpans, tracer=gateway.tracer)
    add_document(api)
    return api


def _add_openai_routes(api: FastAPI, gateway: Gateway, *, has_keeper: bool) -> None:
    desk = BodyDesk(gateway.limits.bodies)

    @api.get("/v1/models", **describe(answer=ModelList, errors=(401, 429)))
    @api.get("/v1/models/", include_in_schema=False)
    async def models() -> JSONResponse:
        return JSONResponse(wire.models_body(gateway.model_name, gateway.created_s))

    @api.get("/v1/models/{name:path}", **describe(answer=Model, errors=(401, 404, 429)))
    async def model(name: str) -> JSONResponse:
        if name != gateway.model_name:
            text = f"model {name[:80]!r} does not exist; this server has {gateway.model_name!r}"
            raise RequestError(text, status=404, code="model_not_found", param="model")
        return JSONResponse(wire.model_body(name, gateway.created_s))

    @api.post("/v1/chat/completions", **describe(ChatRequest, answer=ChatCompletion, piece=ChatChunk))
    async def chat(request: Request) -> Any:
        return await _answer(gateway, desk, request, kind=ChatRequest, has_keeper=has_keeper)

    @api.post("/v1/completions", **describe(CompletionRequest, answer=TextCompletion, piece=TextChunk))
    async def completions(request: Request) -> Any:
        return await _answer(gateway, desk, request, kind=CompletionRequest, has_keeper=has_keeper)

    @api.post("/tokenize", **describe(TokenizeRequest, answer=Tokens))
    async def tokenize(request: Request) -> JSONResponse:
        async with desk.body(request, gateway.body_limit_bytes()) as body:
            parsed = parse_request(TokenizeRequest, body)
            return JSONResponse(await gateway.tokenize(parsed, num_bytes=len(body)))


def _add_health_routes(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/healthz")
    @api.get("/health", include_in_schema=False)
    async def healthz() -> JSONResponse:
        return JSONResponse({"ok": True})

    @api.get("/readyz", responses={503: {"description": "the model is still loading"}})
    async def readyz() -> JSONResponse:
        readiness = gateway.readiness()
        # Ray's proxy reads the header: what is longer is refused there (`front/bodies.py`).
        headers = {LIMIT_HEADER.decode(): str(gateway.body_limit_bytes())} if readiness["ready"] else None
        return JSONResponse(readiness, status_code=200 if readiness["ready"] else 503, headers=headers)


async def _answer(
    gateway: Gateway,
    desk: BodyDesk,
    http: Request,
    *,
    kind: type[ChatRequest] | type[CompletionRequest],
    has_keeper: bool,
) -> JSONResponse | StreamingResponse:
    wanted = http.headers.get(HEADER) if has_keeper else None
    journal = None if wanted in (None, NEW) else Journal.read(wanted)
    async with desk.body(http, gateway.body_limit_bytes()) as body:
        request: GenerationRequest = parse_request(kind, body)
        digest = hashlib.sha256(body).hexdigest() if wanted is not None else ""
        questions = await gateway.check(
            request,
            http.headers,
            num_bytes=len(body),
            journal=journal,
            body_sha256=digest,
            span=span_of(http.scope),
        )
    del body  # an answer takes long, and a prompt may be large
    begun = gateway.begin(questions)
    progresses = [progress for progress, _ in begun]
    deltas = interleave([answer for _, answer in begun])
    writer = wire.Wire(
        request_id=questions[0].request_id,
        model_name=gateway.model_name,
        is_chat=isinstance(request, ChatRequest),
        texts=gateway.texts,
        has_logprobs=questions[0].sampling.num_top_logprobs is not None,
    )
    num_prompt = len(questions[0].prompt_ids)
    if not request.stream:
        pieces: list[list[Delta]] = [[] for _ in questions]
        async with aclosing(deltas):
            async for index, delta in deltas:
                pieces[index].append(delta)
        whole = writer.whole(pieces, progresses, num_prompt)
        return JSONResponse(whole, headers=_headers(http, questions[0], progresses[0]))
    # The first piece decides the status and the headers, so it is awaited before anything is sent.
    first = await anext(deltas)
    usage_for = num_prompt if request.wants_usage() else None
    if journal is not None and journal.has_usage:
        usage_for = None
    lines = None
    if wanted is not None:
        ticket = gateway.sign(questions[0], progresses[0], digest) if journal is None else None
        lines = JournalWriter(ticket, journal)
    events = _events(writer, deltas, progresses, first=first, usage_for=usage_for, lines=lines)
    headers = _headers(http, questions[0], progresses[first[0]])
    return _EventStream(events, media_type="text/event-stream", headers=headers)


async def _events(
    writer: wire.Wire,
    deltas: AsyncGenerator[tuple[int, Delta], None],
    progresses: Sequence[Progress],
    *,
    first: tuple[int, Delta],
    usage_for: int | None,
    lines: JournalWriter | None,
) -> AsyncGenerator[str, None]:
    begun: set[int] = set()

    def piece(index: int, delta: Delta, *, is_wanted: bool) -> str:
        if delta.was_sent or not is_wanted:
            begun.update({index} if delta.was_sent else ())
            return ""
        body = writer.chunk(index, delta, progresses[index], is_first=index not in begun)
        begun.add(index)
        if lines is None:
            return wire.event(body)
        progress = progresses[index]
        line = lines.piece(
            index, progress.ids, delta.num_tokens, delta.finish_reason, compute_s=progress.compute_s
        )
        return line + wire.event(body)

    async with aclosing(deltas):
        if text := piece(*first, is_wanted=True):
            yield text
        try:
            async for index, delta in deltas:
                says = delta.text or delta.logprobs or delta.calls or delta.finish_reason is not None
                if text := piece(index, delta, is_wanted=bool(says)):
                    yield text
        except RequestError as error:  # headers are out: the error must travel inside the stream
            yield wire.error_event(error)
            return
        if usage_for is not None:
            line = lines.usage() if lines is not None else ""
            yield line + wire.event(writer.usage_chunk(progresses, usage_for))
        yield (lines.end() if lines is not None else "") + wire.DONE


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


async def _answer_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _answer_http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException | StarletteHTTPException)
    text = f"{http.method} {http.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if "GET" in headers.get("Allow", "") and "HEAD" not in headers["Allow"]:
        headers["Allow"] += ", HEAD"
    body = error_body(RequestError(text, status=error.status_code, code=code))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


async def _answer_surprise(_: Request, __: Exception) -> JSONResponse:
    """Answer what nobody foresaw in the shape that clients read; Starlette logs it with its traceback."""
    return error_response(RequestError("internal error; see the server's log", status=500))
