"""Spans: what they may say, whose context they go on with, and nothing at all when they are off."""

from __future__ import annotations

import logging
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sentei.serving.engine.request import EngineRequest, FinishReason, TokenChunk
from sentei.serving.errors import VariantError
from sentei.serving.replica.watch import watch_generation
from sentei.serving.traces import (
    ENDPOINTS,
    ENGINE,
    MAX_CHARS,
    NAMES,
    NO_SPAN,
    OFF,
    PREFILL,
    REQUEST,
    SPANS,
    TRY,
    _ids,
    _OtelTracer,
    read_tracer,
)

ROOT = Path(__file__).resolve().parents[2]
ENDPOINT = {ENDPOINTS[1]: "http://127.0.0.1:9"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def kept() -> InMemorySpanExporter:
    """Where spans come to."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer(kept: InMemorySpanExporter) -> _OtelTracer:
    """A tracer that keeps its spans here."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return _OtelTracer(provider)


def said(kept: InMemorySpanExporter) -> list[tuple[str, dict[str, Any]]]:
    """Names and attributes of the spans that have ended."""
    return [(span.name, dict(span.attributes or {})) for span in kept.get_finished_spans()]


def test_without_an_endpoint_nothing_is_imported() -> None:
    """A process that nobody wants traces of has no part of OpenTelemetry in it, and spans that do nothing."""
    code = (
        "import sys; from sentei.serving.traces import *; tracer = read_tracer('ingress', {});"
        "span = tracer.begin(REQUEST, '00-' + 'a' * 32 + '-' + 'b' * 16 + '-01');"
        "span.child(TRY).end(); span.say(no_such_name=1); tracer.stop();"
        "print(tracer is OFF, repr(span.traceparent), [m for m in sys.modules if 'opentelemetry' in m])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True", "''", "[]"]


@pytest.mark.parametrize(
    ("environ", "warning"),
    [
        ({}, ""),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, ""),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
    ],
)
def test_the_standard_variables_turn_it_off(
    environ: dict[str, str], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No endpoint, or one of the standard ways to say no; what cannot be spoken is said in the log."""
    with caplog.at_level(logging.WARNING):
        assert read_tracer("ingress", environ) is OFF

    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


def test_without_the_extra_it_is_said_which(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An endpoint without the packages stops nobody: the log names the extra."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with caplog.at_level(logging.WARNING):
        assert read_tracer("ingress", ENDPOINT) is OFF

    assert "pip install 'sentei[traces]'" in caplog.text


def test_a_clients_context_is_honoured(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """A readable `traceparent` is the parent; of any other a new trace begins."""
    for header in (f"00-{TRACE}-{PARENT}-01", "", "nonsense", f"00-{'0' * 32}-{PARENT}-01"):
        tracer.begin(REQUEST, header, route="/v1/completions").end()

    contexts = [(span.context, span.parent) for span in kept.get_finished_spans()]
    traces = [f"{context.trace_id:032x}" for context, _ in contexts if context is not None]
    assert contexts[0][1] is not None
    assert (traces[0], f"{contexts[0][1].span_id:016x}") == (TRACE, PARENT)
    assert [parent for _, parent in contexts[1:]] == [None] * 3
    assert len(set(traces)) == 4


def test_context_goes_on_by_text(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """What a span sends to another process makes that one's span its child, in the same trace."""
    with tracer.begin(REQUEST) as span, span.child(TRY) as asking:
        tracer.follow(ENGINE, asking.traceparent).end()

    engine, asked, request = kept.get_finished_spans()
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", asking.traceparent)
    assert engine.parent is not None
    assert asked.context is not None
    assert request.context is not None
    assert engine.parent.span_id == asked.context.span_id
    assert engine.parent.trace_id == request.context.trace_id
    assert tracer.follow(ENGINE, "") is NO_SPAN


def test_who_does_not_want_to_be_sampled_is_not(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """The client's flag goes on to all processes: none of them records a span."""
    span = tracer.begin(REQUEST, f"00-{TRACE}-{PARENT}-00")
    asking = span.child(TRY)
    tracer.follow(ENGINE, asking.traceparent).end()
    asking.end()
    span.end()

    assert asking.traceparent.endswith("-00")
    assert kept.get_finished_spans() == ()


def test_no_seed_repeats_an_id() -> None:
    """Replicas that seed `random` alike do not give their spans the same ids."""
    found = set()
    for _ in range(2):
        random.seed(7)
        tracer = _OtelTracer(TracerProvider(shutdown_on_exit=False, id_generator=_ids()))
        found.add(tracer.begin(REQUEST).traceparent)

    assert len(found) == 2


def test_an_error_is_told_by_its_class_alone(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """Words of an error may quote what a caller sent; a variant's reason is a word of ours."""
    with pytest.raises(VariantError), tracer.begin(TRY, variant="sparse"):
        raise VariantError("sparse", "crash", "the prompt was: secret")
    with pytest.raises(GeneratorExit), tracer.begin(TRY):
        raise GeneratorExit

    failed, left = kept.get_finished_spans()
    assert said(kept)[0][1] == {
        "sentei.variant": "sparse",
        "error.type": "VariantError",
        "sentei.reason": "crash",
    }
    assert (failed.status.is_ok, left.status.is_ok) == (False, True)
    assert failed.events == ()
    assert failed.status.description is None


def test_only_listed_names_are_said(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """Anything else is a mistake of ours that a test finds; long text is cut, None says nothing."""
    span = tracer.begin(REQUEST, request_id="r" * 500, reason=None)
    with pytest.raises(KeyError, match="prompt"):
        span.say(prompt="secret")
    span.end()
    span.end()

    assert said(kept) == [(REQUEST, {"sentei.request_id": "r" * MAX_CHARS})]


def test_guide_has_the_same_lists() -> None:
    """The guide names each span and each attribute, and no other."""
    text = (ROOT / "docs" / "guides" / "traces.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (?:.*?) \|", text, flags=re.MULTILINE)

    assert sorted(rows) == sorted([*SPANS, *NAMES.values()])


def test_a_generation_is_told_in_parts(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """Wait, prefill and decode lie one behind the other within the engine's span, which has the counts."""
    request = EngineRequest("r", (1, 2, 3), 4, rung_id="mild", traceparent=f"00-{TRACE}-{PARENT}-01")
    with watch_generation(tracer, "sparse", request) as watch:
        watch.begin_prefill()
        watch.see(TokenChunk((7,), compute_s=0.5))
        watch.see(TokenChunk((8,), finish_reason=FinishReason.LENGTH, compute_s=0.75))

    wait, prefill, decode, engine = kept.get_finished_spans()
    times = [(span.start_time or 0, span.end_time or 0) for span in (wait, prefill, decode)]
    assert [span.name.removeprefix("sentei.") for span in (wait, prefill, decode, engine)] == [
        "wait",
        "prefill",
        "decode",
        "engine",
    ]
    assert all(begin <= end for begin, end in times)
    assert abs(times[0][1] - times[1][0]) < 1e6
    assert abs(times[1][1] - times[2][0]) < 1e6
    assert dict(engine.attributes or {}) == {
        "sentei.variant": "sparse",
        "sentei.rung": "mild",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "sentei.compute_s": 0.75,
        "sentei.finish_reason": "length",
    }


def test_a_generation_without_a_context_is_not_told(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """What the ingress does not trace, such as a warm-up, no engine traces."""
    with watch_generation(tracer, "sparse", EngineRequest("r", (1,), 4)) as watch:
        watch.begin_prefill()
        watch.see(TokenChunk((7,), compute_s=0.5))

    assert kept.get_finished_spans() == ()
    assert PREFILL in SPANS


class _Stuck(SpanExporter):
    """A collector that takes a batch and never answers."""

    def __init__(self) -> None:
        self.is_free, self.has_batch = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.has_batch.set()
        self.is_free.wait(60)
        return SpanExportResult.SUCCESS


def test_a_collector_that_hangs_holds_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Spans beyond the queue are dropped, and the end of the process waits for two seconds at most."""
    exporter, provider = _Stuck(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=64, max_export_batch_size=8))
    tracer = _OtelTracer(provider)
    for _ in range(8):
        tracer.begin(REQUEST).end()
    assert exporter.has_batch.wait(10)

    began_s = time.monotonic()
    for _ in range(1000):
        tracer.begin(REQUEST).end()
    took_s, began_s = time.monotonic() - began_s, time.monotonic()
    tracer.stop()
    stopped_s = time.monotonic() - began_s
    exporter.is_free.set()

    assert took_s < 5
    assert 1.5 < stopped_s < 10
    assert "dropping" in caplog.text


def test_parts_lie_within_their_whole(tracer: _OtelTracer, kept: InMemorySpanExporter) -> None:
    """A part that is told afterwards begins where its whole began, not before it."""
    span = tracer.begin(REQUEST)
    span.child(PREFILL, since_s=span.began_s).end()
    span.end()

    part, whole = kept.get_finished_spans()
    assert abs((part.start_time or 0) - (whole.start_time or 0)) < 1e6  # nanoseconds
