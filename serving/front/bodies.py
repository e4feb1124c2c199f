"""Bodies are read whole, in Ray's proxy, before Ray sees the request: half-sent ones cost it nothing.

What passes here has its body in one message. Who sends half of one waits at the desk of this process, by its
time-outs and numbers; what is announced as too long, or as too much beside all others, is refused unread.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving.errors import ConfigError, RequestError
from sentei.serving.front.admission import SHORT_BYTES, BodyDesk
from sentei.serving.front.middleware import error_response
from sentei.serving.settings import BodyLimits, Limits

LIMITS_VARIABLE = "SENTEI_BODY_LIMITS"  # JSON of `limits.bodies`, for processes that Ray starts
LIMIT_HEADER = b"x-sentei-body-limit"  # bytes; an ingress says it with its readiness
OPERATIONS = "/admin/"
READINESS = "/readyz"
DROP_BYTES, DROP_S, DROPS = 64 << 20, 5.0, 64  # of refused bodies: of each, and how many at a time
AT_ONCE_S = 0.05  # no crowd keeps out what is here by then


def read_limits() -> BodyLimits:
    """Return the limits that this process was given; raises ConfigError for what are none."""
    text = os.environ.get(LIMITS_VARIABLE, "{}")
    try:
        return BodyLimits.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{LIMITS_VARIABLE} is {text[:200]!r}: {error}") from error


class BodyGate:
    """Hands requests on with their whole bodies; operations have a desk of their own."""

    def __init__(
        self, app: ASGIApp, limits: BodyLimits | None = None, refusals: Refusals | None = None
    ) -> None:
        self._app = app
        limits = limits or read_limits()
        self._desk, self._operations = BodyDesk(limits), BodyDesk(limits)
        self._refusals = refusals or Refusals()
        # Until an ingress says what its model can take, it is the ingress that refuses what is too long.
        self._limit_bytes = Limits().max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == READINESS:
            send = self._learning(send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length == b"0" and b"transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        desk = self._operations if scope["path"].startswith(OPERATIONS) else self._desk
        # Of a chunked body nobody says how long it is.
        is_short = length.isdigit() and 0 < int(length[:20]) <= min(SHORT_BYTES, self._limit_bytes)
        come = await _come_at_once(receive) if is_short else []
        if come and come[-1]["type"] == "http.disconnect":
            return

        async def receive_next() -> Message:
            return come.pop(0) if come else await receive()

        try:
            if not _is_whole(come):
                async with desk.body(Request(scope, receive_next), self._limit_bytes) as body:
                    come = [{"type": "http.request", "body": body, "more_body": False}]
                del body
        except RequestError as error:
            if error.code != "disconnected":
                await self._refusals.answer(error, scope, receive_next, send)
            return
        await self._app(scope, receive_next, send)

    def _learning(self, send: Send) -> Send:
        async def learn(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in message.get("headers", ()):
                    if name.lower() == LIMIT_HEADER and value.isdigit():
                        self._limit_bytes = int(value)
            await send(message)

        return learn


class Refusals:
    """Answers a request whose body nobody wants so that its client sees the answer.

    A socket that is closed on unread bytes takes the answer back, and clients send the whole body before they
    read. So the answer goes out at once, and what still comes is taken and dropped, for a while and so much.
    """

    def __init__(self, *, max_bytes: int = DROP_BYTES, for_s: float = DROP_S, at_once: int = DROPS) -> None:
        self._max_bytes = max_bytes
        self._for_s = for_s
        self._left = at_once

    async def answer(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and end it when the body has ended, or has been too much or too long."""
        is_slow = error.status == 408  # what has not come will not come now
        if is_slow or not self._left:
            await error_response(error)(scope, receive, send)
            return

        async def send_open(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            await send({**message, "more_body": True} if is_body else message)

        self._left -= 1
        try:
            await error_response(error)(scope, receive, send_open)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._for_s):
                    await self._drop(receive)
        finally:
            self._left += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop(self, receive: Receive) -> None:
        num_bytes = 0
        while num_bytes <= self._max_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


async def _come_at_once(receive: Receive) -> list[Message]:
    """Return what comes with the head of a short body: whole, it needs no place at the desk."""
    come: list[Message] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(AT_ONCE_S):
            while not _is_whole(come):
                come.append(await receive())
    if not _is_whole(come) or come[-1]["type"] == "http.disconnect":
        return come
    body = b"".join(message.get("body", b"") for message in come)
    return [{"type": "http.request", "body": body, "more_body": False}]


def _is_whole(come: list[Message]) -> bool:
    return bool(come) and not come[-1].get("more_body", False)
