"""What every tracker owes: runs found by key, points kept once, artifacts, TrackingError while it is away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sentei.pipeline.tracking.tracker import (
    MetricPoint,
    MlflowTracker,
    RefusedError,
    RunSpec,
    Tracker,
    TrackingError,
)
from tests.fakes_records import FakeTracker

# MLflow on SQLite leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

SPEC = RunSpec("rollout:a", "first", 10.0, params={"rung": "medium"}, tags={"sentei.kind": "rollout"})


@dataclass(frozen=True)
class Case:
    """A tracker and a look into it."""

    tracker: Tracker
    points: Callable[[str, str], list[tuple[int, float]]]
    tags: Callable[[str], dict[str, str]]
    artifact: Callable[[str, str], str]
    status: Callable[[str], str]
    away: Tracker


def fake_case() -> Case:
    """The tracker in memory."""
    fake = FakeTracker()
    return Case(
        tracker=fake,
        points=lambda run, name: sorted(
            (m.step, m.value) for m in fake.runs[run]["metrics"] if m.name == name
        ),
        tags=lambda run: fake.runs[run]["tags"],
        artifact=lambda run, path: fake.runs[run]["artifacts"][path],
        status=lambda run: str(fake.runs[run]["status"]),
        away=FakeTracker(failures=10**9),
    )


def mlflow_case(folder: Path) -> Case:
    """MLflow on a SQLite file."""
    tracker = MlflowTracker(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")

    def ask(question: Callable[[Any], Any]) -> Any:
        with tracker.answering() as client:
            return question(client)

    def points(run: str, name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in ask(lambda c: c.get_metric_history(run, name)))

    return Case(
        tracker=tracker,
        points=points,
        tags=lambda run: dict(ask(lambda c: c.get_run(run).data.tags)),
        artifact=lambda run, path: Path(ask(lambda c: c.download_artifacts(run, path))).read_text(),
        status=lambda run: str(ask(lambda c: c.get_run(run).info.status)),
        away=MlflowTracker("http://127.0.0.1:9"),
    )


@pytest.fixture(scope="module", params=["fake", "mlflow"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each tracker in turn; MLflow's database takes seconds to make, so tests share it."""
    return fake_case() if request.param == "fake" else mlflow_case(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """An experiment of the test's own."""
    return str(request.node.originalname)


def test_run_is_found_by_its_key(case: Case, experiment: str) -> None:
    """Asking again gives the same run; another key gives another one."""
    first = case.tracker.ensure_run(experiment, SPEC)

    assert case.tracker.ensure_run(experiment, SPEC) == first
    assert (
        case.tracker.ensure_run(experiment, RunSpec("rollout:b", "second", 11.0, parent_run_id=first))
        != first
    )
    assert case.tags(first)["sentei.kind"] == "rollout"


def test_equal_points_are_kept_once(case: Case, experiment: str) -> None:
    """A mirror that repeats itself leaves no doubles."""
    run = case.tracker.ensure_run(experiment, SPEC)
    points = [MetricPoint("policy/share", 0.1 * i, i, 10.0 + i) for i in range(3)]

    for _ in range(2):
        case.tracker.log(run, points, {"phase": "running"})

    assert case.points(run, "policy/share") == [(i, 0.1 * i) for i in range(3)]
    assert case.tags(run)["phase"] == "running"


def test_texts_files_and_folders_are_kept(case: Case, experiment: str, tmp_path: Path) -> None:
    """Artifacts come back as they were saved; a second save of the same path replaces the first."""
    run = case.tracker.ensure_run(experiment, SPEC)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ladder.json").write_text("{}")
    (tmp_path / "drift.html").write_text("<html>")

    for text in ("old", "new"):
        case.tracker.save_text(run, text, "reports/comparison.html")
    case.tracker.save_file(run, tmp_path / "drift.html", "evidently")
    case.tracker.save_file(run, tmp_path / "in", "adapter")

    assert case.artifact(run, "reports/comparison.html") == "new"
    assert case.artifact(run, "evidently/drift.html") == "<html>"
    assert case.artifact(run, "adapter/ladder.json") == "{}"


def test_run_ends_well_or_not_and_may_go_on(case: Case, experiment: str) -> None:
    """An ended run takes more points: a retried rollout goes on in the same run."""
    run = case.tracker.ensure_run(experiment, SPEC)

    case.tracker.finish(run, 20.0, is_ok=False)
    failed = case.status(run)
    case.tracker.log(run, [MetricPoint("m", 1.0, 1, 21.0)], {})
    case.tracker.finish(run, 22.0, is_ok=True)

    assert (failed, case.status(run)) == ("FAILED", "FINISHED")
    assert case.points(run, "m") == [(1, 1.0)]


def test_an_ended_run_is_opened_again_and_a_tag_is_emptied(case: Case, experiment: str) -> None:
    """What stood no longer stands; to open what is open changes nothing, and it may end once more."""
    run = case.tracker.ensure_run(experiment, SPEC)
    case.tracker.log(run, (), {"outcome": "held"})
    case.tracker.finish(run, 20.0, is_ok=True)

    case.tracker.reopen(run)
    case.tracker.reopen(run)
    case.tracker.log(run, (), {"outcome": ""})
    opened, outcome = case.status(run), case.tags(run)["outcome"]
    case.tracker.finish(run, 30.0, is_ok=False)

    assert (opened, outcome, case.status(run)) == ("RUNNING", "", "FAILED")


def test_a_changed_param_is_a_tag(case: Case, experiment: str) -> None:
    """The first value stays, the newest is a tag, also when it changes back; nothing is refused."""
    for value in ("1", "2", "1"):
        spec = RunSpec("rollout:a", "first", 10.0, params={"hold_min_s": value, "rung": "mild"})
        run = case.tracker.ensure_run(experiment, spec)
        seen = case.tags(run).get("changed.hold_min_s")
        assert seen == (None if value == "1" and seen is None else value)

    assert case.tags(run)["changed.hold_min_s"] == "1"
    assert "changed.rung" not in case.tags(run)


def test_tracker_that_is_away_says_so(case: Case, experiment: str) -> None:
    """No connection is one error of ours, whatever the library raises."""
    with pytest.raises(TrackingError):
        case.away.ensure_run(experiment, SPEC)


def test_a_deleted_experiment_is_refused_and_not_away(tmp_path: Path) -> None:
    """What MLflow will never take is told apart, also for a run that was there; restored, it goes on."""
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts")
    run = tracker.ensure_run("gone", SPEC)
    with tracker.answering() as client:
        experiment_id = client.get_experiment_by_name("gone").experiment_id
        client.delete_experiment(experiment_id)

    for attempt in (
        lambda: tracker.ensure_run("gone", RunSpec("rollout:b", "second", 11.0)),
        lambda: tracker.log(run, [MetricPoint("m", 1.0, 1, 21.0)], {}),
    ):
        with pytest.raises(RefusedError, match=r"refuses: .*active"):
            attempt()

    with tracker.answering() as client:
        client.restore_experiment(experiment_id)
    assert tracker.ensure_run("gone", SPEC) == run
