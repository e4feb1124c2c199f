"""`/metrics`: what all ingresses have counted, how the newest rollout stands, how the workers fare.

Whichever ingress answers says the same (docs/adr/0021): counts are shared through the store, the rollout is
read from it, at most once a second, and the workers are asked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder

from sentei.errors import SenteiError
from sentei.monitors.errors import MonitorError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import AuditStatus, Missing, Rollout
from sentei.monitors.store import Store
from sentei.monitors.tally import AuditTally, EndedAudit, read_audit_tally
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import read_look
from sentei.policies.machine import Phase, Wait
from sentei.policies.signals import Verdict
from sentei.policies.state import RolloutState, state_from_json
from sentei.serving.front.access import OperatorBook, Role
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.metrics.counts import counter, histogram, read_samples
from sentei.serving.metrics.names import LAG_BUCKETS_S, MASS_BUCKETS, OTHER, Page, Sample, Words
from sentei.serving.openai.document import describe
from sentei.serving.rollout.operations import StatusCall, ask_worker, needs

log = logging.getLogger(__name__)

CACHE_S = 1.0  # not longer than a scrape's interval, or a counter of the rollout would seem to fall
WAITING = "waiting"  # the phase before the controller's first tick
NUM_LOOKED_AT = 20  # newest decisions among which the newest verdicts are looked for
STATUSES = frozenset(status.value for status in AuditStatus)
MISSING = frozenset(reason.value for reason in Missing)


def add_metrics_route(
    api: FastAPI,
    gateway: Gateway,
    store: Store,
    *,
    operators: OperatorBook,
    is_open: bool = False,
    workers: Mapping[str, StatusCall] | None = None,
    now_s: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Add `/metrics` to the app, for operators who may look; for everybody where it `is_open`."""
    scrape = Scrape(gateway, store, workers=workers or {}, now_s=now_s, clock=clock)
    dependencies = [] if is_open else [needs(operators, Role.LOOK)]
    about = describe(errors=(401, 403, 429))
    about["responses"][200] = {"content": {"text/plain": {}}, "description": "Prometheus' text format"}

    @api.get("/metrics", dependencies=dependencies, response_class=Response, **about)
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        page = await scrape.page()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(page)  # it has the one method that is asked for
        return Response(encode(registry), media_type=content_type)


class AuditCounts:
    """The audits of one rollout, counted on from where the last look ended."""

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self.upto = 0
        registry = self._registry = CollectorRegistry()
        self._chosen: Counter = counter("sentei_audits_chosen_total", registry)
        self._ended: Counter = counter("sentei_audits_total", registry)
        self._lag: Histogram = histogram("sentei_audit_lag_seconds", LAG_BUCKETS_S, registry)
        self._mass: Histogram = histogram("sentei_dropped_mass_ratio", MASS_BUCKETS, registry)
        self._slices, self._rungs = Words(), Words()

    def add(self, tally: AuditTally) -> None:
        """Take in what has happened since."""
        for slice_id, count in tally.chosen.items():
            self._chosen.labels(slice=self._slices(slice_id)).inc(count)
        for audit in tally.ended:
            self._end(audit)
        self.upto = tally.upto

    def _end(self, audit: EndedAudit) -> None:
        slice_id = self._slices(audit.slice_id)
        status = audit.status if audit.status in STATUSES else OTHER
        reason = audit.reason if audit.reason in MISSING else OTHER
        self._ended.labels(
            slice=slice_id, status=status, reason=reason if status == AuditStatus.MISSING else ""
        ).inc()
        if status != AuditStatus.SCORED:
            return
        if audit.lag_s is not None:
            self._lag.labels(slice=slice_id).observe(max(0.0, audit.lag_s))
        if audit.dropped_mass is not None:
            self._mass.labels(slice=slice_id, rung=self._rungs(audit.rung_id)).observe(audit.dropped_mass)

    def samples(self) -> list[Sample]:
        """Return all that was counted."""
        return read_samples(self._registry)


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the store."""

    at_s: float  # on a monotonic clock
    samples: tuple[Sample, ...]


class Scrape:
    """Puts a page together; one instance serves all scrapes of an ingress."""

    def __init__(
        self,
        gateway: Gateway,
        store: Store,
        *,
        workers: Mapping[str, StatusCall],
        now_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._log = EventLog(store)
        self._book = PolicyBook(store)
        self._workers = workers
        self._now_s = now_s
        self._clock = clock
        self._looking = asyncio.Lock()
        self._is_read = threading.Lock()  # a look whose scrape was given up runs on beside the next one's
        self._seen: Seen | None = None
        self._audits = AuditCounts("")

    async def page(self) -> Page:
        """Return all that can be said now; a store or worker that is away is said, too."""
        asked = asyncio.gather(*(ask_worker(call) for call in self._workers.values()))
        page = Page()
        async with self._looking:
            if self._seen is None or self._clock() - self._seen.at_s >= CACHE_S:
                at_s = self._clock()  # before the look: it may be older, never younger
                self._seen = Seen(at_s, await asyncio.to_thread(self._look))
        for sample in self._seen.samples:
            page.add_sample(sample)
        for name, answer in zip(self._workers, await asked, strict=True):
            _add_worker(page, name, answer)
        return page

    def _look(self) -> tuple[Sample, ...]:
        """Read the store once; where it is away, only what this ingress has counted is left."""
        with self._is_read:
            return self._read()

    def _read(self) -> tuple[Sample, ...]:
        samples, found, is_up = _Samples(), list[Sample](), True
        try:
            found = self._gateway.shared.others()
            self._add_rollout(samples)
        except (SenteiError, LookupError) as error:
            log.warning("not all could be read for /metrics: %s", error)
            self._gateway.counts.store_failed("read_metrics")
            is_up = not isinstance(error, MonitorError)  # a log that was changed is there and cannot be told
            samples = _Samples()
        samples.add("sentei_store_up", float(is_up))
        return (*samples.found, *self._gateway.shared.own(), *found)

    def _add_rollout(self, samples: _Samples) -> None:
        rollouts = self._store.read_rollouts()
        if not rollouts:
            return
        rollout, now_s = rollouts[-1], self._now_s()
        event = self._log.latest(rollout.rollout_id)
        state = None if event is None else state_from_json(event.state)
        phase = WAITING if state is None else state.phase
        _add_set(samples, "sentei_rollout_phase", "phase", (WAITING, *Phase), phase)
        waits_for = "" if state is None else state.waits_for or ""
        _add_set(samples, "sentei_rollout_waits_for", "reason", tuple(Wait), waits_for)
        self._add_routing(samples, rollout.rollout_id, now_s)
        if event is not None and state is not None:
            self._add_info(samples, rollout, state)
            self._add_verdicts(samples, event)
        self._add_audits(samples, rollout.rollout_id, state, now_s)

    def _add_info(self, samples: _Samples, rollout: Rollout, state: RolloutState) -> None:
        policy = self._book.find(rollout.rollout_id, state.policy_digest)
        rung = next((stage.rung for stage in policy.spec.stages if stage.id == state.stage_id), "")
        samples.add(
            "sentei_rollout_info",
            1.0,
            rollout=rollout.rollout_id,
            policy=policy.metadata.name,
            stage=state.stage_id,
            rung=rung,
        )

    def _add_routing(self, samples: _Samples, rollout_id: str, now_s: float) -> None:
        found = self._store.read_routing()
        if found is None or found[0].rollout_id != rollout_id:
            return
        table, slices, rungs = found[0], Words(), Words()
        for route in table.routes:
            names = {"slice": slices(route.slice_id), "rung": rungs(route.rung_id)}
            samples.add("sentei_share_ratio", route.share, **names)
        samples.add("sentei_lease_seconds", table.lease_s)
        renewed_at_s = self._store.read_renewed_at(rollout_id)
        if renewed_at_s is not None:
            samples.add("sentei_lease_age_seconds", max(0.0, now_s - renewed_at_s))

    def _add_verdicts(self, samples: _Samples, newest: Event) -> None:
        guardrails, slices, rungs = Words(), Words(), Words()
        for found in self._verdicts(newest):
            names = {
                "guardrail": guardrails(found["id"]),
                "slice": slices(found["slice_id"]),
                "rung": rungs(found["rung_id"]) if found["rung_id"] else "",
            }
            for of, bound in (("harm", "threshold"), ("safe", "threshold_safe")):
                samples.add("sentei_guardrail_log_evidence", found[f"log_e_{of}"], **names, of=of)
                samples.add("sentei_guardrail_log_evidence_bound", found[bound], **names, of=of)
            samples.add("sentei_guardrail_mean", found["mean"], **names)
            samples.add("sentei_guardrail_mean_bound", found["bound"], **names)
            samples.add("sentei_guardrail_units", found["units"], **names)
            _add_set(
                samples, "sentei_guardrail_verdict", "verdict", tuple(Verdict), found["verdict"], **names
            )

    def _verdicts(self, newest: Event) -> list[dict[str, Any]]:
        """Return the verdicts of the newest tick, or of the newest decision that has some."""
        look = read_look(self._store, newest.rollout_id, after_s=newest.at_s)
        if look is not None:
            return list(look["verdicts"])
        decisions = self._log.decisions(newest.rollout_id, limit=NUM_LOOKED_AT)
        told = [event for event in (newest, *reversed(decisions)) if "verdicts" in event.payload]
        return list(told[0].payload["verdicts"]) if told else []

    def _add_audits(
        self, samples: _Samples, rollout_id: str, state: RolloutState | None, now_s: float
    ) -> None:
        if self._audits.rollout_id != rollout_id:
            self._audits = AuditCounts(rollout_id)
        tally = read_audit_tally(
            self._store,
            rollout_id,
            after=self._audits.upto,
            since_s=0.0 if state is None else state.since_s,
            now_s=now_s,
        )
        self._audits.add(tally)
        samples.found += self._audits.samples()
        since_s = tally.unscored_since_s
        age_s = 0.0 if since_s is None else max(0.0, now_s - since_s)
        samples.add("sentei_audit_unscored_age_seconds", age_s)


class _Samples:
    """Samples in the making."""

    def __init__(self) -> None:
        self.found: list[Sample] = []

    def add(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self.found.append((name, labels, float(value)))


def _add_set(
    samples: _Samples, name: str, label: str, values: tuple[str, ...], current: str, **labels: str
) -> None:
    """Add one series for each value that a state may have: 1 for the one that it has."""
    for value in values:
        samples.add(name, float(value == current), **labels, **{label: str(value)})


def _add_worker(page: Page, name: str, answer: Mapping[str, Any]) -> None:
    """Add what the controller or the auditor says of itself."""
    page.add("sentei_worker_up", float(answer["is_up"]), worker=name)
    if not answer["is_up"]:
        return
    if "num_ticks" in answer:
        page.add("sentei_ticks_total", answer["num_ticks"])
        page.add("sentei_tick_errors_total", answer["num_errors"])
        page.add("sentei_tick_age_seconds", answer["decided_ago_s"])
    if "written" in answer:
        page.add("sentei_audits_waiting", answer["waiting"])
        page.add("sentei_records_written_total", answer["written"], process=name)
        page.add("sentei_records_dropped_total", answer["dropped"], process=name)
        page.add("sentei_records_waiting", answer["records_waiting"], process=name)
        errors = answer["num_errors"]
        page.add("sentei_store_errors_total", errors, process=name, operation="write_record")
