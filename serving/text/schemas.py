"""Checks JSON schemas in a process of their own, under limits of time and memory.

Some small schemas keep any compiler of grammars busy without end: a few patterns that must hold together are
enough. So nobody's schema is compiled here before another process has shown that it can be done quickly.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections import OrderedDict

from sentei.serving.engine.grammar import read_schema
from sentei.serving.errors import GrammarError, RequestError

MAX_SCHEMA_BYTES = 32 << 10
MAX_CPU_S = 0.5  # an engine compiles it once more, between two steps
KILL_CPU_S = 1.0
MAX_WAIT_S = 15.0  # on a machine that is busy with other things
START_WAIT_S = 30.0
MAX_MEMORY_BYTES = 2 << 30
MAX_REMEMBERED = 1024


class SchemaChecker:
    """Asks the process, starts it anew when a schema was too much for it, and remembers its answers."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._remembered: OrderedDict[str, str] = OrderedDict()  # what is wrong with a schema; "": nothing

    async def check(self, schema: str) -> None:
        """Raise RequestError with what is wrong with a schema."""
        if len(schema.encode()) > MAX_SCHEMA_BYTES:
            raise _refusal(f"has more than {MAX_SCHEMA_BYTES} bytes")
        async with self._lock:
            words = self._remembered.get(schema)
            if words is None:
                words = self._remembered[schema] = await self._ask(schema)
                if len(self._remembered) > MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if words:
            raise _refusal(f"cannot be used: {words}")

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _ask(self, schema: str) -> str:
        try:
            process = await self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps(schema).encode() + b"\n")
            await process.stdin.drain()
            found = json.loads(await asyncio.wait_for(_line(process), MAX_WAIT_S))
        except (TimeoutError, OSError, ValueError):
            await self.stop()
            return f"it takes more than {KILL_CPU_S:g} s, or too much memory; send a simpler one"
        return str(found)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            await asyncio.wait_for(_line(self._process), START_WAIT_S)  # it says that it is up
        return self._process


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise OSError("the process that checks schemas has ended")
    return line


def _refusal(words: str) -> RequestError:
    return RequestError(f"the JSON schema {words}", code="invalid_value", param="response_format")


def judge(schema: str) -> str:
    """Return what is wrong with a schema, or ""."""
    began_s = time.process_time()
    try:
        read_schema(schema)
    except GrammarError as error:
        return str(error)
    spent_s = time.process_time() - began_s
    return f"it takes {spent_s:.1f} s to compile (limit {MAX_CPU_S:g} s)" if spent_s > MAX_CPU_S else ""


def main() -> None:
    """Answer schemas on standard input, one JSON string a line, until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print(json.dumps("up"), flush=True)
    for line in sys.stdin:
        # Ends this process by itself, also inside foreign code, and when nobody is left to kill it.
        signal.setitimer(signal.ITIMER_PROF, KILL_CPU_S)
        print(json.dumps(judge(json.loads(line))), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
