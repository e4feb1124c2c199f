"""Ingresses that go away in the middle of an answer: the next one goes on where it ended."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving.front.bodies import BodyGate
from sentei.serving.front.journal import HEADER, Journal
from sentei.serving.front.keeper import AnswerKeeper
from sentei.serving.settings import BodyLimits
from tests.fakes_serving import FakeVariant
from tests.integration.test_ingress import World, chat
from tests.integration.test_pressure import api_of

KEY = b"shared by all ingresses"
TEXT = "héllo wörld"


class Ingresses:
    """What Ray does with a request: the next ingress gets it, and dies after as many messages as told."""

    def __init__(self, apis: list[ASGIApp], cuts: list[int]) -> None:
        self._apis, self.cuts = apis, list(cuts)
        self.asked: list[Scope] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or begin to."""
        api = self._apis[len(self.asked) % len(self._apis)]
        self.asked.append(scope)
        left = self.cuts.pop(0) if self.cuts else None
        is_cut = asyncio.Event()

        async def send_some(message: Message) -> None:
            nonlocal left
            if left == 0:  # it is dead: what it still says nobody hears
                is_cut.set()
                return
            left = None if left is None else left - 1
            await send(message)

        task = asyncio.create_task(api(scope, receive, send_some))
        self._tasks.append(task)
        cut = asyncio.create_task(is_cut.wait())
        await asyncio.wait({task, cut}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()


def make_world(key: bytes = KEY) -> World:
    """One of several ingresses over variants that say the same."""
    return World(FakeVariant("dense", TEXT), FakeVariant("sparse", TEXT), user_key=key)


async def ask(
    cuts: list[int],
    *,
    keys: tuple[bytes, ...] = (KEY, KEY, KEY),
    path: str = "/v1/chat/completions",
    **body: Any,
) -> tuple[httpx.Response, list[World], Ingresses]:
    """Ask ingresses that die one after the other, through what stands in Ray's proxy."""
    worlds = [make_world(key) for key in keys]
    async with AsyncExitStack() as stack:
        apis = [api_of(await stack.enter_async_context(world.run())) for world in worlds]
        ingresses = Ingresses(list(apis), cuts)
        keeper = BodyGate(AnswerKeeper(ingresses), BodyLimits())
        transport = httpx.ASGITransport(app=keeper)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post(path, json=chat(**body), headers={"x-session-id": "ann"})
    return response, worlds, ingresses


def told(response: httpx.Response) -> list[tuple[Any, ...]]:
    """What a stream says: each event without its time and its names."""
    assert response.text.endswith("data: [DONE]\n\n")
    lines = [line for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    assert all(line.startswith("data: ") for line in lines), "nothing of the journal reaches a client"
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len({piece["id"] for piece in pieces}) == 1
    return [(piece["choices"], piece.get("usage")) for piece in pieces]


def by_choice(found: list[tuple[Any, ...]]) -> dict[int, list[Any]]:
    """The events of each choice: how those of several alternate is nobody's promise."""
    choices: dict[int, list[Any]] = {}
    for events, usage in found:
        for event in events:
            choices.setdefault(event["index"], []).append(event)
        if usage is not None:
            choices.setdefault(-1, []).append(usage)
    return choices


OPTIONS = [
    {"stream_options": {"include_usage": True}},
    {"logprobs": True, "top_logprobs": 0},
    {"n": 2, "stream_options": {"include_usage": True}},
    {"stop": ["rl"]},
    {"max_tokens": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
async def test_stream_is_whole_wherever_its_ingress_dies(options: dict[str, Any]) -> None:
    """After each message of a stream in turn: the client sees what it would have seen, once."""
    undisturbed, _, _ = await ask([], stream=True, **options)
    expected = by_choice(told(undisturbed))
    num_messages = sum(map(len, expected.values())) + 3  # the start, the end mark, the end

    for cut in range(num_messages):
        response, worlds, ingresses = await ask([cut], stream=True, **options)

        assert response.status_code == 200
        assert by_choice(told(response)) == expected, f"cut after {cut} messages"
        assert response.text.count("[DONE]") == 1
        has_all = cut == num_messages - 1  # nothing is left to ask for
        assert len(ingresses.asked) == (1 if has_all else 2)
        records = worlds[0 if has_all else 1].store.requests
        assert {record.outcome for record in records} == {"ok"}


async def test_stream_outlives_several_ingresses() -> None:
    """Each may die; the audit that was drawn is handed in once, by the last."""
    undisturbed, _, _ = await ask([], stream=True)
    response, worlds, _ = await ask([4, 3], stream=True)

    assert told(response) == told(undisturbed)
    assert worlds[2].store.requests[0].completion_tokens == len(TEXT.encode())
    # What was sent is not computed again.
    assert [len(request.sent_ids) for world in worlds for request in world.sparse.requests] == [0, 3, 5]  # type: ignore[union-attr]


async def test_each_death_is_logged_once_with_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    """Two deaths in mid-stream, and one without a byte in between: the log tells what each cut."""
    await ask([4, 0, 3], keys=(KEY,) * 4, stream=True)

    lines = [record.getMessage() for record in caplog.records if "went away" in record.getMessage()]
    pieces = [line.split(" after ")[1] for line in lines]
    assert pieces == ["3 pieces; asking another one", "5 pieces; asking another one"]


async def test_whole_answer_is_asked_for_again() -> None:
    """An answer of which nothing was sent comes from the next ingress."""
    response, _, ingresses = await ask([0])

    assert (response.status_code, len(ingresses.asked)) == (200, 2)
    assert response.json()["choices"][0]["message"]["content"] == TEXT


async def test_journal_of_another_house_starts_nothing() -> None:
    """A ticket that was signed with another key is refused; the stream stays cut: none takes it for whole."""
    world, other = make_world(KEY), make_world(b"other")
    async with world.run() as first, other.run() as second:
        ingresses = Ingresses([api_of(first), api_of(second)], [4])
        transport = httpx.ASGITransport(app=BodyGate(AnswerKeeper(ingresses), BodyLimits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            with pytest.raises(AssertionError):  # the transport's word for an answer that never ended
                await client.post("/v1/chat/completions", json=chat(stream=True))

    assert len(ingresses.asked) == 2
    assert other.store.requests == []


async def test_journal_that_a_client_sends_is_dropped() -> None:
    """Only what stands in the proxy may ask an ingress to go on."""
    forged = Journal("e30.00").write()
    world = make_world()
    async with world.run() as client:
        direct = await client.post("/v1/chat/completions", json=chat(stream=True), headers={HEADER: forged})
        keeper = httpx.ASGITransport(app=AnswerKeeper(api_of(client)))
        async with httpx.AsyncClient(transport=keeper, base_url="http://test") as outside:
            kept = await outside.post(
                "/v1/chat/completions", json=chat(stream=True), headers={HEADER: forged}
            )

    assert (direct.status_code, direct.json()["error"]["param"]) == (400, HEADER)
    assert kept.status_code == 200


async def test_orders_are_not_given_twice() -> None:
    """An order whose answer was lost may have been taken: the operator decides whether to give it again."""
    ingresses = Ingresses([lambda *_: asyncio.sleep(0)], [])
    transport = httpx.ASGITransport(app=AnswerKeeper(ingresses, again_for_s=0.5))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(AssertionError):  # the transport's word for an answer that never began
            await client.post("/admin/v1/rollouts/r1/commands", json={"kind": "retry"})

    assert len(ingresses.asked) == 1
