"""MLflow behind a port. Every operation may be repeated: a mirror killed halfway simply does it again.

TrackingError    the tracking server or its database does not answer: later it may
  RefusedError   it answers, and will never take this: a deleted experiment or run, a value it does not allow
"""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sentei.errors import SenteiError
from sentei.monitors.database import make_private
from sentei.pipeline.home import safe_name
from sentei.pipeline.tracking.moved import follow_home

_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",  # MLflow takes only the word "true"
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the mirror comes back; the default blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
EXPERIMENTS = {kind: f"sentei-{kind}" for kind in ("distill", "joint", "calibrate", "evaluate")}
_KEY_TAG = "sentei.key"
# Without it MLflow's UI takes an experiment for one of agents, and opens it on an empty page of traces.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.:/@ +-]{1,250}")
_PARENT_TAG = "mlflow.parentRunId"
_MAX_METRICS_PER_CALL = 1000
_MAX_PARAM_CHARS = 6000
_CHANGED_TAG = "changed."  # + name of a param that has another value now
# What the same call will get again; every other refusal is of the moment.
_PERMANENT = frozenset(
    {"BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED"}
    | {"RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
)


class TrackingError(SenteiError):
    """The tracking backend does not answer; the message names its address and the reason."""

    is_absent = True


class RefusedError(TrackingError):
    """The tracking backend refuses this for good; trying again is of no use."""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; equal points are kept once."""

    name: str
    value: float
    step: int
    at_s: float


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run to find by its key, or to create."""

    key: str  # unique in the experiment, such as "rollout:<id>"
    name: str
    start_s: float
    parent_run_id: str | None = None
    params: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None


class Tracker(Protocol):
    """What the pipeline needs of an experiment tracker; raises TrackingError while it is away, and
    RefusedError for what it will never take.
    """

    def ensure_run(self, experiment: str, spec: RunSpec) -> str:
        """Return the id of the run with that key; create it with its params and tags if there is none.

        A param keeps its first value; another one is kept as the tag `changed.<name>`.
        """

    def log(self, run_id: str, metrics: Sequence[MetricPoint], tags: Mapping[str, str]) -> None:
        """Add metric points and set tags."""

    def save_text(self, run_id: str, text: str, artifact_path: str) -> None:
        """Keep a text as an artifact."""

    def save_file(self, run_id: str, path: Path, folder: str) -> None:
        """Keep a file, or all files of a folder, as artifacts."""

    def finish(self, run_id: str, end_s: float, *, is_ok: bool) -> None:
        """Mark the run as ended."""

    def reopen(self, run_id: str) -> None:
        """Mark a run as going on, whether it had ended or not."""


SQLITE = "sqlite:///"
SERVER = ("http://", "https://")


class MlflowTracker:
    """Tracker on MLflow; the address is always explicit, because MLflow's default depends on the folder."""

    def __init__(self, tracking_uri: str, artifact_root: Path | None = None) -> None:
        """`artifact_root` is for databases written directly; a tracking server decides by itself."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.tracking_uri = tracking_uri
        if tracking_uri.startswith(SQLITE):
            make_private(Path(tracking_uri.removeprefix(SQLITE)))
        # A folder of this machine is no place for what a server's other clients, and its pages, read.
        is_server = tracking_uri.startswith(SERVER)
        self._artifact_root = None if is_server else artifact_root
        self._experiment_ids: dict[str, str] = {}
        self._client: Any = None

    def ensure_run(self, experiment: str, spec: RunSpec) -> str:
        """Find the run by its key tag, or create it."""
        with self.answering() as client:
            experiment_id = self._experiment_id(client, experiment)
            found = client.search_runs(
                [experiment_id], filter_string=f"tags.`{_KEY_TAG}` = '{_safe_key(spec.key)}'", max_results=1
            )
            run_id = found[0].info.run_id if found else self._create_run(client, experiment_id, spec)
            data = found[0].data if found else None
            self._log_params(client, run_id, spec.params or {}, data)
            return str(run_id)

    def log(self, run_id: str, metrics: Sequence[MetricPoint], tags: Mapping[str, str]) -> None:
        """Write points in batches; MLflow keeps equal points once."""
        with self.answering() as client:
            from mlflow.entities import Metric, RunTag

            points = [Metric(m.name, m.value, int(m.at_s * 1000), m.step) for m in metrics]
            run_tags = [RunTag(key, value) for key, value in tags.items()]
            for start in range(0, max(len(points), 1), _MAX_METRICS_PER_CALL):
                batch = points[start : start + _MAX_METRICS_PER_CALL]
                if batch or run_tags:
                    client.log_batch(run_id, metrics=batch, tags=run_tags)
                run_tags = []

    def save_text(self, run_id: str, text: str, artifact_path: str) -> None:
        """Write the text below the run's artifacts."""
        with self.answering() as client:
            client.log_text(run_id, text, artifact_path)

    def save_file(self, run_id: str, path: Path, folder: str) -> None:
        """Copy a file or a folder below the run's artifacts."""
        with self.answering() as client:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), folder)
            else:
                client.log_artifact(run_id, str(path), folder)

    def finish(self, run_id: str, end_s: float, *, is_ok: bool) -> None:
        """End the run as FINISHED or FAILED."""
        with self.answering() as client:
            client.set_terminated(run_id, "FINISHED" if is_ok else "FAILED", int(end_s * 1000))

    def reopen(self, run_id: str) -> None:
        """Set the status back to RUNNING; MLflow keeps the last end time."""
        with self.answering() as client:
            client.update_run(run_id, status="RUNNING")

    @contextmanager
    def answering(self) -> Iterator[Any]:
        """Yield the client; whatever says that MLflow is away becomes a TrackingError."""
        with warnings.catch_warnings():
            # MLflow's own deprecations (SQLAlchemy's noload, pandas 3); they are not ours to mend.
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
            from requests.exceptions import RequestException
            from sqlalchemy.exc import SQLAlchemyError

            try:
                if self._client is None:
                    # Only now: importing MLflow sets its own levels.
                    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
                        logging.getLogger(name).setLevel(logging.ERROR)
                    self._client = MlflowClient(tracking_uri=self.tracking_uri)
                    if self._artifact_root is not None:
                        follow_home(self.tracking_uri, self._artifact_root)
                yield self._client
            except (MlflowException, RequestException, SQLAlchemyError, sqlite3.Error, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if isinstance(error, MlflowException) and error.error_code in _PERMANENT:
                    self._experiment_ids.clear()  # one of that name may be made or restored
                    raise RefusedError(f"MLflow at {self.tracking_uri} refuses: {reason}") from error
                raise TrackingError(f"MLflow at {self.tracking_uri} does not answer: {reason}") from error

    def _experiment_id(self, client: Any, name: str) -> str:
        if name not in self._experiment_ids:
            found = client.get_experiment_by_name(name)
            self._experiment_ids[name] = (
                found.experiment_id
                if found
                else client.create_experiment(name, artifact_location=self._artifact_location(name))
            )
            if found is None or _KIND_TAG not in found.tags:
                client.set_experiment_tag(self._experiment_ids[name], _KIND_TAG, _KIND)
        return self._experiment_ids[name]

    def _artifact_location(self, name: str) -> str | None:
        if self._artifact_root is None:
            return None
        return (self._artifact_root / safe_name(name)).resolve().as_uri()

    def _create_run(self, client: Any, experiment_id: str, spec: RunSpec) -> str:
        tags = {**(spec.tags or {}), _KEY_TAG: _safe_key(spec.key)}
        if spec.parent_run_id:
            tags[_PARENT_TAG] = spec.parent_run_id
        run = client.create_run(
            experiment_id, start_time=int(spec.start_s * 1000), tags=tags, run_name=spec.name
        )
        return str(run.info.run_id)

    def _log_params(self, client: Any, run_id: str, params: Mapping[str, str], data: Any) -> None:
        """Log what is new; MLflow refuses another value of a param, so a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag

        wanted = {name: value[:_MAX_PARAM_CHARS] for name, value in params.items()}
        known, tags = (data.params, data.tags) if data is not None else ({}, {})
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        now = {
            _CHANGED_TAG + name: value
            for name, value in wanted.items()
            if tags.get(_CHANGED_TAG + name, known.get(name, value)) != value
        }
        if new or now:
            client.log_batch(run_id, params=new, tags=[RunTag(name, value) for name, value in now.items()])


def _safe_key(key: str) -> str:
    """Return a key as it can stand in MLflow's filters, which know no escape for a quote."""
    return key if _PLAIN_KEY.fullmatch(key) else safe_name(key)


@dataclass(frozen=True, slots=True)
class ChildRecord:
    """One of several things that a step has measured by the same names: runs of their own, to compare."""

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did."""

    name: str
    started_s: float
    ended_s: float
    params: Mapping[str, object]
    metrics: Mapping[str, float]
    files: Mapping[str, Path] = field(default_factory=dict)  # folder in the run -> file or folder here
    tags: Mapping[str, str] = field(default_factory=dict)
    children: tuple[ChildRecord, ...] = ()


def log_step(tracker: Tracker, kind: str, record: StepRecord) -> str:
    """Track one step of that kind; raises TrackingError, and then it may simply be called again."""
    spec = RunSpec(
        key=f"{kind}:{record.name}:{record.started_s:.3f}",
        name=record.name,
        start_s=record.started_s,
        params={key: str(value) for key, value in record.params.items()},
        tags={"sentei.kind": kind, **record.tags},
    )
    run_id = tracker.ensure_run(EXPERIMENTS[kind], spec)
    tracker.log(run_id, _points(record.metrics, record.ended_s), {})
    for child in record.children:
        own = RunSpec(
            key=f"{spec.key}:{child.name}",
            name=child.name,
            start_s=record.started_s,
            parent_run_id=run_id,
            params=child.params,
            tags={"sentei.kind": f"{kind}-part", **child.tags},
        )
        child_id = tracker.ensure_run(EXPERIMENTS[kind], own)
        tracker.log(child_id, _points(child.metrics, record.ended_s), {})
        tracker.finish(child_id, record.ended_s, is_ok=True)
    for folder, path in record.files.items():
        tracker.save_file(run_id, path, folder)
    tracker.finish(run_id, record.ended_s, is_ok=True)
    return run_id


def _points(metrics: Mapping[str, float], at_s: float) -> list[MetricPoint]:
    return [
        MetricPoint(name, float(value), 0, at_s) for name, value in metrics.items() if math.isfinite(value)
    ]
