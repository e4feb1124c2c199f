"""Requests enter Ray a few at a time, so that health and operations never stand behind a crowd of them."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AT_ONCE = 16  # that wait for the beginning of their answers
FOR_S = 0.25  # the longest that one of them counts: a first token may take long, and is no reason to wait
AT_ANY_TIME = ("/admin/", "/healthz", "/health", "/readyz", "/metrics", "/-/")


class Turnstile:
    """Lets requests in by turns; what operators and their probes ask passes beside it."""

    def __init__(self, app: ASGIApp, *, at_once: int = AT_ONCE, for_s: float = FOR_S) -> None:
        self._app = app
        self._turns = asyncio.Semaphore(at_once)
        self._for_s = for_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith(AT_ANY_TIME):
            await self._app(scope, receive, send)
            return
        await self._turns.acquire()
        has_passed = False

        def let_next() -> None:
            nonlocal has_passed
            if not has_passed:
                has_passed = True
                self._turns.release()

        timer = asyncio.get_running_loop().call_later(self._for_s, let_next)

        async def send_on(message: Message) -> None:
            let_next()
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            timer.cancel()
            let_next()
