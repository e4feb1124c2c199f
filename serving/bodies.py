"""Bodies as they come in, bounded in bytes, in time and by client: half-sent ones hold nobody else up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from sentei.serving.errors import RequestError
from sentei.serving.settings import BodyLimits

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

        Raises RequestError: 413 for too long a body, before it is read where its length was announced; 408 for
        one that does not come; 429 for one too many.
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
        """Give up the oldest body, of this client or of all, where there is one too many; raises RequestError."""
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


def _too_large(limit_bytes: int, headers: dict[str, str] | None = None) -> RequestError:
    text = f"the body has more than {limit_bytes} bytes; send a shorter prompt"
    return RequestError(text, status=413, code="request_too_large", headers=headers)


def _too_many(what: str) -> RequestError:
    return RequestError(f"{what}; retry later", status=429, code="overloaded", retry_after_s=1, headers=CLOSE)
