"""Ingresses that go away in the middle of an answer: the next one goes on where it ended."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sentei.serving import proxy
from sentei.serving.errors import RequestError
from sentei.serving.front import keeper as keeper_module
from sentei.serving.front.bodies import BodyGate
from sentei.serving.front.journal import HEADER, MARK, NEW, Journal, Ticket
from sentei.serving.front.keeper import AnswerKeeper
from sentei.serving.settings import BodyLimits
from tests.fakes_serving import FakeStore, FakeVariant, make_table
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
            if left == 0:  # it is dead: it says no more, and does no more
                is_cut.set()
                await asyncio.Event().wait()
            left = None if left is None else left - 1
            await send(message)

        async def receive_alive() -> Message:
            message = await receive()
            if is_cut.is_set():
                await asyncio.Event().wait()
            return message

        task = asyncio.create_task(api(scope, receive_alive, send_some))
        self._tasks.append(task)
        cut = asyncio.create_task(is_cut.wait())
        await asyncio.wait({task, cut}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()

    async def bury(self) -> None:
        """End the tasks of the dead: with them what they would have done in tidying up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def make_world(key: bytes = KEY) -> World:
    """One of several ingresses over variants that say the same; every answer is drawn for an audit."""
    store = FakeStore(routing=(make_table(audit_share=1.0), 1))
    return World(
        FakeVariant("dense", TEXT), FakeVariant("sparse", TEXT), store, user_key=key, has_keeper=True
    )


async def hear(app: ASGIApp, body: dict[str, Any] | None = None, path: str = "") -> list[Message]:
    """Ask over plain ASGI, and return all that a client would be sent, ended or not."""
    waiting = [{"type": "http.request", "body": json.dumps(body or chat(stream=True)).encode()}]
    heard: list[Message] = []

    async def receive() -> Message:
        return waiting.pop() if waiting else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        heard.append(message)

    path = path or "/v1/chat/completions"
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"x-session-id", b"ann")],
        "client": ("10.0.0.1", 1),
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
    return heard


async def ask(
    cuts: list[int],
    *,
    keys: tuple[bytes, ...] = (KEY, KEY, KEY),
    path: str = "/v1/chat/completions",
    prepare: Callable[[list[World]], None] = lambda _: None,
    **body: Any,
) -> tuple[httpx.Response, list[World], Ingresses]:
    """Ask ingresses that die one after the other, through what stands in Ray's proxy.

    `prepare` may change the ingresses once all are up. What the worlds hold afterwards is what stood there
    when the answer had come.
    """
    worlds = [make_world(key) for key in keys]
    async with AsyncExitStack() as stack:
        apis = [api_of(await stack.enter_async_context(world.run())) for world in worlds]
        prepare(worlds)
        ingresses = Ingresses(list(apis), cuts)
        keeper = BodyGate(AnswerKeeper(ingresses), BodyLimits())
        transport = httpx.ASGITransport(app=keeper)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post(path, json=chat(**body), headers={"x-session-id": "ann"})
        await asyncio.sleep(0.01)  # the audit of the last ingress is handed in by a task of its own
        jobs = [list(world.desk.jobs) for world in worlds]
        await ingresses.bury()
    for world, of_world in zip(worlds, jobs, strict=True):
        world.desk.jobs = of_world
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
    jobs = [job for world in worlds for job in world.desk.jobs]
    assert [(job.served_ids, job.request_id) for job in jobs] == [
        (tuple(byte + 1 for byte in TEXT.encode()), worlds[2].store.requests[0].request_id)
    ]
    # What was sent is not computed again.
    assert [len(request.sent_ids) for world in worlds for request in world.sparse.requests] == [0, 3, 5]  # type: ignore[union-attr]


async def test_each_death_is_logged_once_with_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    """Two deaths in mid-stream, and one without a byte in between: the log tells what each cut."""
    await ask([4, 0, 3], keys=(KEY,) * 4, stream=True)

    lines = [record.getMessage() for record in caplog.records if "went away" in record.getMessage()]
    pieces = [line.split(" after ")[1] for line in lines]
    assert pieces == ["3 pieces; asking another one", "5 pieces; asking another one"]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_ingress_that_knows_no_model_yet_is_passed_over(is_stream: bool) -> None:
    """It came up while dense was down; the other one knows the model, and its request waits for dense."""
    response, worlds, ingresses = await ask(
        [], stream=is_stream, prepare=lambda worlds: worlds[0].gateway.cards.clear()
    )

    assert (response.status_code, len(ingresses.asked)) == (200, 2)
    assert [len(world.store.requests) for world in worlds] == [0, 1, 0]


async def test_where_no_ingress_knows_a_model_the_client_hears_their_words() -> None:
    """While the app starts: a 503 that says when to come back, once, after the time for asking again."""
    world = make_world()
    async with world.run() as client:
        world.gateway.cards.clear()
        ingresses = Ingresses([api_of(client)], [])
        heard = await hear(AnswerKeeper(ingresses, again_for_s=0.5))

    assert len(ingresses.asked) > 1
    assert [message["status"] for message in heard[:1]] == [503]
    assert json.loads(heard[1]["body"])["error"]["code"] == "loading"
    assert len(heard) == 2


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
        heard = await hear(AnswerKeeper(ingresses))
        await ingresses.bury()

    assert len(ingresses.asked) == 2
    assert [message.get("status") for message in heard] == [200, None, None, None]
    assert all(message["more_body"] for message in heard[1:]), "cut, not ended"
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
    heard = await hear(
        AnswerKeeper(ingresses, again_for_s=0.5), {"kind": "retry"}, "/admin/v1/rollouts/r1/commands"
    )

    assert (len(ingresses.asked), heard) == (1, [])


async def test_start_without_a_piece_is_never_an_empty_answer() -> None:
    """An ingress said 200 and died, and no other is there in time: an error, not an answer of no words."""
    world = make_world()
    async with world.run() as client:
        ingresses = Ingresses([api_of(client)], [1] + [0] * 20)
        heard = await hear(AnswerKeeper(ingresses, again_for_s=0.2))
        await ingresses.bury()

    assert [message.get("status") for message in heard] == [503, None]
    assert json.loads(heard[1]["body"])["error"]["code"] == "unavailable"
    assert len(ingresses.asked) == 2


@pytest.mark.parametrize(("cuts", "num_asked"), [([0] * 20, 4), ([3] + [0] * 20, 5)], ids=["new", "begun"])
async def test_request_that_ingresses_die_of_is_not_tried_on_and_on(cuts: list[int], num_asked: int) -> None:
    """Four tries in a row that gain nothing are the last, however much time is left."""
    world = make_world()
    async with world.run() as client:
        ingresses = Ingresses([api_of(client)], cuts)
        heard = await hear(AnswerKeeper(ingresses))
        await ingresses.bury()

    assert len(ingresses.asked) == num_asked
    if cuts[0] == 0:
        assert heard[0]["status"] == 503
    else:
        assert [message.get("more_body") for message in heard] == [None, True, True], "cut, not ended"


class NoIngress:
    """What Serve says while it has no ingress, `num_times` times; then an ingress answers."""

    def __init__(self, api: ASGIApp, num_times: int) -> None:
        self._api, self.left = api, num_times

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.left:
            await self._api(scope, receive, send)
            return
        self.left -= 1
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"7")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"no app."})


async def test_what_serve_says_for_want_of_an_ingress_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it was asked; and as nobody died of the request, only time bounds the tries."""
    monkeypatch.setattr(keeper_module, "AGAIN_AFTER_S", (0.01, 0.02))
    world = make_world()
    async with world.run() as client:
        without = await hear(AnswerKeeper(NoIngress(api_of(client), 10_000), again_for_s=0.1))
        waited = await hear(AnswerKeeper(NoIngress(api_of(client), 8)))

    assert without[0]["status"] == 503
    assert [message["body"] for message in without[1:]] == [b"no app."]
    assert waited[0]["status"] == 200


def stop_rollout(worlds: list[World]) -> None:
    """The second ingress was told of an abort."""
    worlds[1].gateway.lease.stop("r1")


def end_lease(worlds: list[World]) -> None:
    """The second ingress has heard nothing of the controller for long."""
    worlds[1].clock.now_s += 60


def lower_rung(worlds: list[World]) -> None:
    """The second ingress has read that sparse answers at another rung now."""
    gateway = worlds[1].gateway
    gateway.lease.observe(make_table(rung_id="mild", version=2), 9, worlds[1].clock.now_s)


@pytest.mark.parametrize("prepare", [stop_rollout, end_lease, lower_rung])
async def test_stopped_rollout_does_not_go_on_with_a_stream(prepare: Callable[[list[World]], None]) -> None:
    """What sparse began ends on dense where a new request would not be given to sparse at that rung."""
    undisturbed, _, _ = await ask([], stream=True)
    response, worlds, _ = await ask([4], stream=True, prepare=prepare)

    assert response.text.count("[DONE]") == 1
    text = [events[0]["delta"].get("content", "") for events, _ in told(response)]
    assert text == [events[0]["delta"].get("content", "") for events, _ in told(undisturbed)]
    assert worlds[1].sparse is not None
    assert ([len(r.sent_ids) for r in worlds[1].dense.requests], worlds[1].sparse.requests) == ([3], [])
    record = worlds[1].store.requests[0]
    assert (record.variant_assigned, record.variant_served, record.outcome) == ("sparse", "dense", "ok")


async def test_model_time_of_an_answer_is_that_of_all_its_ingresses() -> None:
    """What the dead ingress spent is in the record that the last one writes: cost and gain are read there."""
    _, whole, _ = await ask([], stream=True)
    _, worlds, _ = await ask([4, 3], stream=True)

    assert [record.compute_s for record in whole[0].store.requests] == [0.25]
    assert [record.compute_s for record in worlds[2].store.requests] == [0.75]  # each of three took 0.25


async def test_ticket_goes_on_with_its_own_request_alone() -> None:
    """A ticket that was made for one body starts nothing with another."""
    world = make_world()
    async with world.run() as client:
        first = await client.post("/v1/chat/completions", json=chat(stream=True), headers={HEADER: NEW})
        journal = Journal("")
        for line in first.content.split(b"\n"):
            if line.startswith(MARK):
                journal.take(line.removeprefix(MARK))
        again = {HEADER: Journal(journal.ticket).write()}
        other = await client.post(
            "/v1/chat/completions", json=chat("another one", stream=True), headers=again
        )
        same = await client.post("/v1/chat/completions", json=chat(stream=True), headers=again)

    assert (other.status_code, other.json()["error"]["param"]) == (400, HEADER)
    assert same.status_code == 200


def test_ticket_without_a_body_is_none() -> None:
    """One that an older version made names no body, and is of no request."""
    ticket = Ticket("r", "ann", 1, {}).sign(KEY)

    with pytest.raises(RequestError, match="another body"):
        Ticket.check(ticket, KEY, hashlib.sha256(b"{}").hexdigest())


async def test_bad_ticket_costs_no_tokenising() -> None:
    """It is looked at before the prompt is."""
    world = make_world()
    async with world.run() as client:
        before = world.gateway.tokenizer.num_encoded  # type: ignore[attr-defined]
        refused = await client.post(
            "/v1/chat/completions", json=chat(stream=True), headers={HEADER: Journal("e30.00").write()}
        )

    assert refused.status_code == 400
    assert world.gateway.tokenizer.num_encoded == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [NEW, Journal("e30.00").write()], ids=["new", "forged"])
async def test_ingress_without_a_keeper_knows_no_journal(value: str) -> None:
    """Where nothing in Ray's proxy takes the header away, a client's is as if it were not there."""
    world = make_world()
    world.has_keeper = False
    async with world.run() as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True), headers={HEADER: value})

    assert response.status_code == 200
    assert MARK not in response.content


@pytest.mark.parametrize(
    ("value", "is_configured"), [(proxy.CALLBACK, True), ("their.own:middlewares", False), (None, False)]
)
def test_keeper_is_there_where_the_callback_is_ours(
    monkeypatch: pytest.MonkeyPatch, value: str | None, is_configured: bool
) -> None:
    """The variable that Serve reads in its proxy is what an ingress goes by."""
    monkeypatch.delenv(proxy.CALLBACK_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(proxy.CALLBACK_VARIABLE, value)

    assert proxy.is_configured() is is_configured
    assert f"{proxy.__name__}:{proxy.middlewares.__name__}" == proxy.CALLBACK


async def test_audit_of_another_ingress_is_not_given_back_here() -> None:
    """The budget of an ingress counts what it took: a resumed question that fails was taken elsewhere."""

    def fill(worlds: list[World]) -> None:
        for world in worlds:
            world.gateway._budget._left = 3.0
            world.gateway._desk = None  # every audit comes to nothing

    _, worlds, _ = await ask([4], stream=True, prepare=fill)
    _, alone, _ = await ask([], stream=True, prepare=fill)

    assert worlds[1].gateway._budget._left == 3.0
    assert alone[0].gateway._budget._left == 3.0, "taken and given back"
