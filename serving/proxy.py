"""What stands in Ray's HTTP proxy before its own code, which fails at headers that are not UTF-8.

Serve finds `middlewares` by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=sentei.serving.proxy:middlewares`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from sentei.serving.admission import MemoryReturn
from sentei.serving.errors import RequestError
from sentei.serving.middleware import error_response

# Those that Serve decodes; it takes `-` and `_` for the same.
READ_BY_SERVE = frozenset(
    (
        b"x-session-id",
        b"x-request-id",
        b"traceparent",
        b"serve-multiplexed-model-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
    )
)


class ProxyGuard:
    """Answers 400 to a header that Serve would fail at, and gives the memory of large bodies back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._memory = MemoryReturn()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        for name, value in scope.get("headers", ()):
            if name.lower().replace(b"_", b"-") in READ_BY_SERVE and not value.isascii():
                header = name.decode("ascii", "replace")
                text = f"header {header} has bytes that are not ASCII; send printable ASCII"
                await error_response(RequestError(text, code="invalid_value", param=header))(
                    scope, receive, send
                )
                return
        try:
            await self._app(scope, receive, send)
        finally:
            if length := dict(scope.get("headers", ())).get(b"content-length", b""):
                self._memory.note(int(length[:20]) if length.isdigit() else 0)


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy."""
    return [Middleware(ProxyGuard)]
