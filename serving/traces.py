"""Traces by OpenTelemetry, where an endpoint is configured; without one nothing is imported, nothing spent.

A span is one stretch of a request in one process. Its context goes on as W3C's `traceparent`, in a field of
what passes through Ray's handles. Spans wait in a bounded queue for a thread that sends them, so a collector
that is slow or gone delays nothing: what finds no room is dropped. `NAMES` is all that a span may say: no
text, no token, nobody's name.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import uuid
from asyncio import CancelledError
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sentei.serving.errors import VariantError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import Span as OtelSpan

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
SERVICE = "sentei"
STOP_S = 2.0  # the longest that the end of a process waits for its last spans
MAX_CHARS = 128  # of an attribute: ids and words are shorter

Value = str | int | float | bool | None

# What a span may say, and by which name. Those of OpenTelemetry's own conventions where there are some.
NAMES: Mapping[str, str] = {
    "route": "http.route",
    "status_code": "http.response.status_code",
    "error": "error.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "request_id": "sentei.request_id",
    "rollout_id": "sentei.rollout_id",
    "variant": "sentei.variant",
    "variant_served": "sentei.variant_served",
    "slice_id": "sentei.slice",
    "rung_id": "sentei.rung",
    "share": "sentei.share",
    "reason": "sentei.reason",
    "outcome": "sentei.outcome",
    "finish_reason": "sentei.finish_reason",
    "is_audited": "sentei.is_audited",
    "is_resumed": "sentei.is_resumed",
    "compute_s": "sentei.compute_s",
    "replay": "sentei.replay",
    "audit_status": "sentei.audit_status",
    "audited_tokens": "sentei.audited_tokens",
}
# Every span, and its kind; all others are internal.
REQUEST, ADMIT, ROUTE, ANSWER, QUEUE, TRY = (
    f"sentei.{name}" for name in ("request", "admit", "route", "answer", "queue", "try")
)
ENGINE, WAIT, PREFILL, DECODE = (f"sentei.{name}" for name in ("engine", "wait", "prefill", "decode"))
AUDIT, REPLAY = "sentei.audit", "sentei.replay"
SPANS = (REQUEST, ADMIT, ROUTE, ANSWER, QUEUE, TRY, ENGINE, WAIT, PREFILL, DECODE, AUDIT, REPLAY)
KINDS = {REQUEST: "SERVER", TRY: "CLIENT", REPLAY: "CLIENT", ENGINE: "SERVER", AUDIT: "CONSUMER"}


class Span:
    """One stretch of a request; this one is nobody's: it records nothing."""

    traceparent = ""  # its context for another process; "" where nothing is recorded

    def child(self, name: str, *, since_s: float | None = None, **said: Value) -> Span:
        """Begin a part of it, now or at a moment of `time.monotonic` that lies behind."""
        return self

    def say(self, **said: Value) -> None:
        """Add attributes by the short names of `NAMES`; None says nothing."""

    def link(self, traceparent: str) -> None:
        """Point to a span of another trace that this one goes on with."""

    def end(self, *, is_ok: bool = True, at_s: float | None = None) -> None:
        """End it, now or at a moment of `time.monotonic`; a second end changes nothing."""

    @property
    def began_s(self) -> float:
        """When it began, by `time.monotonic`."""
        return time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; of an error class and reason are said, never its words. Who stops listening is no error."""
        is_ok = kind is None or issubclass(kind, GeneratorExit | CancelledError)
        if kind is not None and not is_ok:
            self.say(error=kind.__name__, reason=error.reason if isinstance(error, VariantError) else None)
        self.end(is_ok=is_ok)


class Tracer:
    """Begins the spans of one process; this one begins none."""

    is_on = False

    def begin(self, name: str, traceparent: str = "", **said: Value) -> Span:
        """Begin a span below that of another process; a new trace where there is none that can be read."""
        return NO_SPAN

    def follow(self, name: str, traceparent: str, **said: Value) -> Span:
        """Begin a span only where another process sends its context."""
        return self.begin(name, traceparent, **said) if traceparent else NO_SPAN

    def stop(self) -> None:
        """Send what waits, for at most two seconds."""


NO_SPAN = Span()
OFF = Tracer()


def read_tracer(part: str, environ: Mapping[str, str] = os.environ) -> Tracer:
    """Return the tracer of a process, by OpenTelemetry's own variables; OFF unless they name an endpoint.

    Traces help to look, so what they lack is said in the log and stops nobody: clusters set the variables in
    every container.
    """
    exporters = environ.get("OTEL_TRACES_EXPORTER", "otlp")
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or "otlp" not in exporters
    if is_off or not any(environ.get(name) for name in ENDPOINTS):
        return OFF
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        log.warning("no traces: %s is %r, and only %s is spoken", PROTOCOLS[1], protocol, PROTOCOL)
        return OFF
    try:
        return _OtelTracer(_provider(part))
    except ImportError as error:
        log.warning("no traces: %s is set, but %s; pip install 'sentei[traces]'", ENDPOINTS[1], error)
        return OFF


def _provider(part: str) -> TracerProvider:
    """Return a provider of our own: what others in this process trace, or set globally, is theirs."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = {"service.instance.id": f"{part}-{uuid.uuid4().hex[:8]}", "sentei.part": part}
    resource = Resource.create(own)
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=_ids())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _ids() -> IdGenerator:
    """Return a source of ids that no seed repeats: engines seed `random`, and two of them alike."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class SystemIds(RandomIdGenerator):
        def generate_span_id(self) -> int:
            return secrets.randbits(64) or 1

        def generate_trace_id(self) -> int:
            return secrets.randbits(128) or 1

    return SystemIds()


class _OtelTracer(Tracer):
    is_on = True

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)

    def begin(self, name: str, traceparent: str = "", **said: Value) -> Span:
        return _Recorded(self._tracer, name, _context(traceparent), None, said)

    def stop(self) -> None:
        # By itself it would wait for half a minute where the collector is gone.
        ending = threading.Thread(target=self._provider.shutdown, name="sentei-traces-end", daemon=True)
        ending.start()
        ending.join(STOP_S)


class _Recorded(Span):
    def __init__(
        self, tracer: Any, name: str, context: Any, since_s: float | None, said: Mapping[str, Value]
    ) -> None:
        from opentelemetry.trace import SpanKind

        self._tracer = tracer
        self._began_s = time.monotonic() if since_s is None else since_s
        self._span: OtelSpan = tracer.start_span(
            name,
            context=context,
            kind=SpanKind[KINDS.get(name, "INTERNAL")],
            attributes=_attributes(said),
            start_time=_wall_ns(self._began_s),  # by the clock that its parts are told by, too
            record_exception=False,
            set_status_on_exception=False,
        )
        found = self._span.get_span_context()
        self.traceparent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"

    def child(self, name: str, *, since_s: float | None = None, **said: Value) -> Span:
        from opentelemetry.trace import set_span_in_context

        return _Recorded(self._tracer, name, set_span_in_context(self._span), since_s, said)

    def say(self, **said: Value) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_attributes(said))

    def link(self, traceparent: str) -> None:
        from opentelemetry.trace import get_current_span

        found = get_current_span(_context(traceparent)).get_span_context()
        if found.is_valid and self._span.is_recording():
            self._span.add_link(found)

    def end(self, *, is_ok: bool = True, at_s: float | None = None) -> None:
        from opentelemetry.trace import StatusCode

        if self._span.is_recording():
            if not is_ok:
                self._span.set_status(StatusCode.ERROR)
            self._span.end(_wall_ns(at_s))

    @property
    def began_s(self) -> float:
        return self._began_s


def _context(traceparent: str) -> Any:
    """Return the context of a header; an empty one, for a new trace, where it cannot be read.

    `tracestate` is left out: it is text of the caller's choice.
    """
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _attributes(said: Mapping[str, Value]) -> dict[str, str | int | float | bool]:
    """Return what is said by its long names; a name that is not listed is an error of ours."""
    return {
        NAMES[name]: value[:MAX_CHARS] if isinstance(value, str) else value
        for name, value in said.items()
        if value is not None
    }


def _wall_ns(at_s: float | None) -> int | None:
    """Return a moment of `time.monotonic` as spans have them: nanoseconds of the epoch."""
    if at_s is None:
        return None
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)
