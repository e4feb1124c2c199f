"""Makers of records, a tracker in memory, and a store that fails where a test wants it to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from sentei.monitors.errors import StoreError
from sentei.monitors.records import Arrival, AuditScore, RequestRecord
from sentei.monitors.store import Store
from sentei.pipeline.tracking.tracker import MetricPoint, RefusedError, RunSpec, TrackingError

ROLLOUT = "r1"
START_S = 1000.0
POLICY = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: test}
spec:
  ladder: [{id: medium}]
  slices:
    buckets: [{id: long, range: [0, 32768]}]
  assignment: {unit: session_id, salt: test}
  stages:
    - {id: shadow, share: 0, rung: medium}
    - {id: half, share: 50%, rung: medium}
    - {id: full, share: 95%, rung: medium, bake: 2s}
  advance: {need: all_safe, min_units: 20}
  audit: {select: {fraction: 1.0}}
  guardrails:
    items:
      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.10, floor_cap: 0.10},
         test: betting_paired, action: rollback}
  breaker:
    variant: {window: 30s, min_requests: 10, failure_share: 50%}
  data:
    max_age: 60s
    no_data: {grace: 60s, after: 300s}
    monitor_lease: 3s
  schedule: {check_every: 1s}
"""

WITH_BENEFIT = POLICY.replace(
    "  breaker:\n",
    "  benefit:\n    - {id: compute, value: audit.compute_ratio, want: {max: 0.90}}\n  breaker:\n",
)


def make_request(i: int, **changes: Any) -> RequestRecord:
    """One request of session `s<i>`; by default answered by sparse."""
    values: dict[str, Any] = {
        "request_id": f"q{i}",
        "session_id": f"s{i}",
        "rollout_id": ROLLOUT,
        "at_s": 1000.0 + i,
        "slice_id": "long",
        "variant_assigned": "sparse",
        "variant_served": "sparse",
        "rung_id": "medium",
        "share": 0.25,
        "prompt_tokens": 4000,
        "completion_tokens": 50,
        "ttft_ms": 400.0,
        "tpot_ms": 30.0,
        "total_ms": 1900.0,
        "outcome": "ok",
        "chosen_for_audit": True,
        "compute_s": 1.5,
    }
    return RequestRecord(**{**values, **changes})


def make_arrival(i: int, **changes: Any) -> Arrival:
    """The arrival of session `s<i>`; by default sparse gets it."""
    values: dict[str, Any] = {
        "rollout_id": ROLLOUT,
        "session_id": f"s{i}",
        "slice_id": "long",
        "at_s": 1000.0 + i,
        "share": 0.25,
        "variant_assigned": "sparse",
    }
    return Arrival(**{**values, **changes})


def make_audit(i: int, **changes: Any) -> AuditScore:
    """One scored audit of session `s<i>`, as good as dense."""
    values: dict[str, Any] = {
        "request_id": f"q{i}",
        "session_id": f"s{i}",
        "rollout_id": ROLLOUT,
        "at_s": 1000.5 + i,
        "slice_id": "long",
        "rung_id": "medium",
        "variant_served": "sparse",
        "status": "scored",
        "tokens": 50,
        "token_disagreement": 0.0,
        "token_disagreement_floor": 0.0,
        "kl": 0.002,
        "kl_floor": 0.0,
        "first_divergence": None,
        "dropped_mass_mean": 0.01,
        "dropped_mass_p99": 0.05,
        "dense_compute_s": 1.0,
        "sparse_compute_s": 0.6,
    }
    return AuditScore(**{**values, **changes})


class FakeTracker:
    """A tracker in memory that can be away for the next `failures` calls, or for good."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.refused_steps: set[int] = set()  # points at these steps are refused for good
        self.runs: dict[str, dict[str, Any]] = {}

    def ensure_run(self, experiment: str, spec: RunSpec) -> str:
        """Find or create the run by its key."""
        self._answer()
        run_id = f"{experiment}/{spec.key}"
        run = self.runs.setdefault(
            run_id,
            {"name": spec.name, "parent": spec.parent_run_id, "tags": dict(spec.tags or {}), "params": {}}
            | {"metrics": set(), "artifacts": {}, "status": "RUNNING"},
        )
        for name, value in (spec.params or {}).items():
            first = run["params"].setdefault(name, value)
            if run["tags"].get(f"changed.{name}", first) != value:
                run["tags"][f"changed.{name}"] = value
        return run_id

    def log(self, run_id: str, metrics: Sequence[MetricPoint], tags: Mapping[str, str]) -> None:
        """Keep each point once."""
        self._answer()
        if any(point.step in self.refused_steps for point in metrics):
            raise RefusedError("the fake tracker refuses this step")
        self.runs[run_id]["metrics"] |= set(metrics)
        self.runs[run_id]["tags"] |= dict(tags)

    def save_text(self, run_id: str, text: str, artifact_path: str) -> None:
        """Keep the text."""
        self._answer()
        self.runs[run_id]["artifacts"][artifact_path] = text

    def save_file(self, run_id: str, path: Path, folder: str) -> None:
        """Keep the file's text, or that of each file of a folder."""
        self._answer()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
                self.runs[run_id]["artifacts"][f"{folder}/{name}"] = file.read_text()

    def finish(self, run_id: str, end_s: float, *, is_ok: bool) -> None:
        """Mark the run as ended."""
        self._answer()
        self.runs[run_id]["status"] = "FINISHED" if is_ok else "FAILED"

    def reopen(self, run_id: str) -> None:
        """Mark the run as going on."""
        self._answer()
        self.runs[run_id]["status"] = "RUNNING"

    def _answer(self) -> None:
        if self.failures:
            self.failures -= 1
            raise TrackingError("the fake tracker is away")


class FlakyStore(Store):
    """A store whose n-th transaction from now fails, before it or after its commit."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.calls_until_failure: int | None = None
        self.fails_after_commit = False
        self.num_calls = 0

    @contextmanager
    def read(self, what: str) -> Iterator[Connection]:
        """Read, or fail."""
        is_failing = self._is_due()
        if is_failing:
            raise StoreError(f"planted failure of read {what}")
        with super().read(what) as connection:
            yield connection

    @contextmanager
    def write(self, what: str) -> Iterator[Connection]:
        """Write, or fail before or after the commit."""
        is_failing = self._is_due()
        if is_failing and not self.fails_after_commit:
            raise StoreError(f"planted failure of write {what}")
        with super().write(what) as connection:
            yield connection
        if is_failing:
            raise StoreError(f"planted failure after write {what}")

    def _is_due(self) -> bool:
        self.num_calls += 1
        if self.calls_until_failure is None:
            return False
        self.calls_until_failure -= 1
        return self.calls_until_failure < 0
