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

from sentei.serving.admission import SHORT_BYTES, BodyDesk
from sentei.serving.errors import ConfigError, RequestError
from sentei.serving.middleware import error_response
from sentei.serving.settings import BodyLimits, Limits

LIMITS_VARIABLE = "SENTEI_BODY_LIMITS"  # JSON of `limits.bodies`, for processes that Ray starts
LIMIT_HEADER = b"x-sentei-body-limit"  # bytes; an ingress says it with its readiness
OPERATIONS = "/admin/"
AT_ONCE_S = 0.05


def read_limits() -> BodyLimits:
    """Return the limits that this process was given; raises ConfigError for what are none."""
    text = os.environ.get(LIMITS_VARIABLE, "{}")
    try:
        return BodyLimits.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{LIMITS_VARIABLE} is {text[:200]!r}: {error}") from error


class BodyGate:
    """Hands requests on with their whole bodies; operations have a desk of their own."""

    def __init__(self, app: ASGIApp, limits: BodyLimits | None = None) -> None:
        self._app = app
        limits = limits or read_limits()
        self._desk, self._operations = BodyDesk(limits), BodyDesk(limits)
        # Until an ingress says what its model can take, it is the ingress that refuses what is too long.
        self._limit_bytes = Limits().max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, self._learning(send))
            return
        desk = self._operations if scope["path"].startswith(OPERATIONS) else self._desk
        messages: list[Message] = []
        with suppress(TimeoutError):
            # A short body that comes with its head needs no place at the desk: no crowd keeps it out.
            async with asyncio.timeout(AT_ONCE_S if _is_short(scope) else 0.0):
                messages.append(await receive())

        async def receive_next() -> Message:
            return messages.pop() if messages else await receive()

        try:
            if not messages or messages[0].get("more_body", False):
                async with desk.body(Request(scope, receive_next), self._limit_bytes) as body:
                    messages = [{"type": "http.request", "body": body, "more_body": False}]
                del body
        except RequestError as error:
            if error.code != "disconnected":
                await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive_next, self._learning(send))

    def _learning(self, send: Send) -> Send:
        async def learn(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in message.get("headers", ()):
                    if name.lower() == LIMIT_HEADER and value.isdigit():
                        self._limit_bytes = int(value)
            await send(message)

        return learn


def _is_short(scope: Scope) -> bool:
    length = dict(scope["headers"]).get(b"content-length", b"")
    return length.isdigit() and int(length[:20]) <= SHORT_BYTES


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
