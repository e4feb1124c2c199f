"""Refused uploads over real sockets: the client sees why, though it sends its whole body before it reads."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from sentei.serving.front.bodies import BodyGate, Refusals
from sentei.serving.settings import BodyLimits
from tests.machine import free_port, wait_for

MIB = 1 << 20
NUM_CLIENTS = 12


async def take(scope: Scope, receive: Receive, send: Send) -> None:
    """What lies behind the gate: it says how much it got."""
    message = await receive()
    body = str(len(message["body"])).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(limits: BodyLimits, refusals: Refusals | None = None) -> Iterator[str]:
    """The gate behind a real server, as Ray's proxy runs it."""
    port = free_port()
    config = uvicorn.Config(
        BodyGate(take, limits, refusals), host="127.0.0.1", port=port, lifespan="off", log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_for(lambda: server.started, "the server listens")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


async def upload(url: str, num_bytes: int) -> int:
    """The status of the answer to an upload; what breaks raises."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return (await client.post(f"{url}/v1/completions", content=b"x" * num_bytes)).status_code


@pytest.mark.parametrize(
    ("num_mib", "limits", "status"),
    [
        (24, BodyLimits(), 413),  # longer than any prompt
        (3, BodyLimits(max_bytes=2 * MIB), 429),  # too much beside what others send
    ],
)
async def test_a_big_upload_is_told_why_it_is_refused(num_mib: int, limits: BodyLimits, status: int) -> None:
    """Each of twelve clients at a time reads the refusal: no connection is cut on bytes that nobody read."""
    with serving(limits) as url:
        found = await asyncio.gather(*(upload(url, num_mib * MIB) for _ in range(NUM_CLIENTS)))
        after = await upload(url, MIB)

    assert found == [status] * NUM_CLIENTS
    assert after == 200


def test_what_never_ends_is_cut() -> None:
    """The answer comes at once; who goes on sending for longer than the bound, or stands still, is let go."""
    refusals = Refusals(max_bytes=MIB, for_s=1.0)
    with serving(BodyLimits(), refusals) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            began_s = time.monotonic()
            lines = ("POST /v1/completions HTTP/1.1", "host: x", f"content-length: {64 * MIB}", "", "")
            connection.sendall("\r\n".join(lines).encode())
            answer = connection.recv(65536)
            answered_s = time.monotonic() - began_s
            while more := connection.recv(65536):
                answer += more
            ended_s = time.monotonic() - began_s

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert answered_s < ended_s
    assert 0.9 < ended_s < 15
