"""What lets requests in: bodies bounded in bytes, time and by client; prompts by the tokenizer's threads."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from sentei.serving.errors import RequestError
from sentei.serving.settings import BodyLimits

Args = ParamSpec("Args")
Result = TypeVar("Result")

SHORT_BYTES = 32 << 10
LARGE_BYTES = 256 << 10
GIVE_BACK_AFTER_S = 3.0
CLOSE = {"connection": "close"}  # of an answer to a body whose rest nobody waits for


@dataclass(eq=False, slots=True)
class _Reading:
    """A body that is not whole yet; its timer ends the waiting."""

    client: str
    began_s: float
    timer: asyncio.Timeout
    announced_bytes: int  # of a long body; what short ones announce is not reserved
    num_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """What came, or what will come if that is more."""
        return max(self.num_bytes, self.announced_bytes)


class BodyDesk:
    """Reads bodies for one kind of caller; requests with a whole body or none never wait for it.

    When it is full, the body that has been coming in for longest makes room, unless it is still young: so
    somebody who leaves bodies half-sent loses them first, and a body that comes at once is always read.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._reading: list[_Reading] = []  # oldest first
        self._bytes = 0
        self._memory = MemoryReturn()

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
        length = http.headers.get("content-length", "0")
        announced = int(length[:20]) if length.isdigit() else 0
        if announced > limit_bytes:
            raise _too_large(limit_bytes, headers=CLOSE)
        found = await self._read(http, limit_bytes, announced if announced > SHORT_BYTES else 0)
        try:
            yield found
        finally:
            self._bytes -= len(found)
            self._memory.note(len(found))

    async def _read(self, http: Request, limit_bytes: int, announced: int) -> bytes:
        now_s = asyncio.get_running_loop().time()
        client = http.client.host if http.client is not None else "unknown"
        if announced:
            self._check_bytes(client, announced)
        self._make_room(client, now_s)
        timer = asyncio.timeout_at(now_s + self._limits.pause_s)
        reading = _Reading(client, now_s, timer, announced)
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

    def _check_bytes(self, client: str, announced: int) -> None:
        """Raise 429 for a long body that would be too much beside what is held and was announced."""
        own = sum(reading.held_bytes for reading in self._reading if reading.client == client)
        to_come = sum(reading.held_bytes - reading.num_bytes for reading in self._reading)
        for held, limit in (
            (own, self._limits.max_client_bytes),
            (self._bytes + to_come, self._limits.max_bytes),
        ):
            if held + announced > limit:
                raise _too_many(f"{held} bytes of bodies are on their way (limit {limit})")

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


class MemoryReturn:
    """Gives what large bodies left behind back to the system, once for a crowd of them, soon after."""

    def __init__(self, trim: Callable[[int], object] | None = None) -> None:
        self._trim = trim or _c_trim
        self._timer: asyncio.TimerHandle | None = None

    def note(self, num_bytes: int) -> None:
        """Note that a body of this size was let go."""
        if num_bytes < LARGE_BYTES:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(GIVE_BACK_AFTER_S, loop.run_in_executor, None, self._trim, 0)


def _c_trim(pad_bytes: int) -> None:
    """Call the C library's `malloc_trim`; where it has none nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(pad_bytes)


class PromptDesk:
    """Runs blocking work on prompts in threads of its own, so that a crowd leaves time to all else.

    Short prompts have a line of their own: they never wait for long ones.
    """

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        self._short = _Line("short", threads=1, max_waiting=max_waiting)
        self._long = _Line("long", threads=threads, max_waiting=max_waiting)

    async def run(
        self, num_bytes: int, work: Callable[Args, Result], /, *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """Do a piece of work on a body of this size; raises RequestError 429 where too much waits already."""
        line = self._short if num_bytes <= SHORT_BYTES else self._long
        return await line.run(partial(work, *args, **kwargs))

    def stop(self) -> None:
        """Take no more work; what has not begun is dropped."""
        self._short.pool.shutdown(wait=False, cancel_futures=True)
        self._long.pool.shutdown(wait=False, cancel_futures=True)


class _Line:
    def __init__(self, name: str, *, threads: int, max_waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=f"sentei-{name}-prompts")
        self._room = threads + max_waiting
        self._num = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        if self._num >= self._room:
            raise _too_many(f"{self._num} prompts wait for the tokenizer", headers={})
        self._num += 1
        try:
            return await asyncio.wrap_future(self.pool.submit(work))
        finally:
            self._num -= 1


def _too_large(limit_bytes: int, headers: dict[str, str] | None = None) -> RequestError:
    text = f"the body has more than {limit_bytes} bytes; send a shorter prompt"
    return RequestError(text, status=413, code="request_too_large", headers=headers)


def _too_many(what: str, headers: dict[str, str] = CLOSE) -> RequestError:
    text = f"{what}; retry later"
    return RequestError(text, status=429, code="overloaded", retry_after_s=1, headers=headers)
