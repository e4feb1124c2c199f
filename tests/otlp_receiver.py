"""A collector for tests: what comes over OTLP by HTTP, read with OpenTelemetry's own protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.http_receiver import Receiver


@dataclass(frozen=True, slots=True)
class SentSpan:
    """One span as a collector gets it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    part: str  # whose process
    is_ok: bool
    start_ns: int
    end_ns: int
    said: dict[str, Any]
    links: tuple[str, ...]  # trace ids


def read_spans(receiver: Receiver, trace_id: str | None = None) -> list[SentSpan]:
    """All spans that have come, or those of one trace."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = list[SentSpan]()
    for received in list(receiver.received):
        assert (received.path, received.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        for resource in ExportTraceServiceRequest.FromString(received.body).resource_spans:
            part = str(_values(resource.resource.attributes)["sentei.part"])
            for scope in resource.scope_spans:
                found += [_read(span, part) for span in scope.spans]
    return [span for span in found if trace_id in (None, span.trace_id)]


def _read(span: Any, part: str) -> SentSpan:
    return SentSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        part=part,
        is_ok=span.status.code != 2,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        said=_values(span.attributes),
        links=tuple(link.trace_id.hex() for link in span.links),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
