"""Every metric of `/metrics`: the one list, held against the guide and against what is really answered.

A name says its unit. A label has few values: those that are no fixed set (slices, rungs, guardrails) pass
`Words`, which lets so many through and calls the rest `other`. No metric says who asked or what.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client.core import Metric

Labels = Mapping[str, str]
Sample = tuple[str, dict[str, str], float]  # name with its suffix, labels, value

OTHER = "other"
MAX_WORDS = 32  # values of one label that is no fixed set
MAX_SERIES = 2_000  # of one metric, buckets included: more are left out
_WORD = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._-]{0,63}")


class Source(StrEnum):
    """Where a metric is counted, and so what a restart of which process does to it."""

    PROCESS = "process"  # in one process, whose label it carries
    STORE = "store"  # read from the store: the same whichever ingress answers
    WORKER = "worker"  # told by the controller or the auditor


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its name as Prometheus stores it, without the suffixes of a histogram."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    labels: tuple[str, ...]
    source: Source
    text: str

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What is added to the name in samples."""
        return ("_bucket", "_count", "_sum") if self.kind == "histogram" else ("",)


TIME_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
LAG_BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
DENSITY_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
MASS_BUCKETS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)

_COUNTER, _GAUGE, _HISTOGRAM = "counter", "gauge", "histogram"
_OF_PROCESS, _OF_STORE, _OF_WORKER = Source.PROCESS, Source.STORE, Source.WORKER
_REQUEST = ("process", "variant", "slice")
_GUARDRAIL = ("guardrail", "slice", "rung")

METRICS = (
    Spec(
        "sentei_requests_total",
        _COUNTER,
        ("process", "variant", "slice", "rung", "outcome"),
        _OF_PROCESS,
        "Requests that ended, by the variant they were assigned to, whoever answered.",
    ),
    Spec(
        "sentei_fallbacks_total",
        _COUNTER,
        ("process", "slice", "reason"),
        _OF_PROCESS,
        "Answers that dense gave or went on with because the assigned variant failed.",
    ),
    Spec("sentei_ttft_seconds", _HISTOGRAM, _REQUEST, _OF_PROCESS, "Time to the first token."),
    Spec("sentei_tpot_seconds", _HISTOGRAM, _REQUEST, _OF_PROCESS, "Mean time per token after the first."),
    Spec(
        "sentei_queue_seconds",
        _HISTOGRAM,
        _REQUEST,
        _OF_PROCESS,
        "Part of the time to the first token in which the model did not work for this request.",
    ),
    Spec(
        "sentei_attention_density_ratio",
        _HISTOGRAM,
        ("process", "slice", "rung", "pass"),
        _OF_PROCESS,
        "Share of the causal blocks that a thinned answer kept, mean over its layers.",
    ),
    Spec(
        "sentei_store_errors_total",
        _COUNTER,
        ("process", "operation"),
        _OF_PROCESS,
        "Reads and writes of the store that failed, tries that were made again included.",
    ),
    Spec(
        "sentei_records_written_total",
        _COUNTER,
        ("process",),
        _OF_PROCESS,
        "Requests, arrivals and audit scores that the store has taken.",
    ),
    Spec(
        "sentei_records_dropped_total",
        _COUNTER,
        ("process",),
        _OF_PROCESS,
        "Records that were lost: no room in the queue, or a store that stayed away.",
    ),
    Spec("sentei_records_waiting", _GAUGE, ("process",), _OF_PROCESS, "Records that are not written yet."),
    Spec(
        "sentei_lease_is_fresh",
        _GAUGE,
        ("process",),
        _OF_PROCESS,
        "1 while this ingress obeys the routing table, 0 while it serves dense to everybody.",
    ),
    Spec("sentei_store_up", _GAUGE, (), _OF_STORE, "1 where the answering ingress could read the store."),
    Spec(
        "sentei_rollout_info",
        _GAUGE,
        ("rollout", "policy", "stage", "rung"),
        _OF_STORE,
        "1 for the newest rollout, its stage and the rung of that stage.",
    ),
    Spec("sentei_rollout_phase", _GAUGE, ("phase",), _OF_STORE, "1 for the phase that it is in."),
    Spec(
        "sentei_rollout_waits_for", _GAUGE, ("reason",), _OF_STORE, "1 for what a running rollout waits for."
    ),
    Spec(
        "sentei_share_ratio",
        _GAUGE,
        ("slice", "rung"),
        _OF_STORE,
        "Share of the sessions of a slice that the routing table sends to sparse.",
    ),
    Spec(
        "sentei_lease_age_seconds",
        _GAUGE,
        (),
        _OF_STORE,
        "Time since a controller last renewed the routing table.",
    ),
    Spec(
        "sentei_lease_seconds",
        _GAUGE,
        (),
        _OF_STORE,
        "Age from which on ingresses no longer obey the routing table, by the policy.",
    ),
    Spec(
        "sentei_guardrail_log_evidence",
        _GAUGE,
        (*_GUARDRAIL, "of"),
        _OF_STORE,
        "Log e-value of harm, or of safety, of a guardrail; of a benefit, of its absence and its presence.",
    ),
    Spec(
        "sentei_guardrail_log_evidence_bound",
        _GAUGE,
        (*_GUARDRAIL, "of"),
        _OF_STORE,
        "Log e-value from which on harm, or safety, is proven.",
    ),
    Spec(
        "sentei_guardrail_mean",
        _GAUGE,
        _GUARDRAIL,
        _OF_STORE,
        "Measured mean of a guardrail's value, in the metric's own unit.",
    ),
    Spec(
        "sentei_guardrail_mean_bound",
        _GAUGE,
        _GUARDRAIL,
        _OF_STORE,
        "Bound of that mean, by the policy.",
    ),
    Spec("sentei_guardrail_units", _GAUGE, _GUARDRAIL, _OF_STORE, "Units (sessions) that were measured."),
    Spec(
        "sentei_guardrail_verdict",
        _GAUGE,
        (*_GUARDRAIL, "verdict"),
        _OF_STORE,
        "1 for the verdict of the newest tick.",
    ),
    Spec(
        "sentei_audits_chosen_total",
        _COUNTER,
        ("slice",),
        _OF_STORE,
        "Requests of the newest rollout that were chosen for an audit.",
    ),
    Spec(
        "sentei_audits_total",
        _COUNTER,
        ("slice", "status", "reason"),
        _OF_STORE,
        "Audits of the newest rollout that ended: scored, error, or missing with the reason.",
    ),
    Spec(
        "sentei_audit_lag_seconds",
        _HISTOGRAM,
        ("slice",),
        _OF_STORE,
        "Time from the end of an answer to its score.",
    ),
    Spec(
        "sentei_audit_unscored_age_seconds",
        _GAUGE,
        (),
        _OF_STORE,
        "Time since the first audit was due of those that came after the newest score; 0: none waits.",
    ),
    Spec(
        "sentei_dropped_mass_ratio",
        _HISTOGRAM,
        ("slice", "rung"),
        _OF_STORE,
        "Attention mass that sparse dropped, mean over the sampled rows of an audit.",
    ),
    Spec(
        "sentei_worker_up", _GAUGE, ("worker",), _OF_WORKER, "1 where the controller or the auditor answers."
    ),
    Spec("sentei_audits_waiting", _GAUGE, (), _OF_WORKER, "Audits that the auditor has taken and not done."),
    Spec("sentei_ticks_total", _COUNTER, (), _OF_WORKER, "Ticks of the controller, failed ones included."),
    Spec("sentei_tick_errors_total", _COUNTER, (), _OF_WORKER, "Ticks that failed."),
    Spec(
        "sentei_tick_age_seconds",
        _GAUGE,
        (),
        _OF_WORKER,
        "Time since the controller last ended a tick with a decision.",
    ),
)
BY_NAME: Mapping[str, Spec] = {spec.name: spec for spec in METRICS}
_SAMPLES: Mapping[str, Spec] = {spec.name + suffix: spec for spec in METRICS for suffix in spec.suffixes}


class Words:
    """Lets the first `limit` values of a label through; what comes later, or is no word, is `other`."""

    def __init__(self, limit: int = MAX_WORDS) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, text: str) -> str:
        """Return the value that stands for `text`."""
        if text in self._seen:
            return text
        if len(self._seen) >= self._limit or _WORD.fullmatch(text) is None:
            return OTHER
        self._seen.add(text)
        return text


class Page:
    """Collects samples for one answer: known names and labels only, no series twice, not too many."""

    def __init__(self) -> None:
        self._found: dict[str, dict[tuple[str, ...], Sample]] = {spec.name: {} for spec in METRICS}

    def add(self, name: str, value: float | None, **labels: str) -> None:
        """Add a sample; None adds none."""
        if value is not None:
            self.add_sample((name, labels, float(value)))

    def add_sample(self, sample: Sample) -> None:
        """Add a sample by its whole name; what is not on the list is left out."""
        name, labels, _ = sample
        spec = _SAMPLES.get(name)
        if spec is None or {*labels} - {"le"} != {*spec.labels}:
            return
        series = self._found[spec.name]
        key = (name, *(labels.get(label, "") for label in (*spec.labels, "le")))
        if key not in series and len(series) < MAX_SERIES:
            series[key] = sample

    def collect(self) -> Iterator[Metric]:
        """Give what was added to prometheus_client, which writes it."""
        for spec in METRICS:
            metric = Metric(spec.name.removesuffix("_total"), spec.text, spec.kind)
            for name, labels, value in self._found[spec.name].values():
                metric.add_sample(name, dict(labels), value)
            if metric.samples:
                yield metric
