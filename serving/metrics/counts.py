"""What one ingress counts of its requests, in a registry of its own."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from sentei.monitors.records import Outcome, RequestRecord
from sentei.serving.metrics.names import (
    BY_NAME,
    DENSITY_BUCKETS,
    OTHER,
    TIME_BUCKETS_S,
    TOKEN_BUCKETS_S,
    Sample,
    Words,
)

DENSE = "dense"
VARIANTS = (DENSE, "sparse")
OUTCOMES = frozenset(outcome.value for outcome in Outcome)
FALLBACKS = (Outcome.FALLBACK_BEFORE, Outcome.FALLBACK_MID)
# Reasons of VariantError; each is one word of ours.
REASONS = frozenset(
    ("artifact", "breaker_open", "busy", "crash", "empty", "error", "nan_logits", "refused", "timeout")
)


def counter(name: str, registry: CollectorRegistry) -> Counter:
    """Return the counter of that name in the list."""
    spec = BY_NAME[name]
    return Counter(name, spec.text, spec.labels, registry=registry)


def histogram(name: str, buckets: Sequence[float], registry: CollectorRegistry) -> Histogram:
    """Return the histogram of that name in the list."""
    spec = BY_NAME[name]
    return Histogram(name, spec.text, spec.labels, buckets=buckets, registry=registry)


def read_samples(registry: CollectorRegistry) -> list[Sample]:
    """Return all samples of a registry, without the times at which its series were made."""
    return [
        (sample.name, dict(sample.labels), sample.value)
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]


class IngressCounts:
    """Counts requests as they end; `process` names this ingress in every series."""

    def __init__(self, process: str | None = None) -> None:
        self.process = process or f"ingress-{uuid.uuid4().hex[:8]}"
        registry = self._registry = CollectorRegistry()
        self._requests = counter("sentei_requests_total", registry)
        self._fallbacks = counter("sentei_fallbacks_total", registry)
        self._store_errors = counter("sentei_store_errors_total", registry)
        self._ttft = histogram("sentei_ttft_seconds", TIME_BUCKETS_S, registry)
        self._tpot = histogram("sentei_tpot_seconds", TOKEN_BUCKETS_S, registry)
        self._queue = histogram("sentei_queue_seconds", TIME_BUCKETS_S, registry)
        self._density = histogram("sentei_attention_density_ratio", DENSITY_BUCKETS, registry)
        self._slices, self._rungs = Words(), Words()

    def end(
        self,
        record: RequestRecord,
        *,
        failed_by: str,
        queue_s: float | None,
        attention: Mapping[str, Any] | None,
    ) -> None:
        """Count a request that has ended; `failed_by` is the reason of its newest failed try, if any."""
        variant = record.variant_assigned if record.variant_assigned in VARIANTS else OTHER
        outcome = record.outcome if record.outcome in OUTCOMES else OTHER
        slice_id, rung_id = self._slices(record.slice_id), self._rungs(record.rung_id)
        whose = {"process": self.process, "slice": slice_id}
        served_at = DENSE if variant == DENSE else rung_id
        self._requests.labels(**whose, variant=variant, rung=served_at, outcome=outcome).inc()
        if outcome in FALLBACKS:
            reason = failed_by if failed_by in REASONS else OTHER
            self._fallbacks.labels(**whose, reason=reason).inc()
        for metric, value in (
            (self._ttft, _seconds(record.ttft_ms)),
            (self._tpot, _seconds(record.tpot_ms)),
            (self._queue, queue_s),
        ):
            if value is not None:
                metric.labels(**whose, variant=variant).observe(value)
        for name in ("prefill", "decode"):
            density = None if attention is None else attention.get(f"{name}_density")
            if density is not None:
                self._density.labels(**whose, rung=rung_id, **{"pass": name}).observe(density)

    def store_failed(self, operation: str) -> None:
        """Count a read or write of the store that failed; `operation` is a word of ours."""
        self._store_errors.labels(process=self.process, operation=operation).inc()

    def samples(self) -> list[Sample]:
        """Return all that was counted."""
        return read_samples(self._registry)


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1e3
