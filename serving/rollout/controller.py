"""The controller: APScheduler calls the rollout's tick, its drift checks, MLflow's mirror and the notifier.

It keeps nothing: state is in the event log, so a killed controller goes on where the log ends; until it does,
the ingress drops to dense when the lease runs out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from sentei.monitors.clock import SteadyClock, machine_id
from sentei.monitors.events import EventLog
from sentei.monitors.records import ARTIFACT
from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions
from sentei.policies.schema.policy import Policy

log = logging.getLogger(__name__)


class Mirror(Protocol):
    """Copies the event log to MLflow."""

    def run_once(self) -> Any:
        """Replay what is new."""


class Notifier(Protocol):
    """Tells people what the event log says."""

    def run_once(self, now_s: float) -> Any:
        """Deliver what is new."""


class GateKeeper(Protocol):
    """Asks the webhook of an approval."""

    def run_once(self, now_s: float) -> str | None:
        """Ask if it is time; why it was not approved, or None where nobody was asked."""


class MetricReader(Protocol):
    """Asks for metrics of one's own, and writes down what they were."""

    def run_once(self, now_s: float) -> tuple[str, ...]:
        """Ask for what is due; what gave no number, and why."""


class Controller:
    """Runs the newest rollout of a store; every job runs in a thread and never twice at a time."""

    def __init__(
        self,
        store: Store,
        *,
        mirror: Mirror | None,
        reports: Path,
        notifier: Notifier | None = None,
        gatekeeper: GateKeeper | None = None,
        metric_reader: MetricReader | None = None,
        replicas: Callable[[], Mapping[str, int]] | None = None,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,  # where none is given, `clock` is one
        machine: str | None = None,
    ) -> None:
        owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        options = RunnerOptions(
            owner,
            artifact=lambda: store.read_value(ARTIFACT) or "",
            machine=machine_id() if machine is None else machine,
        )
        self._options = options if replicas is None else replace(options, replicas=replicas)
        self._store = store
        self._mirror = mirror
        self._notifier = notifier
        self._gatekeeper = gatekeeper
        self._metric_reader = metric_reader
        self._reports = reports
        self._clock = clock or store.clock()
        self._monotonic = monotonic or self._clock
        self._poll_s = 0.0
        self._pace_s = 0.0  # between two looks at the inbox: never more than between two checks
        self._checked_s: float | None = None  # None: look at once
        self._newest_order = 0
        self._runner: RolloutRunner | None = None
        self._scheduler: Any = None
        self.num_ticks = 0
        self.num_errors = 0
        self._decided_s: float | None = None  # when a tick last ended with a decision
        self.last_error = ""
        self.mirror_error = ""
        self.notify_error = ""
        self.gate_answer = ""
        self._has_lease = False  # until a tick says so
        self._threads: list[ThreadPoolExecutor] = []

    def start(
        self,
        *,
        tick_every_s: float,
        drift_every_s: float,
        mirror_every_s: float,
        notify_every_s: float = 2.0,
        ask_every_s: float = 1.0,
    ) -> None:
        """Start the jobs; needs a running event loop.

        Orders are looked for each `tick_every_s`; whether it is time for a check says the policy.
        """
        self._poll_s = self._pace_s = tick_every_s
        # A missed run is made up once, at once; a run that is still going is not started again.
        defaults = {"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
        self._scheduler = AsyncIOScheduler(job_defaults=defaults, timezone="UTC")
        self._add_job(self.tick, tick_every_s)
        self._add_job(self.check_drift, drift_every_s)
        if self._mirror is not None:
            self._add_job(self.mirror, mirror_every_s)
        if self._notifier is not None:
            self._add_job(self.notify, notify_every_s)
        if self._gatekeeper is not None:
            self._add_job(self.ask_gate, ask_every_s)
        if self._metric_reader is not None:
            self._add_job(self.read_metrics, ask_every_s)
        self._scheduler.start()

    def stop(self) -> None:
        """Stop the jobs."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=False)
        for threads in self._threads:
            threads.shutdown(wait=False)

    def tick(self) -> None:
        """Let the newest rollout take one step if its next check is due, or an order waits for it.

        After an error, or without the lease, it tries again each time.
        """
        runner = self._newest()
        if runner is None:
            return
        self._keep_pace(runner)
        newest_order, now_s = self._store.newest_order(runner.rollout.rollout_id), self._monotonic()
        if not self._is_due(runner, now_s) and newest_order == self._newest_order:
            return
        result = runner.tick(self._clock())
        self.num_ticks += 1
        self.last_error = result.error
        self.num_errors += bool(result.error)
        self._has_lease = result.has_lease
        self._checked_s = now_s if result.decision is not None else None
        self._decided_s = now_s if result.decision is not None else self._decided_s
        self._newest_order = newest_order
        if result.decision is not None and result.decision.changed:
            log.info("%s: %s", runner.rollout.rollout_id, result.decision.reason)

    def _is_due(self, runner: RolloutRunner, now_s: float) -> bool:
        # Half a look early is on time: looks are not on the millisecond, and late would be a whole look late.
        every_s = runner.policy.spec.schedule.check_every - self._pace_s / 2
        return self._checked_s is None or not 0 <= now_s - self._checked_s < every_s

    def _keep_pace(self, runner: RolloutRunner) -> None:
        """Look as often as the policy checks, if that is more often than orders are looked for."""
        pace_s = min(self._poll_s, runner.policy.spec.schedule.check_every)
        if self._scheduler is not None and pace_s != self._pace_s:
            self._scheduler.reschedule_job("tick", trigger="interval", seconds=pace_s)
            self._pace_s = pace_s

    def check_drift(self) -> None:
        """Run the newest rollout's drift checks."""
        if (runner := self._newest()) is not None:
            runner.check_drift(self._reports / runner.rollout.rollout_id, self._clock())

    def mirror(self) -> None:
        """Copy what is new to MLflow; while MLflow is down the cursor stays and decisions go on."""
        if self._mirror is None:
            return
        found = self._mirror.run_once()
        text = "; ".join(filter(None, (found.reason, *found.refused)))
        if text and text != self.mirror_error:
            log.warning("mirror: %s", text)
        self.mirror_error = text

    def notify(self) -> None:
        """Tell receivers what is new; while one is away its place in the log stays and decisions go on."""
        if self._notifier is None or not self._has_lease:  # of two controllers one tells
            return
        text = "; ".join(self._notifier.run_once(self._clock()).reasons)
        if text and text != self.notify_error:
            log.warning("notify: %s", text)
        self.notify_error = text

    def ask_gate(self) -> None:
        """Ask the gate that the newest rollout waits for; while it is away or says no the stage holds.

        Where its policy has no gate, nothing is read.
        """
        if self._gatekeeper is None or not self._has_lease or not _has_gate(self._policy()):
            return
        found = self._gatekeeper.run_once(self._clock())
        if found and found != self.gate_answer:
            log.info("%s", found)
        self.gate_answer = self.gate_answer if found is None else found

    def read_metrics(self) -> None:
        """Write down what metrics of one's own are; the tick reads it there, and waits for nobody.

        Where its policy has none, nothing is read.
        """
        if self._metric_reader is None or not self._has_lease or not _has_metrics(self._policy()):
            return
        for text in self._metric_reader.run_once(self._clock()):
            log.warning("metric %s", text)

    def status(self) -> dict[str, Any]:
        """Say how the controller fares."""
        rollout_id = self._runner.rollout.rollout_id if self._runner is not None else None
        return {
            "pid": os.getpid(),
            "owner": self._options.owner,
            "rollout_id": rollout_id,
            "num_ticks": self.num_ticks,
            "num_errors": self.num_errors,
            "decided_ago_s": None if self._decided_s is None else self._monotonic() - self._decided_s,
            "last_error": self.last_error,
            "mirror_error": self.mirror_error,
            "notify_error": self.notify_error,
            "gate_answer": self.gate_answer,
        }

    def _policy(self) -> Policy | None:
        """The policy that the newest rollout runs by, as the newest tick knows it."""
        return self._runner.policy if self._runner is not None else None

    def _newest(self) -> RolloutRunner | None:
        rollouts = self._store.read_rollouts()
        if not rollouts:
            return None
        newest = rollouts[-1]
        if self._runner is None or self._runner.rollout.rollout_id != newest.rollout_id:
            self._runner = RolloutRunner.open(self._store, newest.rollout_id, self._options)
            event = EventLog(self._store).latest(newest.rollout_id)
            if event is not None and isinstance(self._clock, SteadyClock):
                self._clock.not_before(event.at_s)
            self._checked_s, self._newest_order = None, 0
            log.info("took up rollout %s", newest.rollout_id)
        return self._runner

    def _add_job(self, job: Callable[[], None], every_s: float) -> None:
        # Each has a thread of its own: in a pool that all share, jobs that hang could keep the tick waiting.
        threads = ThreadPoolExecutor(1, thread_name_prefix=job.__name__)
        self._threads.append(threads)
        self._scheduler.add_job(_in_thread(job, threads), "interval", seconds=every_s, id=job.__name__)


def _has_gate(policy: Policy | None) -> bool:
    stages = policy.spec.stages if policy is not None else ()
    return any(stage.approval is not None and stage.approval.webhook is not None for stage in stages)


def _has_metrics(policy: Policy | None) -> bool:
    return policy is not None and bool(policy.spec.guardrails.prometheus)


def _in_thread(job: Callable[[], None], threads: ThreadPoolExecutor) -> Callable[[], Any]:
    async def run() -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(threads, job)
        except Exception:  # the tick: the loop must outlive a store that is away
            log.exception("job %s failed; it runs again at its next time", job.__name__)

    return run
