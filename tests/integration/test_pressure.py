"""Callers that send half of a body, or too much of one: who else has to wait, and what is kept of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from sentei.monitors.store import Store
from sentei.serving.errors import ConfigError
from sentei.serving.front import admission
from sentei.serving.front.access import read_user_key
from sentei.serving.front.admission import MemoryReturn
from sentei.serving.front.bodies import LIMIT_HEADER, BodyGate
from sentei.serving.front.turns import Turnstile
from sentei.serving.proxy import middlewares
from sentei.serving.settings import BodyLimits
from tests.fakes_serving import MODEL, FakeTokenizer
from tests.integration.test_ingress import LIMITS, World, post_chat

ASK = "/v1/completions"
CHUNKED = [(b"transfer-encoding", b"chunked")]
BODIES = BodyLimits(pause_s=0.2, total_s=0.5, young_s=0.0, max_per_client=4, max_reading=6, max_bytes=4096)


def pressed(**fields: Any) -> World:
    """An ingress with small limits on bodies."""
    return World(limits=LIMITS.model_copy(update={"bodies": BODIES.model_copy(update=fields)}))


def api_of(client: httpx.AsyncClient) -> FastAPI:
    """The app behind a client of ours."""
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    assert isinstance(transport.app, FastAPI)
    return transport.app


class HalfSent:
    """A request whose body never ends: `parts` come at once, or every `every_s`, then nothing or the end."""

    def __init__(
        self,
        api: ASGIApp,
        *,
        who: str = "10.0.0.1",
        parts: Sequence[bytes] = (b"{",),
        every_s: float = 0.0,
        hangs_up: bool = False,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._parts, self._every_s, self._hangs_up = list(parts), every_s, hangs_up
        self._sent: list[Any] = []
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": ASK,
            "raw_path": ASK.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": (who, 1),
            "server": ("test", 80),
            "scheme": "http",
            "root_path": "",
        }
        self.task = asyncio.create_task(api(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await asyncio.sleep(self._every_s)
        if not self._parts:
            if self._hangs_up:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self._parts.pop(0), "more_body": True}

    async def _send(self, message: Any) -> None:
        self._sent.append(message)

    @property
    def has_answer(self) -> bool:
        """Whether an answer has begun; what still comes of a refused body is dropped before it ends."""
        return bool(self._sent)

    async def answer(self) -> tuple[int, str, str]:
        """Status, error code and `connection` header of what came back in the end."""
        await asyncio.wait_for(self.task, 5)
        headers = dict(self._sent[0]["headers"])
        code = json.loads(self._sent[1]["body"])["error"]["code"]
        return self._sent[0]["status"], code, headers.get(b"connection", b"").decode()

    async def end(self) -> None:
        """Hang up."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_half_sent_body_is_given_up() -> None:
    """A body that stops coming is a 408 after the pause, and its connection ends."""
    async with pressed().run() as client:
        found = await HalfSent(api_of(client)).answer()

    assert found == (408, "request_timeout", "close")


async def test_body_of_single_bytes_is_given_up() -> None:
    """Bytes that drip in are no way to hold a slot for longer than a whole body may take."""
    async with pressed().run() as client:
        began_s = asyncio.get_running_loop().time()
        found = await HalfSent(api_of(client), parts=[b"x"] * 100, every_s=0.05).answer()
        took_s = asyncio.get_running_loop().time() - began_s

    assert found == (408, "request_timeout", "close")
    assert took_s < 2


async def test_many_half_sent_bodies_let_a_whole_one_pass() -> None:
    """Of one client no more bodies wait than it may have; a whole body is answered beside them, as before."""
    async with pressed(pause_s=60, total_s=60).run() as client:
        halves = [HalfSent(api_of(client), who="127.0.0.1") for _ in range(20)]
        await asyncio.sleep(0.05)
        num_open = sum(not half.task.done() for half in halves)
        response = await asyncio.wait_for(post_chat(client), 2)
        given_up = await halves[0].answer()
        for half in halves:
            await half.end()

    assert num_open == 4
    assert response.status_code == 200
    assert given_up == (408, "request_timeout", "close")


async def test_young_bodies_are_not_given_up_for_newer_ones() -> None:
    """Where all bodies have only just begun, the newest is told to come back."""
    async with pressed(young_s=60, pause_s=60, total_s=60).run() as client:
        halves = [HalfSent(api_of(client)) for _ in range(5)]
        found = await halves[4].answer()
        for half in halves:
            await half.end()

    assert found == (429, "overloaded", "close")


async def test_another_client_has_room_of_its_own() -> None:
    """One address cannot take the places of all others."""
    async with pressed(young_s=60, pause_s=60, total_s=60).run() as client:
        halves = [HalfSent(api_of(client)) for _ in range(20)]
        await asyncio.sleep(0.05)
        response = await asyncio.wait_for(post_chat(client), 2)
        for half in halves:
            await half.end()

    assert response.status_code == 200


async def test_bytes_of_all_bodies_are_bounded() -> None:
    """However few bodies they are in, bytes over the bound are refused, and those of refused ones freed."""
    async with pressed(pause_s=60, total_s=60).run() as client:
        halves = [HalfSent(api_of(client), parts=[b"x" * 1900]) for _ in range(3)]
        found = await halves[2].answer()
        for half in halves[:2]:
            await half.end()
        response = await asyncio.wait_for(post_chat(client), 2)

    assert found == (429, "overloaded", "close")
    assert response.status_code == 200


async def test_announced_length_is_refused_before_the_body_is_read() -> None:
    """A body that says it is too long costs nothing: no byte of it is waited for."""
    async with pressed().run() as client:
        body = json.dumps({"model": MODEL, "prompt": "x" * 4000})
        response = await client.post(ASK, content=body, headers={"content-type": "application/json"})

    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def roomy() -> World:
    """An ingress whose setting alone would let megabytes in; the model's context is 64 tokens."""
    return World(limits=LIMITS.model_copy(update={"max_body_bytes": 64 << 20}))


async def test_prompt_that_never_fits_is_refused_by_its_bytes() -> None:
    """A body beyond all that a prompt of the context can need is refused unread, whatever the setting."""
    world = roomy()
    async with world.run() as client:
        refused = await client.post(ASK, json={"model": MODEL, "prompt": "a " * 1_500_000})
        encoded = tokenizer_of(world).num_encoded

    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert encoded == 0


async def test_prompt_that_never_fits_is_refused_by_its_beginning() -> None:
    """Of a prompt that is too long, no more is turned into ids than shows it."""
    world = roomy()
    async with world.run() as client:
        refused = await client.post(ASK, json={"model": MODEL, "prompt": "a " * 50_000})
        encoded = tokenizer_of(world).num_encoded

    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "100000 characters" in error["message"]
    assert encoded == 256


async def test_every_spelling_of_a_prompt_that_fits_is_let_in() -> None:
    """The bound by bytes leaves room for the longest spelling in JSON, and for ids with spaces between."""
    escaped = '{"model": "tiny", "max_tokens": 1, "prompt": "' + "\\u0041" * 60 + '"}'
    ids = json.dumps({"model": MODEL, "max_tokens": 1, "prompt": [66] * 60}, indent=4)
    async with roomy().run() as client:
        found = [await client.post(ASK, content=body) for body in (escaped, ids)]

    assert [response.status_code for response in found] == [200, 200]


async def test_crowd_of_prompts_leaves_the_lease_alone() -> None:
    """Prompts wait for the tokenizer in a line of their own: the routing table is read meanwhile."""
    world = World(limits=LIMITS.model_copy(update={"max_concurrent": 4}))
    gate = threading.Event()
    async with world.run() as client:
        tokenizer_of(world).encode = lambda text, **_: [1] * 20 if gate.wait(10) else []  # type: ignore[method-assign,assignment]
        asked = [asyncio.create_task(post_chat(client)) for _ in range(40)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(world.gateway.read_routing_once(), 2)
        gate.set()
        statuses = sorted([(await task).status_code for task in asked])

    assert statuses.count(429) >= 35
    assert statuses[0] == 200


async def test_short_prompts_do_not_wait_for_long_ones() -> None:
    """Each has a line of its own before the tokenizer."""
    world = roomy()
    gate = threading.Event()
    async with world.run() as client:
        real = FakeTokenizer().encode
        slow = lambda text, **_: real(text) if len(text) < 100 or gate.wait(10) else []  # noqa: E731
        tokenizer_of(world).encode = slow  # type: ignore[method-assign,assignment]
        long = [
            asyncio.create_task(client.post(ASK, json={"model": MODEL, "prompt": "a " * 50_000}))
            for _ in range(3)
        ]
        await asyncio.sleep(0.1)
        response = await asyncio.wait_for(post_chat(client), 2)
        gate.set()
        statuses = [(await task).status_code for task in long]

    assert (response.status_code, statuses) == (200, [400] * 3)


def tokenizer_of(world: World) -> FakeTokenizer:
    """The tokenizer that counts."""
    assert isinstance(world.gateway.tokenizer, FakeTokenizer)
    return world.gateway.tokenizer


@pytest.mark.parametrize("header", ["x-session-id", "X_Request_Id", "traceparent"])
async def test_header_that_is_no_text_is_refused_by_name(header: str) -> None:
    """Serve's proxy reads some headers as UTF-8 and fails at others; ours answers before it."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("Serve would fail here")

    made = middlewares()[-1]
    transport = httpx.ASGITransport(app=made.cls(inner, *made.args, **made.kwargs))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/", headers=[(header.encode(), b"\xff\xfe")])

    error = response.json()["error"]
    assert (response.status_code, error["param"].lower()) == (400, header.lower())


async def test_client_does_not_steer_serve() -> None:
    """How long a request may take, and whether Serve watches for a client that left, is not its to say."""
    seen: list[dict[str, str]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    made = middlewares()[-1]
    transport = httpx.ASGITransport(app=made.cls(inner, *made.args, **made.kwargs))
    given = {
        "x-request-timeout-seconds": "0.001",
        "X_Request_Disconnect_Disabled": "?1",
        "x-session-id": "ann",
    }
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=given) as client:
        await client.get("/")

    names = {name.replace("_", "-") for name in seen[0]}
    assert not names & {"x-request-timeout-seconds", "x-request-disconnect-disabled"}
    assert seen[0]["x-session-id"] == "ann"


async def test_user_is_kept_as_a_keyed_hash() -> None:
    """Two ingresses with one key tell one user from another, and no record says who it is."""
    worlds = [World(user_key=key) for key in (b"k1", b"k1", b"k2")]
    for world in worlds:
        async with world.run() as client:
            await post_chat(client, user="ann@example.org")
    units = [world.store.requests[0].session_id for world in worlds]

    assert units[0] == units[1] != units[2]
    assert units[0].startswith("user-")
    assert not any("ann" in unit for unit in units)


def test_key_of_users_is_made_once_and_private(tmp_path: Path) -> None:
    """Whoever starts first makes it; all others read the same."""
    found = {read_user_key(tmp_path) for _ in range(3)}

    assert (len(found), len(found.pop())) == (1, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["user.key"]
    assert (tmp_path / "user.key").stat().st_mode & 0o777 == 0o600


def test_key_of_users_that_can_be_guessed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It signs what one ingress lets another go on with; the message names variable and length."""
    monkeypatch.setenv("SENTEI_USER_KEY", "short")

    with pytest.raises(ConfigError, match="SENTEI_USER_KEY has 5 characters, and at least 16"):
        read_user_key(tmp_path)


def test_database_is_its_owners_alone(tmp_path: Path) -> None:
    """Records, and what SQLite keeps beside them, cannot be read by others."""
    with Store.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        store.save_value("a", "b")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert modes
    assert set(modes.values()) == {0o600}


async def test_memory_of_large_bodies_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of large bodies is followed by one call to the allocator; small ones by none."""
    monkeypatch.setattr(admission, "GIVE_BACK_AFTER_S", 0.05)
    calls: list[int] = []
    memory = MemoryReturn(calls.append)

    memory.note(10)
    await asyncio.sleep(0.1)
    num_after_small = len(calls)
    for _ in range(5):
        memory.note(1 << 20)
    await asyncio.sleep(0.2)

    assert (num_after_small, len(calls)) == (0, 1)


class Inside:
    """What Ray's own code sees behind the gate."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self.messages: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.messages.append(await receive())
        headers = [] if self._limit_bytes is None else [(LIMIT_HEADER, str(self._limit_bytes).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


async def parts_of_a_body() -> AsyncIterator[bytes]:
    """A body that comes in three parts."""
    for part in (b"[1,", b"2,", b"3]"):
        yield part


async def test_gate_hands_a_body_on_whole() -> None:
    """However many parts a body came in, Ray sees one message."""
    inside = Inside()
    transport = httpx.ASGITransport(app=BodyGate(inside, BODIES))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post(ASK, content=parts_of_a_body())

    assert inside.messages == [{"type": "http.request", "body": b"[1,2,3]", "more_body": False}]


async def test_half_sent_bodies_cost_ray_nothing() -> None:
    """Ray never sees them; orders, and short bodies that come at once, are read beside all there may be."""
    inside = Inside()
    gate = BodyGate(inside, BODIES.model_copy(update={"pause_s": 60, "total_s": 60, "young_s": 60}))
    halves = [HalfSent(gate, who="127.0.0.1", headers=CHUNKED) for _ in range(20)]
    await asyncio.sleep(0.05)
    transport = httpx.ASGITransport(app=gate)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        order = await asyncio.wait_for(client.post("/admin/v1/rollouts", json={}), 2)
        short = await client.post(ASK, json={})
        refused = await client.post(ASK, content=parts_of_a_body())
    for half in halves:
        await half.end()

    assert (order.status_code, short.status_code, refused.status_code) == (200, 200, 429)
    assert len(inside.messages) == 2


async def test_body_that_ends_with_its_client_never_reaches_ray() -> None:
    """Half of a short body, and then the client hangs up: that is no whole body."""
    inside = Inside()
    for parts in ([b"[1,"], []):
        half = HalfSent(
            BodyGate(inside, BODIES), parts=parts, hangs_up=True, headers=[(b"content-length", b"7")]
        )
        await asyncio.wait_for(half.task, 2)

    assert inside.messages == []


async def test_gate_learns_what_is_too_long() -> None:
    """Once an ingress has said with its readiness what its model takes, longer bodies are refused unread."""
    inside = Inside(limit_bytes=100)
    transport = httpx.ASGITransport(app=BodyGate(inside, BODIES))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        before = [await client.post(ASK, content=b"x" * 200) for _ in range(2)]
        await client.get("/readyz")
        after = await client.post(ASK, content=b"x" * 200)

    assert [response.status_code for response in (*before, after)] == [200, 200, 413]
    assert after.json()["error"]["code"] == "request_too_large"


async def test_announced_bytes_are_bounded_before_they_come() -> None:
    """Long bodies beyond a bound, of one address or all, are refused unread; short ones pass."""
    inside = Inside()
    limits = BodyLimits(max_client_bytes=100_000, max_bytes=150_000)
    gate = BodyGate(inside, limits)
    long = [(b"content-length", b"60000")]
    halves = [HalfSent(gate, who=who, headers=long) for who in ("a", "a", "b", "c")]
    await asyncio.sleep(0.05)
    refused = [half.has_answer for half in halves]
    transport = httpx.ASGITransport(app=gate)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        short = await client.post(ASK, content=b"x" * 100)
    for half in halves:
        await half.end()

    assert refused == [False, True, False, True]
    assert short.status_code == 200


async def test_health_and_orders_do_not_stand_behind_a_crowd() -> None:
    """Of a crowd a few are let in at a time; who waits long for an answer does not keep others out."""
    inside = list[str]()
    may_end = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.append(scope["path"])
        if scope["path"] == ASK:
            await may_end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    transport = httpx.ASGITransport(app=Turnstile(slow, at_once=2, for_s=0.3))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        crowd = [asyncio.create_task(client.get(ASK)) for _ in range(6)]
        await asyncio.sleep(0.1)
        first = inside.count(ASK)
        statuses = [
            (await asyncio.wait_for(client.get(path), 0.1)).status_code
            for path in ("/healthz", "/admin/v1/routing")
        ]
        await asyncio.sleep(0.4)
        later = inside.count(ASK)
        may_end.set()
        ended = [(await task).status_code for task in crowd]

    assert (first, later) == (2, 4)
    assert statuses == [200, 200]
    assert ended == [200] * 6
