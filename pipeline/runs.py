"""One tracked run per offline step: distill, joint, calibrate, evaluate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sentei.pipeline.tracking import MetricPoint, RunSpec, Tracker

EXPERIMENTS = {kind: f"sentei-{kind}" for kind in ("distill", "joint", "calibrate", "evaluate")}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did; a metric with several values is a curve over steps."""

    name: str
    started_s: float
    ended_s: float
    params: Mapping[str, object]
    metrics: Mapping[str, float | Sequence[float]]
    files: Mapping[str, Path] = field(default_factory=dict)  # folder in the run -> file or folder here
    texts: Mapping[str, str] = field(default_factory=dict)  # path in the run -> text
    tags: Mapping[str, str] = field(default_factory=dict)


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
    points = [
        MetricPoint(name, float(value), step, record.ended_s)
        for name, values in record.metrics.items()
        for step, value in enumerate(values if isinstance(values, Sequence) else [values])
        if math.isfinite(value)
    ]
    tracker.log(run_id, points, {})
    for folder, path in record.files.items():
        tracker.save_file(run_id, path, folder)
    for artifact_path, text in record.texts.items():
        tracker.save_text(run_id, text, artifact_path)
    tracker.finish(run_id, record.ended_s, is_ok=True)
    return run_id
