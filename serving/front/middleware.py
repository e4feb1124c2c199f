"""What every request passes before its route: keys, HEAD, and pages of other origins."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving.errors import RequestError
from sentei.serving.front.access import KeyBook
from sentei.serving.openai.fields import error_body

KEYED_PATHS = ("/v1/", "/tokenize")


def error_response(error: RequestError) -> JSONResponse:
    """Return an error as OpenAI clients read it."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


class KeyGate:
    """Lets a call to the model in by its API key, and counts it until its last byte is sent."""

    def __init__(self, app: ASGIApp, keys: KeyBook) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(KEYED_PATHS):
            await self._app(scope, receive, send)
            return
        try:
            key = self._keys.enter(Headers(scope=scope).get("authorization", ""))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._keys.leave(key)


class HeadAsGet:
    """Answers HEAD with what GET would say, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


def add_middleware(api: FastAPI, keys: KeyBook, cors_origins: Sequence[str]) -> None:
    """Put all of it around an app; the last one added is the first to see a request."""
    api.add_middleware(HeadAsGet)
    api.add_middleware(KeyGate, keys=keys)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "traceparent", "x-session-id", "x-request-id"],
            expose_headers=["x-request-id", "x-sentei-request-id", "x-sentei-variant", "x-sentei-rung"],
        )
