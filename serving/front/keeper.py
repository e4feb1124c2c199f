"""Answers outlive the ingress that they pass through: Ray's proxy asks another one to go on.

An ingress that dies before the first byte of an answer is asked anew, and so is one that does not know its
model yet: another may. In the middle of a stream the journal (`journal.py`) says what was sent, and the next
ingress goes on behind it. Orders are never asked twice: an order that was taken and not answered would be
given again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving.errors import RequestError
from sentei.serving.front.journal import HEADER, MARK, NEW, Journal
from sentei.serving.front.middleware import error_response

log = logging.getLogger(__name__)

# Of bodies of answers under way, all together; beyond it an answer ends with its ingress.
KEEP_BYTES = 64 << 20
AGAIN_FOR_S = 60.0
# Tries in a row that gain nothing: as with replicas (`ingress/answer.py`), it may be what they die of.
MAX_TRIES = 4
AGAIN_AFTER_S = 0.1, 2.0  # the first pause and the longest
ASKED_AGAIN = ("/v1/", "/tokenize")
RAYS_OWN = "/-/"  # pages of Serve itself: no ingress takes part
MAY_COME = (429, 500, 503)  # an ingress that says so may be able to go on with a stream later


class AnswerKeeper:
    """Asks again where an ingress died before its answer was whole."""

    def __init__(self, app: ASGIApp, *, again_for_s: float = AGAIN_FOR_S) -> None:
        self._app = app
        self._again_for_s = again_for_s
        self._kept_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope = {**scope, "headers": [item for item in scope.get("headers", ()) if item[0] != _NAME]}
        if not _can_be_asked_again(scope):
            await self._app(scope, receive, send)
            return
        first = await receive()
        body = first.get("body", b"")
        if first.get("more_body", False) or self._kept_bytes + len(body) > KEEP_BYTES:
            waiting = [first]
            await self._app(scope, lambda: _next(waiting, receive), send)
            return
        self._kept_bytes += len(body)
        try:
            await self._ask(scope, first, receive, send)
        finally:
            self._kept_bytes -= len(body)

    async def _ask(self, scope: Scope, first: Message, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        attempt = _Attempt(send, needs_model=scope["path"].startswith(ASKED_AGAIN))
        pause_s, deadline_s = AGAIN_AFTER_S[0], 0.0
        num_vain, has_gone = 0, False
        while True:
            waiting = [first]

            async def receive_again(waiting: list[Message] = waiting) -> Message:
                nonlocal has_gone
                message = await _next(waiting, receive)
                has_gone = has_gone or message["type"] == "http.disconnect"
                return message

            header = NEW if attempt.journal is None else attempt.journal.write()
            num_sent = attempt.num_sent
            attempt.begin()
            headers = [*scope["headers"], (_NAME, header.encode())]
            await self._app({**scope, "headers": headers}, receive_again, attempt.send)
            if has_gone or await attempt.finish():
                return
            has_gained = attempt.num_sent > num_sent
            num_vain = 0 if has_gained else num_vain + (not attempt.is_for_later)
            # It went on for a while: another death, not one.
            is_death = not deadline_s or has_gained
            if is_death:
                deadline_s, pause_s = loop.time() + self._again_for_s, AGAIN_AFTER_S[0]
            is_over = num_vain >= MAX_TRIES or loop.time() + pause_s > deadline_s
            if is_over or not attempt.can_go_on():
                await attempt.give_up(scope, receive)
                return
            if is_death and not attempt.is_for_later:
                log.warning(
                    "the ingress of %s went away after %d pieces; asking another one",
                    scope["path"],
                    attempt.num_sent,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, AGAIN_AFTER_S[1])


@dataclass(slots=True)
class _Attempt:
    """What of an answer has reached the client, over all tries."""

    to_client: Send
    needs_model: bool  # so that an ingress that has none yet may be passed over
    journal: Journal | None = None
    has_started: bool = False
    is_for_later: bool = False  # no ingress took the last try up: Ray had none, or one is busy or loading
    is_whole: bool = False
    num_sent: int = 0  # messages with a body
    _start: Message | None = None  # waits for its first piece: without one the answer can begin anew
    _is_none: bool = False  # what waits is no answer: Ray has no ingress, or an ingress no model yet
    _said: bytes = b""  # in its place
    _refusal: int | None = None  # status of an ingress that does not go on with the stream

    def begin(self) -> None:
        """Forget what the last try had not sent."""
        self._start, self._is_none, self._said = None, False, b""
        self._refusal, self.is_for_later = None, False

    def can_go_on(self) -> bool:
        """Whether another try may begin: nothing was sent, or a journal says what."""
        if not self.has_started:
            return True
        return self.journal is not None and (self._refusal is None or self._refusal in MAY_COME)

    async def finish(self) -> bool:
        """End an answer of which only the end was not sent; returns whether it is whole."""
        if not self.is_whole and self.journal is not None and self.journal.has_end:
            await self.to_client({"type": "http.response.body", "body": b"", "more_body": False})
            self.is_whole = True
        return self.is_whole

    async def give_up(self, scope: Scope, receive: Receive) -> None:
        """Say that there is no answer, as Ray or an ingress did; an answer that has started stays cut."""
        if self.has_started:
            return
        if self._start is not None and self._is_none:
            await self.to_client(self._start)
            await self.to_client({"type": "http.response.body", "body": self._said})
            return
        text = "every ingress that took the request went away before its answer began; try again"
        refusal = error_response(RequestError(text, status=503, code="unavailable"))
        await refusal(scope, receive, self.to_client)

    async def send(self, message: Message) -> None:
        """Pass one message on, without its line of the journal."""
        if message["type"] == "http.response.start":
            status = message["status"]
            is_loading = self.needs_model and status == 503 and _has_retry_after(message)
            self._is_none = is_loading or _is_rays(message)
            self.is_for_later = _has_retry_after(message) or (self._is_none and status == 503)
            if self.has_started:  # the client has its status already
                self._refusal = status if status != 200 else None
            else:
                self._start = message
        elif message["type"] != "http.response.body":
            await self.to_client(message)
        elif self._refusal is not None:
            pass
        elif self._is_none:
            self._said += message.get("body", b"")
        else:
            await self._send_body(message)

    async def _send_body(self, message: Message) -> None:
        body = message.get("body", b"")
        if body.startswith(MARK):
            line, _, body = body.partition(b"\n")
            self.journal = self.journal or Journal("")
            self.journal.take(line.removeprefix(MARK))
        if not self.has_started and self._start is not None:
            await self.to_client(self._start)
            self.has_started = True
        await self.to_client({**message, "body": body})
        self.num_sent += bool(body)
        self.is_whole = not message.get("more_body", False)


def _can_be_asked_again(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
        return False
    return scope["method"] in ("GET", "HEAD") or scope["path"].startswith(ASKED_AGAIN)


async def _next(waiting: list[Message], receive: Receive) -> Message:
    return waiting.pop() if waiting else await receive()


def _is_rays(start: Message) -> bool:
    """Whether an answer is Ray's own, said because no ingress could: ours are always JSON."""
    kinds: list[Any] = [value for name, value in start.get("headers", ()) if name.lower() == b"content-type"]
    return start["status"] in (500, 503) and not any(kind.startswith(b"application/json") for kind in kinds)


def _has_retry_after(start: Message) -> bool:
    return any(name.lower() == b"retry-after" for name, _ in start.get("headers", ()))


_NAME = HEADER.encode()
