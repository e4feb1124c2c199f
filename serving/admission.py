"""What lets requests in: bodies bounded in bytes, time and by client; prompts by the tokenizer's threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from sentei.serving.errors import RequestError
from sentei.serving.settings import BodyLimits

Args = ParamSpec("Args")
Result = TypeVar("Result")

CLOSE = {"connection": "close"}  # of an answer to a body whose rest nobody waits for


@dataclass(eq=False, slots=True)
class _Reading:
    """A body that is not whole yet; its timer ends the waiting."""

    client: str
    began_s: float
    timer: asyncio.Timeout
    num_bytes: int = 0


class BodyDesk:
    """Reads bodies for one kind of caller; requests with a whole body or none never wait for it.

    When it is full, the body that has been coming in for longest makes room, unless it is still young: so
    somebody who leaves bodies half-sent loses them first, and a body that comes at once is always read.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._reading: list[_Reading] = []  # oldest first
        self._bytes = 0

    @property
    def num_reading(self) -> int:
        """How many bodies are not whole yet."""
        return len(self._reading)

    @property
    def num_bytes(self) -> int:
        """How many bytes are held, of bodies that come in and of bodies in use."""
        return self._bytes

    @asynccontextmanager
    async def body(self, http: Request, limit_bytes: int) -> AsyncIterator[bytes]:
        """Read a body and hold its bytes for the length of the block.

        Raises RequestError: 413 for too long a body, before it is read where its length was announced; 408
        for one that does not come; 429 for one too many.
        """
        announced = http.headers.get("content-length", "0")
        if announced.isdigit() and int(announced[:20]) > limit_bytes:
            raise _too_large(limit_bytes)
        found = await self._read(http, limit_bytes)
        try:
            yield found
        finally:
            self._bytes -= len(found)

    async def _read(self, http: Request, limit_bytes: int) -> bytes:
        now_s = asyncio.get_running_loop().time()
        client = http.client.host if http.client is not None else "unknown"
        self._make_room(client, now_s)
        timer = asyncio.timeout_at(now_s + self._limits.pause_s)
        reading = _Reading(client, now_s, timer)
        self._reading.append(reading)
        is_whole = False
        try:
            async with timer:
                parts = [part async for part in self._parts(http, reading, limit_bytes)]
                is_whole = True
            return b"".join(parts)
        except TimeoutError as error:
            text = f"the body did not come: {reading.num_bytes} bytes arrived; send it at once, and again"
            raise RequestError(text, status=408, code="request_timeout", headers=CLOSE) from error
        except ClientDisconnect as error:
            raise RequestError("the client went away while it sent the body", code="disconnected") from error
        finally:
            if not is_whole:
                self._bytes -= reading.num_bytes
            if reading in self._reading:
                self._reading.remove(reading)

    async def _parts(self, http: Request, reading: _Reading, limit_bytes: int) -> AsyncIterator[bytes]:
        last_s = reading.began_s + self._limits.total_s
        async for part in http.stream():
            reading.num_bytes += len(part)
            self._bytes += len(part)
            if reading.num_bytes > limit_bytes:
                raise _too_large(limit_bytes, headers=CLOSE)
            if self._bytes > self._limits.max_bytes:
                raise _too_many(f"{self._bytes} bytes of bodies are held (limit {self._limits.max_bytes})")
            if reading in self._reading and not reading.timer.expired():  # else it has to make room
                now_s = asyncio.get_running_loop().time()
                reading.timer.reschedule(min(last_s, now_s + self._limits.pause_s))
            yield part

    def _make_room(self, client: str, now_s: float) -> None:
        """Give up the oldest body where there is one too many, of this client or of all; or raise 429."""
        own = [reading for reading in self._reading if reading.client == client]
        is_own = len(own) >= self._limits.max_per_client
        if not is_own and len(self._reading) < self._limits.max_reading:
            return
        oldest = own[0] if is_own else self._reading[0]
        if now_s - oldest.began_s < self._limits.young_s:
            whose = f"of {client} " if is_own else ""
            raise _too_many(f"{len(own) if is_own else len(self._reading)} bodies {whose}are only half here")
        self._reading.remove(oldest)
        if not oldest.timer.expired():
            oldest.timer.reschedule(now_s)


class PromptDesk:
    """Runs blocking work on prompts in threads of its own, so that a crowd leaves time to all else."""

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        self._threads = threads
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sentei-prompts")
        self._in_use = 0

    async def run(self, work: Callable[Args, Result], /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """Do a piece of work; raises RequestError 429 where too much waits already."""
        if self._in_use >= self._threads + self._max_waiting:
            text = f"{self._in_use} prompts wait for the tokenizer; retry later"
            raise RequestError(text, status=429, code="overloaded", retry_after_s=1)
        self._in_use += 1
        try:
            future = self._pool.submit(work, *args, **kwargs)
            return await asyncio.wrap_future(future)
        finally:
            self._in_use -= 1

    def stop(self) -> None:
        """Take no more work; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _too_large(limit_bytes: int, headers: dict[str, str] | None = None) -> RequestError:
    text = f"the body has more than {limit_bytes} bytes; send a shorter prompt"
    return RequestError(text, status=413, code="request_too_large", headers=headers)


def _too_many(what: str) -> RequestError:
    return RequestError(f"{what}; retry later", status=429, code="overloaded", retry_after_s=1, headers=CLOSE)
