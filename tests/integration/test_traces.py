"""Traces: what an ingress tells of a request, and the whole way through real processes to a collector."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.rollout.client import AdminClient
from sentei.serving.traces import NAMES, SPANS, _OtelTracer
from tests.fakes_serving import FakeStore, FakeVariant, crash, make_table
from tests.http_receiver import Received, Receiver, reply
from tests.integration.test_ingress import World, chat, post_chat
from tests.integration.test_serving_ray import POLICY, PROMPT, TOKEN, save_tiny_model, session, store_url
from tests.machine import wait_for
from tests.otlp_receiver import SentSpan, read_spans

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
NUM_SPANS = 17  # ten of the request, seven of its audit
USER, KEY = "alice@example.org", "sk-nobody-may-see-this"

pytestmark = pytest.mark.timeout(600)  # the app starts once: minutes where other work runs beside it


@pytest.fixture
def kept() -> InMemorySpanExporter:
    """Where spans come to."""
    return InMemorySpanExporter()


@pytest.fixture
def world(kept: InMemorySpanExporter) -> World:
    """An ingress over fakes that traces."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    store = FakeStore(routing=(make_table(audit_share=1.0), 1))
    return World(tracer=_OtelTracer(provider), store=store)


def by_name(kept: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """The spans that have ended."""
    found: dict[str, list[ReadableSpan]] = {}
    for span in kept.get_finished_spans():
        found.setdefault(span.name.removeprefix("sentei."), []).append(span)
    return found


def parent_of(span: ReadableSpan) -> int:
    """The id of a span's parent."""
    assert span.parent is not None
    return span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    """A span's own id."""
    assert span.context is not None
    return span.context.span_id


async def test_a_request_is_told_from_its_head_to_its_last_byte(
    world: World, kept: InMemorySpanExporter
) -> None:
    """Admission, decision, answer and try lie below the request, which lies below the client's span."""
    async with world.run() as client:
        headers = {"traceparent": TRACEPARENT, "tracestate": "who=alice"}
        await client.post("/v1/chat/completions", json=chat(), headers=headers)

    found = by_name(kept)
    (request,), (answer,), (asked,) = found["request"], found["answer"], found["try"]
    assert sorted(found) == ["admit", "answer", "queue", "request", "route", "try"]
    assert f"{parent_of(request):016x}" == PARENT
    assert [parent_of(found[name][0]) for name in ("admit", "route", "answer")] == [id_of(request)] * 3
    assert [parent_of(found[name][0]) for name in ("queue", "try")] == [id_of(answer)] * 2
    assert {f"{span.context.trace_id:032x}" for span in kept.get_finished_spans() if span.context} == {TRACE}
    assert dict(answer.attributes or {}) == {
        "sentei.request_id": world.store.requests[0].request_id,
        "sentei.variant": "sparse",
        "sentei.variant_served": "sparse",
        "sentei.slice": "long",
        "sentei.rung": "medium",
        "sentei.outcome": "ok",
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 5,
        "sentei.compute_s": 0.25,
        "sentei.is_audited": True,
        "sentei.is_resumed": False,
    }
    assert dict(found["route"][0].attributes or {})["sentei.reason"] == "candidate"
    assert dict(request.attributes or {}) == {
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert world.sparse is not None
    assert world.sparse.requests[0].traceparent == f"00-{TRACE}-{id_of(asked):016x}-01"
    assert world.desk.jobs[0].traceparent == f"00-{TRACE}-{id_of(answer):016x}-01"
    assert all(span.context is None or not span.context.trace_state for span in kept.get_finished_spans())


async def test_a_fallback_is_a_second_try(world: World, kept: InMemorySpanExporter) -> None:
    """The failed try says why, the answer how it ended; each of several answers has a span of its own."""
    world.sparse = FakeVariant("sparse", fail_after=2, failure=crash("sparse"))
    async with world.run() as client:
        await post_chat(client, n=2)

    found = by_name(kept)
    tries = [(dict(span.attributes or {}), span.status.is_ok) for span in found["try"]]
    assert len(found["answer"]) == 2
    assert [said.get("sentei.variant") for said, _ in tries].count("dense") == 2
    assert [
        (said["error.type"], said["sentei.reason"], is_ok) for said, is_ok in tries if "error.type" in said
    ] == [("VariantError", "crash", False)] * 2
    assert {dict(span.attributes or {})["sentei.outcome"] for span in found["answer"]} == {"fallback_mid"}


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ({"model": "other", "prompt": "x"}, 404, ["request"]),
        ({"model": "tiny", "prompt": ""}, 400, ["request"]),
    ],
)
async def test_a_refusal_is_told_by_its_status(
    world: World, kept: InMemorySpanExporter, body: dict[str, Any], status: int, names: list[str]
) -> None:
    """What is refused has a request's span alone, without a word of what was sent."""
    async with world.run() as client:
        await client.post("/v1/completions", json=body)
        await client.get("/v1/models")
        await client.options("/v1/completions")

    (span,) = kept.get_finished_spans()
    assert [span.name.removeprefix("sentei.")] == names
    assert dict(span.attributes or {}) == {
        "http.route": "/v1/completions",
        "http.response.status_code": status,
    }


async def test_an_answer_that_another_ingress_goes_on_with_is_linked(
    world: World, kept: InMemorySpanExporter
) -> None:
    """The ticket carries the context of the first part; without a client's context the traces are two."""
    world.user_key, world.has_keeper = b"k" * 32, True
    body = chat(stream=True)
    async with world.run() as client:
        first = await client.post("/v1/chat/completions", json=body, headers={"x-sentei-journal": "new"})
        line = next(line for line in first.text.splitlines() if line.startswith(": sentei "))
        ticket = line.partition('"ticket":"')[2].partition('"')[0]
        journal = f'{{"t":"{ticket}","c":{{}},"u":false}}'
        await client.post("/v1/chat/completions", json=body, headers={"x-sentei-journal": journal})

    begun, resumed = by_name(kept)["request"]
    assert begun.context is not None
    assert resumed.context is not None
    assert begun.context.trace_id != resumed.context.trace_id
    assert [link.context.trace_id for link in resumed.links] == [begun.context.trace_id]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A collector."""
    with Receiver().listening() as listening:
        yield listening


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the app keeps what it has."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(folder: Path, receiver: Receiver) -> Iterator[LocalServer]:
    """The app in processes of its own, which all inherit where the collector is."""
    save_tiny_model(folder / "tiny", folder / "adapter")
    config = {
        "model": str(folder / "tiny"),
        "adapter": str(folder / "adapter"),
        "store_url": store_url(folder),
        "mlflow_uri": "off",
        "tick_every_s": 0.5,
    }
    environment = {
        "SENTEI_HOME": str(folder / "home"),
        "SENTEI_ADMIN_TOKEN": TOKEN,
        "RAY_AUTH_MODE": "disabled",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with LocalServer(config, folder / "server", environment=environment) as running:
        process = running._process
        yield running
    assert process is not None
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(scope="module")
def rollout(server: LocalServer) -> str:
    """A rollout that gives half of the sessions to sparse and audits every answer."""
    operator = AdminClient(server.url, TOKEN)
    rollout_id = str(operator.start_rollout(POLICY)["rollout_id"])
    wait_for(lambda: ask(server, "00-" + "1" * 32 + f"-{PARENT}-00") == "sparse", "sparse answers its share")
    operator.close()
    return rollout_id


def ask(server: LocalServer, traceparent: str) -> str:
    """Send a request of a session that sparse gets; who answered."""
    headers = {
        "x-session-id": session(candidate=True),
        "traceparent": traceparent,
        "tracestate": "vendor=opaque",
        "authorization": f"Bearer {KEY}",
    }
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "user": USER}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-sentei-variant"])


def test_one_request_through_all_processes(server: LocalServer, rollout: str, receiver: Receiver) -> None:
    """One trace, below the client's span: ingress, sparse engine, auditor and its replays on both engines."""
    ask(server, TRACEPARENT)
    wait_for(lambda: any(s.name == "sentei.audit" for s in read_spans(receiver, TRACE)), "the audit is told")
    wait_for(lambda: len(read_spans(receiver, TRACE)) == NUM_SPANS, "all its spans have come")

    spans = read_spans(receiver, TRACE)
    ids = {span.span_id for span in spans}
    engines = [(span.part, span.said["sentei.variant"]) for span in named(spans, "engine")]
    (audit,), (answer,), (request,) = (named(spans, name) for name in ("audit", "answer", "request"))
    assert {span.name for span in spans} == set(SPANS)
    assert len(ids) == len(spans) == NUM_SPANS
    assert [span.name for span in spans if span.parent_id not in ids] == ["sentei.request"]
    assert request.parent_id == PARENT
    assert audit.parent_id == answer.span_id
    assert sorted(engines) == [
        ("dense", "dense"),
        ("dense", "dense"),
        ("sparse", "sparse"),
        ("sparse", "sparse"),
    ]
    assert sorted(span.said["sentei.replay"] for span in named(spans, "replay")) == [
        "again",
        "dense",
        "sparse",
    ]
    assert all(span.is_ok and span.start_ns <= span.end_ns for span in spans)
    assert audit.said["sentei.audit_status"] == "scored"
    assert {span.part for span in spans} == {"ingress", "dense", "sparse", "auditor"}
    assert answer.said["gen_ai.usage.output_tokens"] == 4
    assert audit.said["sentei.rollout_id"] == rollout


def named(spans: list[SentSpan], name: str) -> list[SentSpan]:
    """The spans of a name."""
    return [span for span in spans if span.name == f"sentei.{name}"]


def test_nothing_of_what_was_asked_is_told(server: LocalServer, rollout: str, receiver: Receiver) -> None:
    """Each byte that reached the collector: no prompt, user, key or caller's text, and known names only."""
    bodies = b"".join(received.body for received in receiver.received)
    names = {name for span in read_spans(receiver) for name in span.said}

    assert names <= set(NAMES.values())
    for secret in (PROMPT[:12], USER, KEY, "vendor=opaque", "session_id", "x-session-id"):
        assert secret.encode() not in bodies, secret


def test_a_client_that_says_no_is_not_traced(server: LocalServer, rollout: str, receiver: Receiver) -> None:
    """The fixture's requests had the flag 00: no process told of them."""
    assert read_spans(receiver, "1" * 32) == []


def test_a_collector_that_hangs_delays_no_request(
    server: LocalServer, rollout: str, receiver: Receiver
) -> None:
    """While it takes batches and never answers, requests are answered; freed, it gets spans again."""
    with Hanging(receiver) as (has_come, free):
        ask(server, "00-" + "2" * 32 + f"-{PARENT}-01")
        wait_for(has_come, "a batch hangs")
        for _ in range(20):
            ask(server, "00-" + "3" * 32 + f"-{PARENT}-01")
        assert not free.is_set()
    ask(server, "00-" + "4" * 32 + f"-{PARENT}-01")

    wait_for(lambda: bool(named(read_spans(receiver, "4" * 32), "request")), "spans come again")


class Hanging:
    """A receiver that takes what is sent and does not answer, until the end of the block."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._free, self._num_before = threading.Event(), len(receiver.received)

    def __enter__(self) -> tuple[Callable[[], bool], threading.Event]:
        def hang(handler: BaseHTTPRequestHandler, received: Received) -> None:
            self._free.wait(60)
            reply(200)(handler, received)

        self._receiver.reply = hang
        return lambda: len(self._receiver.received) > self._num_before, self._free

    def __exit__(self, *_: object) -> None:
        self._receiver.reply = reply(200)
        self._free.set()
