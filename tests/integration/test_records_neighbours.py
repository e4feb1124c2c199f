"""Records beside real neighbours: several processes on one store, and MLflow on SQLite that goes away."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.pipeline.tracking.mirror import Mirror
from sentei.pipeline.tracking.register import RegisterError, register_adapter
from sentei.pipeline.tracking.tracker import ChildRecord, MlflowTracker, RunSpec, StepRecord, log_step
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request

# MLflow on SQLite leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

ROOT = Path(__file__).resolve().parents[2]
NUM_PROCESSES, NUM_REQUESTS = 3, 40


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """One MLflow database for all tests of this module: making it takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return MlflowTracker(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


# What one process writes: the same sessions as all others, requests of its own.
WRITER = """
import sys
from sentei.monitors.store import Store
from tests.fakes_records import make_request
url, worker, num_requests = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store.open(url) as store:
    for i in range(num_requests):
        store.add_request(make_request(i, request_id=f"{worker}-{i}", session_id=f"s{i}"))
"""


def play(store: Store, rollout_id: str) -> None:
    """A promoted rollout."""
    start_rollout(store, POLICY, now_s=START_S, rollout_id=rollout_id)
    runner = RolloutRunner.open(store, rollout_id, RunnerOptions("me"))
    for second in range(15):
        for i in range(second * 8, second * 8 + 8):
            changes = {"at_s": START_S + second, "rollout_id": rollout_id, "request_id": f"{rollout_id}-{i}"}
            store.add_request(make_request(i, share=0.5, **changes))
            store.add_audit(make_audit(i, **changes))
        runner.tick(START_S + second + 0.5)


def test_processes_share_one_store(tmp_path: Path) -> None:
    """Several processes open, create and write at once: no row is lost, and each session has one unit."""
    url = f"sqlite:///{tmp_path}/state.db"
    command = [sys.executable, "-P", "-c", WRITER, url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    workers = [
        subprocess.Popen([*command, str(n), str(NUM_REQUESTS)], cwd=tmp_path, env=environment)
        for n in range(NUM_PROCESSES)
    ]

    assert [worker.wait(120) for worker in workers] == [0] * NUM_PROCESSES
    with Store.open(url) as store:
        rows = store.read_requests(ROLLOUT)
    assert len(rows) == NUM_PROCESSES * NUM_REQUESTS
    assert sum(row["is_unit"] for row in rows) == NUM_REQUESTS
    assert len({row["seq"] for row in rows}) == len(rows)


def test_threads_share_one_store_object(store: Store) -> None:
    """Tick, drift check and mirror run in threads of one process."""
    threads = [
        threading.Thread(target=lambda n=n: [store.add_request(make_request(100 * n + i)) for i in range(20)])
        for n in range(4)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(store.read_requests(ROLLOUT)) == 80


def test_rollout_lands_in_mlflow_with_stages_charts_and_reports(store: Store, tracker: MlflowTracker) -> None:
    """What a person opens: a parent run, its stages, share over time, the comparison report."""
    play(store, "shown")

    assert Mirror(store, tracker).run_once().reason == ""

    with tracker.answering() as client:
        experiment = client.get_experiment_by_name("sentei-rollouts")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        parent = runs["shown: promoted"].info.run_id
        course = runs["course of events"]
        shares = [metric.value for metric in client.get_metric_history(course.info.run_id, "policy/share")]
        report = Path(client.download_artifacts(parent, "reports/comparison.json"))
    assert {"shadow", "half", "full"} <= set(runs)
    assert {run.data.tags["mlflow.parentRunId"] for run in (course, runs["full"])} == {parent}
    assert (min(shares), max(shares)) == (0.0, 0.95)
    assert json.loads(report.read_text())["outcome"] == "promoted"


def test_locked_mlflow_does_not_stop_the_rollout(
    store: Store, tracker: MlflowTracker, tmp_path: Path
) -> None:
    """While another process holds MLflow's database decisions go on; afterwards the mirror catches up."""
    path = tracker.tracking_uri.removeprefix("sqlite:///")
    impatient = MlflowTracker(f"sqlite:///{path}?timeout=0.2", tmp_path / "artifacts")
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    play(store, "locked")

    away = Mirror(store, impatient).run_once()
    blocker.execute("ROLLBACK")
    blocker.close()
    back = Mirror(store, impatient).run_once()

    assert (away.num_events, "does not answer" in away.reason) == (0, True)
    assert back.reason == ""
    assert back.num_events > 0


def test_refused_connection_does_not_stop_the_rollout(store: Store) -> None:
    """A tracking server that is down gives a reason within seconds."""
    play(store, "refused")

    result = Mirror(store, MlflowTracker("http://127.0.0.1:9")).run_once()

    assert result.num_events == 0
    assert "http://127.0.0.1:9 does not answer" in result.reason


def test_offline_step_is_one_run(tracker: MlflowTracker, tmp_path: Path) -> None:
    """An evaluation leaves params, the metrics that are numbers, and its files."""
    (tmp_path / "tradeoff.html").write_text("<html>")
    record = StepRecord(
        name="pocket",
        started_s=1.0,
        ended_s=2.0,
        params={"tokens": 8192},
        metrics={"nll_delta": 0.01, "loss": float("nan")},
        files={"plots": tmp_path / "tradeoff.html"},
    )

    run_id = log_step(tracker, "evaluate", record)

    with tracker.answering() as client:
        run = client.get_run(run_id)
        names = {item.path for item in client.list_artifacts(run_id)}
    assert (run.data.params["tokens"], run.data.metrics["nll_delta"], run.info.status) == (
        "8192",
        0.01,
        "FINISHED",
    )
    assert "loss" not in run.data.metrics
    assert names == {"plots"}


def test_the_parts_of_a_step_are_runs_below_it(tracker: MlflowTracker) -> None:
    """Dense and rungs have runs of their own, with the same names, found again by their parent."""
    parts = tuple(
        ChildRecord(name, {"rung": name}, {"gain/model_time_ratio": ratio}, {"mlflow.note.content": name})
        for name, ratio in (("dense", 1.0), ("bold", 0.6))
    )
    record = StepRecord("in parts", 1.0, 2.0, {}, {}, tags={"corpus_sha256": "ab"}, children=parts)

    runs = [log_step(tracker, "evaluate", record) for _ in range(2)]

    assert runs[0] == runs[1]
    with tracker.answering() as client:
        parent = client.get_run(runs[0])
        experiment = client.get_experiment(parent.info.experiment_id)
        below = client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{runs[0]}'"
        )
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert parent.data.tags["corpus_sha256"] == "ab"
    assert {run.info.run_name: run.data.metrics for run in below} == {
        "dense": {"gain/model_time_ratio": 1.0},
        "bold": {"gain/model_time_ratio": 0.6},
    }
    assert {run.data.tags["mlflow.note.content"] for run in below} == {"dense", "bold"}


def test_a_run_is_renamed_by_its_tag(tracker: MlflowTracker) -> None:
    """The verdict of a rollout stands in the name of its run; its key finds it as before."""
    spec = RunSpec("rollout:a", "a", 1.0)
    run_id = tracker.ensure_run("sentei-rollouts", spec)

    tracker.log(run_id, (), {"mlflow.runName": "a: promoted"})

    assert tracker.ensure_run("sentei-rollouts", spec) == run_id
    with tracker.answering() as client:
        assert client.get_run(run_id).info.run_name == "a: promoted"


def test_adapter_is_registered_under_its_alias(tracker: MlflowTracker, tmp_path: Path) -> None:
    """Each registration is a new version; the alias moves; the files come back as they were."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"block_size": 64, "tree": {"a": 1}}')
    (folder / "ladder.json").write_text("{}")
    (folder / "scorer.safetensors").write_bytes(b"weights")

    first = register_adapter(tracker, folder, name="pocket-sparse", now_s=1.0)
    second = register_adapter(tracker, folder, name="pocket-sparse", alias="champion", now_s=2.0)

    with tracker.answering() as client:
        champion = client.get_model_version_by_alias("pocket-sparse", "champion")
        candidate = client.get_model_version_by_alias("pocket-sparse", "candidate")
        files = Path(client.download_artifacts(second.run_id, "adapter"))
    assert (first.version, second.version) == ("1", "2")
    assert [str(version.version) for version in (candidate, champion)] == ["1", "2"]
    assert champion.tags["manifest.block_size"] == "64"
    assert (files / "scorer.safetensors").read_bytes() == b"weights"


def test_folder_that_is_no_adapter_is_refused(tracker: MlflowTracker, tmp_path: Path) -> None:
    """What is missing is named, and an unknown alias is refused."""
    with pytest.raises(RegisterError, match=r"manifest\.json, ladder\.json, scorer\.safetensors is missing"):
        register_adapter(tracker, tmp_path, name="x")
    with pytest.raises(RegisterError, match="use one of candidate, champion"):
        register_adapter(tracker, tmp_path, name="x", alias="latest")
