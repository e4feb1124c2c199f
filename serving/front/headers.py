"""Headers that Ray's proxy fails at, and those by which a client would steer Ray."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from sentei.serving.errors import RequestError
from sentei.serving.front.middleware import error_response

# Those that Serve decodes; it takes `-` and `_` for the same.
READ_BY_SERVE = frozenset(
    (
        b"x-session-id",
        b"x-request-id",
        b"traceparent",
        b"serve-multiplexed-model-id",
    )
)
# By these Serve takes a time-out, and whether it looks if the client is still there: ours to say.
STEERS_SERVE = frozenset((b"x-request-timeout-seconds", b"x-request-disconnect-disabled"))


class HeaderGuard:
    """Answers 400 to a header that Serve would fail at, and takes away those that would steer it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        kept = list[tuple[bytes, bytes]]()
        for name, value in scope.get("headers", ()):
            known = name.lower().replace(b"_", b"-")
            if known not in STEERS_SERVE:
                kept.append((name, value))
            if known in READ_BY_SERVE and not value.isascii():
                header = name.decode("ascii", "replace")
                text = f"header {header} has bytes that are not ASCII; send printable ASCII"
                refusal = error_response(RequestError(text, code="invalid_value", param=header))
                await refusal(scope, receive, send)
                return
        await self._app({**scope, "headers": kept}, receive, send)
