"""A home that is copied or moved takes its tracked runs with it, and no name leads out of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from sentei.pipeline.home import Home
from sentei.pipeline.steps import evaluation_metrics
from sentei.pipeline.tracking.register import register_adapter
from sentei.pipeline.tracking.tracker import MlflowTracker, RunSpec, StepRecord, log_step

# MLflow on SQLite leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def tracker_of(home: Home) -> MlflowTracker:
    """The tracker that every command opens."""
    return MlflowTracker(home.mlflow_uri, home.mlflow_artifacts)


def record(path: Path, *, name: str, at_s: float, metrics: dict[str, float] | None = None) -> StepRecord:
    """A finished step with one file."""
    return StepRecord(name, at_s, at_s + 1, {"model": name}, metrics or {"loss": 0.5}, {"files": path})


def all_files(folder: Path) -> set[Path]:
    """Every file below a folder."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with a tracked step and a registered adapter; MLflow's database takes seconds to make."""
    home = Home(tmp_path_factory.mktemp("homes") / "it's first").create()
    path = home.root / "answers.jsonl"
    path.write_text("one")
    folder = home.adapters / "pocket"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "ladder.json", "scorer.safetensors"):
        (folder / name).write_text("{}")
    tracker = tracker_of(home)
    log_step(tracker, "distill", record(path, name="first", at_s=1.0))
    register_adapter(tracker, folder, name="sentei-pocket", now_s=2.0)
    return home


def test_a_copy_writes_into_itself_and_reads_its_own(home: Home, tmp_path: Path) -> None:
    """What is tracked in a copy stays in it; what was tracked before is read from it, the original gone."""
    original, copy = Home(tmp_path / "original"), Home(tmp_path / "copy")
    shutil.copytree(home.root, original.root)
    with tracker_of(original).answering():
        pass  # it is used once where it was
    shutil.copytree(original.root, copy.root)
    before = all_files(original.root)

    run_id = log_step(
        tracker_of(copy), "distill", record(copy.root / "answers.jsonl", name="second", at_s=9.0)
    )

    assert all_files(original.root) == before
    shutil.rmtree(original.root)
    with tracker_of(copy).answering() as client:
        version = client.get_model_version_by_alias("sentei-pocket", "candidate")
        files = [
            client.list_artifacts(run, path) for run, path in ((run_id, "files"), (version.run_id, "adapter"))
        ]
        source = client.get_model_version_download_uri("sentei-pocket", version.version)
    assert [len(found) for found in files] == [1, 3]
    assert source.startswith(copy.mlflow_artifacts.as_uri())
    assert home.root.as_uri() not in source


@pytest.mark.parametrize("experiment", ["../../outside", "/tmp/outside", "a/b", "it's mine"])
def test_no_experiment_leads_out_of_the_home(home: Home, experiment: str) -> None:
    """Whatever a policy calls its experiment, MLflow has it by that name and its files are in the home."""
    tracker = tracker_of(home)

    run_id = tracker.ensure_run(experiment, RunSpec(f"rollout:{experiment}", "run", 1.0))
    tracker.save_text(run_id, "text", "policy.yaml")

    with tracker.answering() as client:
        place = client.get_run(run_id).info.artifact_uri
        assert client.get_experiment_by_name(experiment) is not None
    inside = Path(unquote(place.removeprefix("file://"))).resolve()
    assert inside.relative_to(home.mlflow_artifacts.resolve())
    assert (inside / "policy.yaml").read_text() == "text"


@pytest.mark.parametrize(
    "name", ["it's mine", "legal/", "a//b", "x" * 300, '"both\' of them"', "line\nbreak"]
)
def test_no_name_loses_a_run(home: Home, name: str) -> None:
    """A step of any name, with the user's tasks of that name, is one finished run with all its numbers."""
    task = {"task": name, "mean": 0.5}
    rung = {
        "rung": "bold",
        "recall": {"mean": 1.0, "cells": []},
        "user_tasks": {"mean": 0.5, "tasks": [task]},
    }
    metrics = evaluation_metrics({"rungs": [rung]})
    tracker = tracker_of(home)

    found = {
        log_step(
            tracker, "evaluate", record(home.root / "answers.jsonl", name=name, at_s=3.0, metrics=metrics)
        )
        for _ in range(2)
    }

    assert len(found) == 1
    with tracker.answering() as client:
        run = client.get_run(found.pop())
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics.values()) == {0.5, 1.0}
    assert len(run.data.metrics) == len(metrics) == 3
