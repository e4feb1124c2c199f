"""The offline steps as commands run them: do the work, keep the result at home, track it in MLflow.

Tracking never loses work: a tracker that does not answer is reported, and the step's result stays.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sentei.kernels.hf.adapter import MANIFEST_FILE, Adapter, load_adapter
from sentei.kernels.hf.ladder import Ladder
from sentei.pipeline.evaluation.evaluate import EvaluateOptions, Evaluation, evaluate
from sentei.pipeline.evaluation.user_tasks import save_answers
from sentei.pipeline.experiments.joint import JointOptions, JointReport, joint
from sentei.pipeline.home import Home, safe_name
from sentei.pipeline.ladder.calibrate import CalibrateOptions, calibrate
from sentei.pipeline.ladder.distill import DistillOptions, distill
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.plain import to_plain
from sentei.pipeline.progress import Progress
from sentei.pipeline.reports.evaluation_page import save_evaluation_page
from sentei.pipeline.reports.plots import save_trade_off
from sentei.pipeline.reports.rollout_report import EVALUATION_FILE
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.tracking.comparison import (
    NOTE_TAG,
    describe_evaluation,
    describe_rung,
    rung_figures,
    rung_params,
)
from sentei.pipeline.tracking.tracker import ChildRecord, MlflowTracker, StepRecord, TrackingError, log_step

logger = logging.getLogger(__name__)
_PLAIN_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_. -]{0,78}[A-Za-z0-9_])?")
PAGE_FILE = "evaluation.html"
ANSWERS_FILE = "answers.jsonl"
TIMINGS_FILE = "timings.json"
JOINT_FILE = "joint.json"
TRADEOFF_FILE = "tradeoff.html"


@dataclass(frozen=True, slots=True)
class Workbench:
    """A loaded model, its corpus and where its adapter lives."""

    loaded: LoadedModel
    corpus: Corpus
    home: Home

    @property
    def adapter_dir(self) -> Path:
        """The folder of this model's adapter."""
        return self.home.adapter_dir(self.loaded.name, self.loaded.fingerprint.weights_sha256)

    def adapter(self) -> Adapter:
        """Load the adapter made before; a missing one names the command that makes it."""
        if not (self.adapter_dir / MANIFEST_FILE).is_file():
            raise FileNotFoundError(
                f"no adapter in {self.adapter_dir}; make one with: sentei distill --model {self.loaded.name}"
            )
        return load_adapter(self.adapter_dir, self.loaded.model)


def distill_step(bench: Workbench, options: DistillOptions, progress: Progress) -> Adapter:
    """Distil the scorers, save the adapter, track the run."""
    started_s = time.time()
    adapter = distill(bench.loaded, bench.corpus, bench.adapter_dir, options, progress)
    metrics = {f"distill/{name}": value for name, value in adapter.manifest.figures.items()}
    _track(bench, "distill", started_s, to_plain(options), metrics, files={"adapter": bench.adapter_dir})
    return adapter


def joint_step(bench: Workbench, options: JointOptions, progress: Progress) -> JointReport:
    """Train low-rank weights under a rung's mask, save them with the adapter, compare, track the run."""
    started_s = time.time()
    _, report = joint(bench.loaded, bench.adapter(), bench.corpus, options, progress)
    saved = bench.adapter_dir / JOINT_FILE
    saved.write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    metrics = {f"joint/{name}": value for name, value in report.figures().items()}
    _track(bench, "joint", started_s, to_plain(options), metrics, files={"adapter": bench.adapter_dir})
    return report


def calibrate_step(bench: Workbench, options: CalibrateOptions, progress: Progress) -> Ladder:
    """Calibrate the ladder, save it with the adapter, track the run."""
    started_s = time.time()
    ladder = calibrate(bench.loaded, bench.adapter(), bench.corpus, options, progress)
    timings = {"calibrate_s": time.time() - started_s}
    (bench.adapter_dir / TIMINGS_FILE).write_text(json.dumps(timings), encoding="utf-8")
    metrics: dict[str, float] = {}
    for rung in ladder.rungs[1:]:
        figures = {
            "bound_dropped_mass": rung.bound_dropped_mass,
            "target_density": rung.target_density,
            "target_nll": rung.target_nll,
            "target_speed": rung.target_speed,
            **(to_plain(rung.verified) or {}),
        }
        metrics |= dict(_flatten(f"calibrate/{rung.id}", figures))
    _track(bench, "calibrate", started_s, to_plain(options), metrics, files={"adapter": bench.adapter_dir})
    return ladder


def evaluate_step(bench: Workbench, options: EvaluateOptions, progress: Progress) -> Evaluation:
    """Evaluate every rung beside dense and the baselines, save JSON, page and plot, track the run."""
    started_s = time.time()
    options = replace(options, setup_s=_read_calibrate_s(bench.adapter_dir))
    evaluation = evaluate(bench.loaded, bench.adapter(), bench.corpus, options, progress)
    document = evaluation.to_dict()
    saved = bench.adapter_dir / EVALUATION_FILE
    saved.write_text(json.dumps(document, indent=2), encoding="utf-8")
    plot = save_trade_off(evaluation, bench.adapter_dir / TRADEOFF_FILE)
    page = save_evaluation_page(document, bench.adapter_dir / PAGE_FILE, trade_off=plot.name)
    files = {"evaluation": saved, "plots": plot, "page": page}
    if evaluation.user_answers:
        files["answers"] = save_answers(evaluation.user_answers, bench.adapter_dir / ANSWERS_FILE)
    record = _record(bench, started_s, to_plain(options), evaluation_metrics(document), files=files)
    _log(
        bench,
        "evaluate",
        replace(
            record,
            children=_rung_runs(document),
            tags={**record.tags, NOTE_TAG: describe_evaluation(document)},
        ),
    )
    return evaluation


def _rung_runs(document: Mapping[str, Any]) -> tuple[ChildRecord, ...]:
    """Dense and every rung as runs of their own, by the names that rollouts have, too."""
    runs = []
    for rung in document["rungs"]:
        figures = rung_figures(document, rung)
        note = describe_rung(figures, rung["rung"], document["window_tokens"])
        runs.append(ChildRecord(rung["rung"], rung_params(rung, figures), figures, {NOTE_TAG: note}))
    return tuple(runs)


def _read_calibrate_s(folder: Path) -> float | None:
    path = folder / TIMINGS_FILE
    if not path.is_file():
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))["calibrate_s"])


def read_evaluation(bench: Workbench) -> dict[str, Any] | None:
    """Return the newest evaluation of this model's adapter, or None."""
    path = bench.adapter_dir / EVALUATION_FILE
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def evaluation_metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of an evaluation's rungs under a path such as evaluate/bold/recall/mean."""
    metrics: dict[str, float] = {}
    for rung in document["rungs"]:
        values = dict(rung)
        recall, user = values.pop("recall"), values.pop("user_tasks")
        values["recall"] = {key: value for key, value in recall.items() if key != "cells"}
        for cell in recall["cells"]:
            values.setdefault(f"tasks_{cell['prompt_tokens']}_tokens", {})[cell["kind"]] = cell["right"]
        if user is not None:
            values["user_tasks"] = {
                "mean": user["mean"],
                "tasks": {row["task"]: row for row in user["tasks"]},
            }
        metrics |= dict(_flatten(f"evaluate/{rung['rung']}", values))
    return metrics


def _flatten(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{path}/{_part(str(key))}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _part(key: str) -> str:
    """Return a key as one part of a metric's name: MLflow takes these signs, and no empty or dotted part."""
    return key if _PLAIN_PART.fullmatch(key) else safe_name(key)


def _track(
    bench: Workbench,
    kind: str,
    started_s: float,
    options: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    files: Mapping[str, Path] | None = None,
) -> None:
    _log(bench, kind, _record(bench, started_s, options, metrics, files=files or {}))


def _record(
    bench: Workbench,
    started_s: float,
    options: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    files: Mapping[str, Path],
) -> StepRecord:
    return StepRecord(
        name=bench.loaded.name,
        started_s=started_s,
        ended_s=time.time(),
        params={"model": bench.loaded.name, "corpus": bench.corpus.name} | dict(options),
        metrics=metrics,
        files=files,
        tags={"corpus_sha256": bench.corpus.digest},
    )


def _log(bench: Workbench, kind: str, record: StepRecord) -> None:
    tracker = MlflowTracker(bench.home.create().mlflow_uri, bench.home.mlflow_artifacts)
    try:
        log_step(tracker, kind, record)
    except TrackingError as error:
        logger.warning("the %s run was not tracked (%s); its result is in %s", kind, error, bench.adapter_dir)
