"""The ingress over fakes: fallback, continuation, lease, records, audits, and every kind of bad input."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from sentei.serving.engine.attention_use import AttentionUse, LayerUse
from sentei.serving.engine.request import EngineRequest, TokenChunk
from sentei.serving.errors import EngineBusyError, EngineRefusedError, GrammarError, VariantError
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.ports import AuditLoad
from sentei.serving.settings import Limits
from sentei.serving.traces import OFF, Tracer
from tests.fakes_serving import (
    MODEL,
    FakeClock,
    FakeDesk,
    FakeStore,
    FakeTokenizer,
    FakeVariant,
    crash,
    make_table,
)

LONG = "a long enough prompt"
LIMITS = Limits(first_token_timeout_s=0.2, token_timeout_s=0.2, poll_every_s=60, max_body_bytes=2048)


@dataclass
class World:
    """An ingress with all its fakes; `sparse` None makes it dense-only."""

    dense: FakeVariant = field(default_factory=lambda: FakeVariant("dense"))
    sparse: FakeVariant | None = field(default_factory=lambda: FakeVariant("sparse"))
    store: FakeStore = field(default_factory=lambda: FakeStore(routing=(make_table(), 1)))
    desk: FakeDesk = field(default_factory=FakeDesk)
    clock: FakeClock = field(default_factory=FakeClock)
    limits: Limits = LIMITS
    user_key: bytes | None = None
    has_keeper: bool = False
    tracer: Tracer = OFF

    @asynccontextmanager
    async def run(self) -> AsyncIterator[httpx.AsyncClient]:
        """Serve over ASGI with a lease that is fresh; records are written when the block ends."""
        variants = {v.name: v for v in (self.dense, self.sparse) if v is not None}
        self.gateway = Gateway(
            variants,
            self.store,
            tokenizer=FakeTokenizer(),
            model_name=MODEL,
            limits=self.limits,
            desk=self.desk,
            clock=self.clock,
            user_key=self.user_key,
            tracer=self.tracer,
        )
        api = build_api(self.gateway, has_keeper=self.has_keeper)
        async with api.router.lifespan_context(api):
            for name in variants:
                await self.gateway.introduce_once(name)
            if self.store.routing is not None:
                await self.gateway.read_routing_once()
                await self.renew()
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    async def renew(self) -> None:
        """Let the controller renew its lease, and the ingress see it."""
        assert self.store.routing is not None
        table, renewals = self.store.routing
        self.store.routing = (table, renewals + 1)
        await self.gateway.read_routing_once()


def chat(content: str = LONG, **fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream, without its end mark."""
    lines = [line for line in response.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def text_of(response: httpx.Response) -> str:
    """The text of a streamed chat."""
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events_of(response) if e["choices"])


async def post_chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    """Send one chat."""
    return await client.post("/v1/chat/completions", json=chat(**fields))


async def test_candidate_is_answered_by_sparse() -> None:
    """A session inside the share is answered by sparse at the slice's rung, and recorded so."""
    world = World()
    async with world.run() as client:
        response = await post_chat(client)

    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "hello"
    assert response.json()["usage"] == {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
    assert response.headers["x-sentei-variant"] == "sparse"
    assert response.headers["x-sentei-rung"] == "medium"
    assert response.headers["x-request-id"] == world.store.requests[0].request_id
    record = world.store.requests[0]
    assert (record.variant_assigned, record.variant_served, record.outcome) == ("sparse", "sparse", "ok")
    assert (record.slice_id, record.rung_id, record.rollout_id, record.share) == ("long", "medium", "r1", 1.0)
    assert (record.prompt_tokens, record.completion_tokens, record.compute_s) == (20, 5, 0.25)
    assert record.ttft_ms is not None


async def test_thinned_answer_says_what_its_attention_kept() -> None:
    """Usage and record hold the same few numbers per layer; a dense answer has none."""
    use = AttentionUse(4, 2, (LayerUse(0, 1.0, 1.0), LayerUse(1, 0.125, None)))
    world = World(sparse=FakeVariant("sparse", attention=use))
    async with world.run() as client:
        whole = (await post_chat(client)).json()["usage"]
        streamed = await post_chat(client, stream=True, stream_options={"include_usage": True})
        dense = (await post_chat(client, content="short")).json()["usage"]

    found = whole["sentei_attention"]
    assert found == {
        "sparse_calls": 4,
        "dense_calls": 2,
        "prefill_density": 0.5625,
        "decode_density": 1.0,
        "layers": {"0": [1.0, 1.0], "1": [0.125, None]},
    }
    assert events_of(streamed)[-1]["usage"]["sentei_attention"] == found
    assert "sentei_attention" not in dense
    assert [json.loads(record.attention or "null") for record in world.store.requests] == [found, found, None]


@pytest.mark.parametrize(("limit_bytes", "is_kept"), [(2048, True), (0, False)])
async def test_answer_that_moved_to_dense_keeps_what_sparse_had_told(limit_bytes: int, is_kept: bool) -> None:
    """The record of the sparse part survives a fallback in the middle; a limit of 0 bytes switches it off."""
    use = AttentionUse(2, 0, (LayerUse(0, 0.25, None),))
    sparse = FakeVariant("sparse", fail_after=2, failure=crash("sparse"), attention=use)
    limits = LIMITS.model_copy(update={"attention_record_bytes": limit_bytes})
    world = World(sparse=sparse, limits=limits)
    async with world.run() as client:
        await post_chat(client, stream=True)

    (record,) = world.store.requests
    assert (record.outcome, '"0":[0.25,null]' in record.attention) == ("fallback_mid", is_kept)


async def test_short_prompt_stays_dense() -> None:
    """A pinned slice is answered by dense."""
    world = World()
    async with world.run() as client:
        response = await post_chat(client, content="short")

    assert response.headers["x-sentei-variant"] == "dense"
    assert world.store.requests[0].slice_id == "short"


async def test_stream_has_role_text_reason_usage_and_end() -> None:
    """A stream begins with the role, ends with its reason, gives usage if asked, and says it is done."""
    async with World().run() as client:
        response = await post_chat(client, stream=True, stream_options={"include_usage": True})

    events = events_of(response)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(response) == "hello"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], 5)
    assert response.text.endswith("data: [DONE]\n\n")
    assert {e["system_fingerprint"] for e in events} == {"sparse/medium"}


async def test_text_completion() -> None:
    """The older API gives the same text, and ends at max_tokens with the reason."""
    async with World().run() as client:
        body = {"model": MODEL, "prompt": LONG, "max_tokens": 3, "logprobs": 1}
        response = await client.post("/v1/completions", json=body)

    choice = response.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "length")
    assert choice["logprobs"]["tokens"] == ["h", "e", "l"]


async def test_stop_string_ends_the_answer_and_frees_the_variant() -> None:
    """A stop string is cut off, and the variant is told to stop at once."""
    world = World(sparse=FakeVariant("sparse", text="one END two"))
    async with world.run() as client:
        response = await post_chat(client, stop="END")
        assert world.sparse is not None
        closed = world.sparse.closed

    assert response.json()["choices"][0]["message"]["content"] == "one "
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert closed == 1


FAILURES = [
    (crash("sparse"), "crash"),
    (VariantError("sparse", "nan_logits"), "nan_logits"),
    (EngineBusyError("full"), "busy"),
    (None, "timeout"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_fallback_before_the_first_token(failure: Exception | None, reason: str, stream: bool) -> None:
    """Whatever fails before the first token, dense answers, the header says so, and it is counted."""
    world = World(sparse=FakeVariant("sparse", fail_after=0, failure=failure))
    async with world.run() as client:
        response = await post_chat(client, stream=stream)

    assert response.status_code == 200
    assert response.headers["x-sentei-variant"] == "dense"
    record = world.store.requests[0]
    assert (record.variant_assigned, record.variant_served) == ("sparse", "dense")
    assert record.outcome == "fallback_before"
    assert reason in record.error


async def test_empty_answer_falls_back() -> None:
    """An answer that ends before it begins is a failure of the candidate."""
    world = World(sparse=FakeVariant("sparse", text=""))
    async with world.run() as client:
        response = await post_chat(client)

    assert response.json()["choices"][0]["message"]["content"] == "hello"
    assert (world.store.requests[0].outcome, "empty" in world.store.requests[0].error) == (
        "fallback_before",
        True,
    )


@pytest.mark.parametrize("failure", [crash("sparse"), None])
async def test_stream_continues_on_dense(failure: Exception | None) -> None:
    """A stream whose variant fails in the middle goes on behind the last token that was sent."""
    world = World(sparse=FakeVariant("sparse", fail_after=2, failure=failure))
    async with world.run() as client:
        response = await post_chat(client, stream=True, seed=7, temperature=0.5)

    assert text_of(response) == "hello"
    assert [e["system_fingerprint"] for e in events_of(response)][1:3] == ["sparse/medium", "dense/dense"]
    continued = world.dense.requests[0]
    assert continued.sent_ids == tuple(FakeTokenizer().encode("he"))
    assert (continued.rung_id, continued.sampling.seed) == ("dense", 7)
    assert world.store.requests[0].outcome == "fallback_mid"
    assert world.store.requests[0].completion_tokens == 5


async def test_dense_is_tried_once_more_after_a_crash() -> None:
    """A dense replica that dies is tried again once; if that fails too, the client hears of it."""
    world = World(dense=FakeVariant("dense", fail_after=2, failure=crash("dense")))
    async with world.run() as client:
        response = await post_chat(client, content="short", stream=True)

    assert len(world.dense.requests) == 2
    assert events_of(response)[-1]["error"]["code"] == "overloaded"
    assert "[DONE]" not in response.text
    assert world.store.requests[0].outcome == "failed"


async def test_nobody_answers() -> None:
    """When both variants fail before the first token the client gets a 503 in OpenAI's shape."""
    world = World(
        dense=FakeVariant("dense", fail_after=0, failure=VariantError("dense", "nan_logits")),
        sparse=FakeVariant("sparse", fail_after=0, failure=crash("sparse")),
    )
    async with world.run() as client:
        response = await post_chat(client, stream=True)

    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert world.store.requests[0].outcome == "unanswerable"


async def test_breaker_spares_users_the_wait() -> None:
    """After three failures in a row sparse is not asked, and the skipped request still counts against it."""
    world = World(sparse=FakeVariant("sparse", fail_after=0, failure=crash("sparse")))
    async with world.run() as client:
        for _ in range(4):
            await post_chat(client)

    assert world.sparse is not None
    assert len(world.sparse.requests) == 3
    assert [r.outcome for r in world.store.requests] == ["fallback_before"] * 4
    assert "breaker_open" in world.store.requests[3].error


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (VariantError("dense", "nan_logits"), "unanswerable"),
        (VariantError("dense", "crash"), "failed"),
        (EngineBusyError("32 requests wait"), "failed"),
        (EngineRefusedError("never fits"), "refused"),
    ],
)
async def test_what_dense_cannot_answer_either_is_nobodys_failure(failure: Exception, outcome: str) -> None:
    """Sparse failed, and dense fails on the same request: only a dense that is down or full leaves blame."""
    world = World(
        dense=FakeVariant("dense", fail_after=0, failure=failure),
        sparse=FakeVariant("sparse", fail_after=0, failure=VariantError("sparse", "nan_logits")),
    )
    async with world.run() as client:
        await post_chat(client)

    assert [r.outcome for r in world.store.requests] == [outcome]


async def test_one_session_cannot_take_sparse_from_the_others() -> None:
    """Failing requests of one client, however many, open no breaker; the others keep sparse."""
    world = World(sparse=FakeVariant("sparse", fail_after=0, failure=crash("sparse")))
    async with world.run() as client:
        for _ in range(10):
            await client.post("/v1/chat/completions", json=chat(), headers={"x-session-id": "s1"})
        assert world.sparse is not None
        world.sparse.fail_after = None
        response = await client.post("/v1/chat/completions", json=chat(), headers={"x-session-id": "s2"})

    assert response.headers["x-sentei-variant"] == "sparse"


async def test_lease_runs_out_and_comes_back() -> None:
    """When the controller stops renewing, everybody gets dense; when it renews again, the table is obeyed."""
    world = World()
    async with world.run() as client:
        served = [(await post_chat(client)).headers["x-sentei-variant"]]
        world.clock.now_s += 5.1
        await world.gateway.read_routing_once()
        served.append((await post_chat(client)).headers["x-sentei-variant"])
        await world.renew()
        served.append((await post_chat(client)).headers["x-sentei-variant"])

    assert served == ["sparse", "dense", "sparse"]
    assert [r.rollout_id for r in world.store.requests] == ["r1", "", "r1"]


async def test_ingress_without_routing_table_serves_dense() -> None:
    """Before any rollout everything is dense and works."""
    world = World(store=FakeStore())
    async with world.run() as client:
        response = await post_chat(client)

    assert response.headers["x-sentei-variant"] == "dense"


async def test_dense_only_app_says_so() -> None:
    """Without an adapter the app serves dense and names the reason in /readyz."""
    world = World(sparse=None)
    async with world.run() as client:
        world.gateway.note = "no adapter"
        response = await post_chat(client)
        ready = (await client.get("/readyz")).json()

    assert response.headers["x-sentei-variant"] == "dense"
    assert (ready["ready"], ready["mode"], ready["note"]) == (True, "dense_only", "no adapter")


async def test_session_header_decides_stickiness_and_the_unit() -> None:
    """Header, body's user, API key and request, in this order, name the unit."""
    world = World()
    async with world.run() as client:
        url, body = "/v1/chat/completions", chat(user="ann")
        await client.post(url, json=body, headers={"x-session-id": "s1", "authorization": "Bearer k"})
        await client.post(url, json=body, headers={"authorization": "Bearer k"})
        await client.post(url, json=chat(), headers={"authorization": "Bearer k"})
        await client.post(url, json=chat())

    units = [record.session_id for record in world.store.requests]
    assert units[0] == "s1"
    assert re.fullmatch(r"user-[0-9a-f]{32}", units[1])
    assert units[2].startswith("key-")
    assert "k" not in units[2].removeprefix("key-")
    assert units[3] == world.store.requests[3].request_id


async def test_any_request_of_a_session_may_be_audited() -> None:
    """A drawn request sends an audit, whichever variant served it, with all that says how it was drawn."""
    world = World(store=FakeStore(routing=(make_table(share=0.0, audit_share=1.0), 1)))
    async with world.run() as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=chat(), headers={"x-session-id": "s1"})
        await client.get("/healthz")

    assert [(r.chosen_for_audit, r.audit_probability) for r in world.store.requests] == [(True, 1.0)] * 2
    job, _ = world.desk.jobs
    assert (job.rung_id, job.variant_served, job.session_id) == ("medium", "dense", "s1")
    assert (job.share, job.probability) == (0.0, 1.0)
    assert job.served_ids == tuple(FakeTokenizer().encode("hello"))
    assert job.prompt_ids == tuple(FakeTokenizer().encode(LONG))


async def test_audited_span_lies_anywhere_in_the_answer() -> None:
    """Successive tokens from a place chosen by lot are scored; what was served before them is context."""
    limits = LIMITS.model_copy(update={"audit_max_tokens": 2})
    world = World(store=FakeStore(routing=(make_table(audit_share=1.0), 1)), limits=limits)
    async with world.run() as client:
        for _ in range(60):
            await post_chat(client)
        await client.get("/healthz")

    ids = tuple(FakeTokenizer().encode("hello"))
    assert {job.served_ids for job in world.desk.jobs} == {ids[i : i + 2] for i in range(4)}
    assert all(
        (*job.earlier_ids, *job.served_ids) == ids[: len(job.earlier_ids) + 2] for job in world.desk.jobs
    )


async def test_audits_that_would_come_too_late_are_not_drawn() -> None:
    """A busy auditor lowers the rate, and records say so; nothing is written as missing."""
    store = FakeStore(routing=(make_table(audit_share=1.0), 1))
    world = World(store=store, desk=FakeDesk(busy=AuditLoad(waiting=9, jobs_per_s=0.5)))
    async with world.run() as client:
        await asyncio.sleep(0.05)
        for _ in range(3):
            await post_chat(client)

    assert [(r.chosen_for_audit, r.audit_probability) for r in store.requests] == [(False, 0.0)] * 3
    assert store.audits == []


async def test_session_arrives_when_it_is_assigned() -> None:
    """A session counts for the sample ratio before its answer ends, once, as it was assigned."""
    world = World(store=FakeStore(routing=(make_table(share=0.0), 1)))
    async with world.run() as client:
        questions = await world.gateway.check(_parsed(), {"x-session-id": "s1"})
        ((_, deltas),) = world.gateway.begin(questions)
        await anext(deltas)
        while not world.store.arrivals:
            await asyncio.sleep(0.01)
        at_assignment = len(world.store.requests)
        await deltas.aclose()
        await client.post("/v1/chat/completions", json=chat(), headers={"x-session-id": "s1"})

    (arrival,) = world.store.arrivals
    assert at_assignment == 0
    assert (arrival.session_id, arrival.slice_id, arrival.share) == ("s1", "long", 0.0)
    assert (arrival.rollout_id, arrival.variant_assigned) == ("r1", "dense")


async def test_other_artifact_than_the_proven_one_gets_nobody() -> None:
    """A sparse replica that runs something else than the table is bound to is not asked."""
    store = FakeStore(routing=(make_table(artifact="proven"), 1))
    world = World(sparse=FakeVariant("sparse", artifact="proven"), store=store)
    async with world.run() as client:
        served = [(await post_chat(client)).headers["x-sentei-variant"]]
        assert world.sparse is not None
        world.sparse.artifact = "swapped"
        await world.gateway.introduce_once("sparse")
        served.append((await post_chat(client)).headers["x-sentei-variant"])
        ready = (await client.get("/readyz")).json()

    assert served == ["sparse", "dense"]
    assert [r.rollout_id for r in store.requests] == ["r1", ""]
    assert [r.artifact for r in world.sparse.requests] == ["proven"]
    assert ready["artifact"] == {"runs": "swapped", "bound": "proven"}
    assert store.values["artifact.sparse"] == "swapped"


@pytest.mark.parametrize("failure", [EngineBusyError("full"), EngineRefusedError("never fits")])
@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_audit_of_a_request_that_was_turned_away_is_none(failure: Exception, share: float) -> None:
    """Who got a 429 or a refusal got no answer to judge: nothing is missing, and nothing waits."""
    variants = {name: FakeVariant(name, fail_after=0, failure=failure) for name in ("dense", "sparse")}
    world = World(**variants, store=FakeStore(routing=(make_table(share=share, audit_share=1.0), 1)))
    if share and isinstance(failure, EngineRefusedError):
        world.sparse = FakeVariant("sparse", fail_after=0, failure=EngineBusyError("full"))
    async with world.run() as client:
        response = await post_chat(client)

    assert response.status_code in (400, 429)
    assert [(r.chosen_for_audit, r.audit_probability) for r in world.store.requests] == [(False, 1.0)]
    assert world.store.audits == []


async def test_audit_is_missing_where_sparse_failed_and_dense_had_no_room() -> None:
    """A 429 does not wipe away that sparse had its try: its answer is missing, the worst case for safety."""
    world = World(
        dense=FakeVariant("dense", fail_after=0, failure=EngineBusyError("full")),
        sparse=FakeVariant("sparse", fail_after=0, failure=crash("sparse")),
        store=FakeStore(routing=(make_table(audit_share=1.0), 1)),
    )
    async with world.run() as client:
        await post_chat(client)

    assert [(score.status, score.reason) for score in world.store.audits] == [("missing", "no_tokens")]


async def test_audit_that_nobody_takes_is_missing() -> None:
    """A refused audit is written as missing, so that silence cannot pass for safety."""
    store = FakeStore(routing=(make_table(audit_share=1.0), 1))
    world = World(store=store, desk=FakeDesk(is_open=False))
    async with world.run() as client:
        await post_chat(client)
        await client.get("/healthz")

    (score,) = world.store.audits
    assert (score.status, score.rung_id, score.reason) == ("missing", "medium", "queue_full")


def bad(path: str, body: dict[str, Any], status: int, code: str, words: str, *, param: str | None) -> Any:
    """One case of bad input."""
    return pytest.param(path, body, status, code, words, param, id=f"{code}-{param}")


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words", "param"),
    [
        bad(CHAT, chat(max_tokens=-1), 400, "integer_below_min_value", "-1", param="max_tokens"),
        bad(CHAT, {"model": MODEL, "messages": []}, 400, "empty_array", "[]", param="messages"),
        bad(CHAT, {**chat(), "model": "gpt-9"}, 404, "model_not_found", "'gpt-9'", param="model"),
        bad(CHAT, chat("x" * 64), 400, "context_length_exceeded", "64 tokens", param="messages"),
        bad(CHAT, chat(max_tokens=60), 400, "context_length_exceeded", "max_tokens is 60", param="messages"),
        bad(CHAT, chat(""), 400, "empty_string", "no tokens", param="messages"),
        bad(CHAT, chat(stop=[""]), 400, "invalid_value", "''", param="stop.0"),
        bad(CHAT, chat("x" * 4000), 413, "request_too_large", "2048 bytes", param=None),
        bad(TEXT, {"model": MODEL, "prompt": [300]}, 400, "invalid_value", "300", param="prompt"),
        bad(TEXT, {"model": MODEL, "prompt": "x" * 65}, 400, "context_length_exceeded", "65", param="prompt"),
        bad("/v1/nothing", {}, 404, "not_found", "/v1/nothing", param=None),
    ],
)
async def test_bad_input(
    path: str, body: dict[str, Any], status: int, code: str, words: str, param: str | None
) -> None:
    """Bad input gets an OpenAI-shaped error that names value and way out, and reaches no variant."""
    world = World()
    async with world.run() as client:
        response = await client.post(path, json=body)

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert words in error["message"]
    assert not world.dense.requests
    assert world.store.requests == []


async def test_session_id_that_is_too_long() -> None:
    """A session id of a kilobyte is refused."""
    async with World().run() as client:
        response = await client.post(CHAT, json=chat(), headers={"x-session-id": "x" * 1000})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-session-id")


@pytest.mark.parametrize("session", [b"\xff\xfe", b"a\tb"])
async def test_session_id_of_other_bytes_is_refused(session: bytes) -> None:
    """A session id that is no plain text is a 400, not a surprise further on."""
    async with World().run() as client:
        response = await client.post(CHAT, json=chat(), headers=[(b"x-session-id", session)])

    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-session-id")


async def test_request_that_nobody_could_answer_does_not_count_against_a_variant() -> None:
    """A schema that cannot be followed is the caller's fault: 400, no try on dense, no failure recorded."""
    sparse = FakeVariant("sparse", fail_after=1, failure=GrammarError("response_format cannot be followed"))
    world = World(sparse=sparse)
    async with world.run() as client:
        response = await post_chat(client)

    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert not world.dense.requests
    assert world.store.requests[0].outcome == "refused"


async def test_several_answers_are_requests_of_one_unit() -> None:
    """Each answer has a record and a seed of its own; the unit is one, and one answer is audited."""
    world = World(store=FakeStore(routing=(make_table(audit_share=1.0), 1)))
    async with world.run() as client:
        response = await client.post(CHAT, json=chat(n=3, seed=7), headers={"x-session-id": "s1"})

    assert world.sparse is not None
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in world.sparse.requests) == [7, 8, 9]
    assert {record.session_id for record in world.store.requests} == {"s1"}
    assert len({record.request_id for record in world.store.requests}) == 3
    assert [record.chosen_for_audit for record in world.store.requests].count(True) == 1


async def test_one_failed_answer_ends_its_siblings() -> None:
    """When one of several answers cannot be given the request fails, and nothing goes on running for it."""
    world = World(dense=FakeVariant("dense", fail_after=2, failure=VariantError("dense", "error")))
    async with world.run() as client:
        response = await post_chat(client, content="short", n=4)

    assert response.status_code == 503
    assert world.dense.closed == len(world.dense.requests) == 4


async def test_too_many_requests_at_once() -> None:
    """Beyond the limit a request gets a 429 with a time to come back."""
    world = World(limits=LIMITS.model_copy(update={"max_concurrent": 1}))
    async with world.run() as client:
        questions = await world.gateway.check(_parsed(), {})
        ((_, deltas),) = world.gateway.begin(questions)
        await anext(deltas)
        response = await post_chat(client)
        await deltas.aclose()

    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert world.store.requests[0].outcome == "cancelled"


def _parsed() -> Any:
    from sentei.serving.openai.requests import ChatRequest

    return ChatRequest.model_validate(chat())


async def test_busy_dense_is_told_as_429() -> None:
    """When dense itself is full there is nobody to fall back to, and the client is told when to come back."""
    world = World(dense=FakeVariant("dense", fail_after=0, failure=EngineBusyError("32 requests wait")))
    async with world.run() as client:
        response = await post_chat(client, content="short")

    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")


async def test_loading_model_is_a_503() -> None:
    """Before the dense variant has said who it is, requests get a 503 and /readyz says no."""
    world = World()
    async with world.run() as client:
        world.gateway.cards.clear()
        response, ready = await post_chat(client), await client.get("/readyz")

    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    assert ready.status_code == 503


async def test_unexpected_error_is_a_500_and_recorded() -> None:
    """A surprise inside us is logged and told without its details."""
    world = World(dense=FakeVariant("dense", fail_after=0, failure=ZeroDivisionError("secret detail")))
    async with world.run() as client:
        response = await post_chat(client, content="short")

    assert response.status_code == 500
    assert "secret" not in response.text
    assert world.store.requests[0].outcome == "failed"


async def test_models_are_listed() -> None:
    """Users see one logical model, whichever variant answers."""
    async with World().run() as client:
        listed = (await client.get("/v1/models")).json()
        one, none = await client.get(f"/v1/models/{MODEL}"), await client.get("/v1/models/other")

    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (one.status_code, none.json()["error"]["code"]) == (200, "model_not_found")


class Mortal(FakeVariant):
    """A variant whose replicas die one after the other: each says three tokens more than the one before."""

    deaths = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        self.fail_after = len(request.sent_ids) + 3 if len(self.requests) < self.deaths else None
        async for chunk in super().generate(request):
            yield chunk


@pytest.mark.parametrize(("deaths", "status"), [(2, 200), (3, 503)])
async def test_replicas_of_dense_may_die_one_after_the_other(deaths: int, status: int) -> None:
    """Sparse dies, then the dense replica that went on, then the next: four tries in all."""
    dense = Mortal("dense", "a long answer it is", failure=crash("dense"))
    dense.deaths = deaths
    world = World(dense, FakeVariant("sparse", "a long answer it is", fail_after=2, failure=crash("sparse")))
    async with world.run() as client:
        response = await post_chat(client)

    assert response.status_code == status
    assert [len(request.sent_ids) for request in dense.requests][:3] == [2, 5, 8]
    if status == 200:
        assert response.json()["choices"][0]["message"]["content"] == "a long answer it is"
