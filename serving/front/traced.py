"""The span of a whole request in an ingress: from its first byte here to the last of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving.traces import NO_SPAN, REQUEST, Span, Tracer

TRACED_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))
_SPAN = "sentei.span"  # in the scope, for the route


class RequestSpans:
    """Traces each generation, whatever becomes of it; a client's `traceparent` is honoured."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        is_generation = (
            scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in TRACED_PATHS
        )
        if not is_generation:
            await self._app(scope, receive, send)
            return
        status = None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        traceparent = Headers(scope=scope).get("traceparent", "")
        span = self._tracer.begin(REQUEST, traceparent, route=scope["path"])
        try:
            await self._app({**scope, _SPAN: span}, receive, send_on)
        finally:
            span.say(status_code=status)
            span.end(is_ok=status is not None and status < 500)


def span_of(scope: Mapping[str, Any]) -> Span:
    """Return the span of a request that is answered now."""
    span: Span = scope.get(_SPAN, NO_SPAN)
    return span
