"""The mirror: the whole story reaches the tracker, however often it was away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sentei.monitors.records import DriftResult
from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.pipeline.tracking.comparison import GAIN_PROVEN, MODEL_TIME, MODEL_TIME_RATIO, SAFETY_PROVEN
from sentei.pipeline.tracking.mirror import Mirror
from tests.fakes_records import (
    POLICY,
    ROLLOUT,
    START_S,
    WITH_BENEFIT,
    FakeTracker,
    make_audit,
    make_request,
)

PARENT = f"sentei-rollouts/rollout:{ROLLOUT}"
COURSE = f"{PARENT}:course"
SHADOW = f"{PARENT}:stage:shadow"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def play(
    store: Store, seconds: int, mirror: Mirror | None = None, *, policy: str = POLICY, **changes: Any
) -> RolloutRunner:
    """Traffic and ticks; the mirror runs after each tick if there is one."""
    start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT, about={"model": "pocket"})
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    for second in range(seconds):
        for i in range(second * 8, second * 8 + 8):
            store.add_request(make_request(i, at_s=START_S + second, share=0.5))
            store.add_audit(make_audit(i, at_s=START_S + second, **changes))
        runner.tick(START_S + second + 0.5)
        if mirror:
            mirror.run_once()
    return runner


def test_rollout_is_one_run_with_a_run_per_stage(store: Store) -> None:
    """A promoted rollout: parent with params and report, children in order, all ended."""
    play(store, 15)
    tracker = FakeTracker()

    result = Mirror(store, tracker).run_once()

    parent = tracker.runs[PARENT]
    assert result.reason == ""
    assert parent["params"]["model"] == "pocket"
    assert (parent["status"], parent["tags"]["outcome"], parent["name"]) == ("FINISHED", "promoted", ROLLOUT)
    assert parent["tags"]["mlflow.runName"] == f"{ROLLOUT}: promoted"
    assert set(parent["artifacts"]) == {
        "policy/policy.yaml",
        "reports/comparison.html",
        "reports/comparison.json",
    }
    children = [run for run in tracker.runs.values() if run["parent"] == PARENT]
    assert [child["name"] for child in children] == ["course of events", "shadow", "half", "full"]
    assert [child["status"] for child in children] == ["FINISHED"] * 4


def test_rollouts_are_compared_by_figures_and_words_and_not_by_digests(store: Store) -> None:
    """Params: policy, rung, model. Metrics: the names that rungs have, too. Digests and people: tags."""
    play(store, 15)
    tracker = FakeTracker()
    Mirror(store, tracker).run_once()

    run = tracker.runs[PARENT]
    figures = {m.name: m.value for m in run["metrics"]}

    assert run["params"] == {"policy": "test", "rung": "medium", "model": "pocket"}
    assert len(run["tags"]["policy_digest"]) == 64
    assert {m.step for m in run["metrics"]} == {0}
    assert figures[MODEL_TIME_RATIO] == pytest.approx(0.6)
    assert (figures[GAIN_PROVEN], figures[SAFETY_PROVEN]) == (0.0, 1.0)  # this policy asks for no gain
    assert figures[f"variants/long/sparse/{MODEL_TIME}"] == pytest.approx(0.6)
    assert figures[f"variants/long/dense/{MODEL_TIME}"] == pytest.approx(1.0)
    note = run["tags"]["mlflow.note.content"]
    assert note.startswith("**Promoted.** Sparse attention passed every gate")
    assert "It is safe: agree is proven within its bound." in note


def test_share_and_evidence_are_charts_over_events(store: Store) -> None:
    """Every event is one step with the share, the evidence and the means of what it has read."""
    play(store, 15)
    tracker = FakeTracker()
    Mirror(store, tracker).run_once()

    metrics = tracker.runs[COURSE]["metrics"]

    shares = [m.value for m in sorted((m for m in metrics if m.name == "policy/share"), key=lambda m: m.step)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 0.95)
    names = {m.name for m in metrics}
    assert {"evidence/agree/long/log_e_safe", "evidence/agree/long/mean"} <= names
    assert {"quality/kl", "latency/ttft_ms_sparse", "serve/failed_share_sparse"} <= names


def test_rolled_back_rollout_is_a_failed_run_that_names_the_guardrail(store: Store) -> None:
    """The runs show at a glance that it failed, and by what."""
    play(store, 10, token_disagreement=0.6)
    tracker = FakeTracker()

    Mirror(store, tracker).run_once()

    tags = tracker.runs[PARENT]["tags"]
    assert (tags["outcome"], tags["by"]) == ("rolled_back", "agree")
    assert tracker.runs[PARENT]["status"] == "FAILED"
    assert tracker.runs[f"sentei-rollouts/rollout:{ROLLOUT}:stage:shadow:0"]["status"] == "FAILED"


@pytest.mark.parametrize("is_live", [True, False])
def test_a_resumed_rollout_is_no_longer_told_as_held(store: Store, is_live: bool) -> None:
    """Tags, name, description and status follow what stands, mirrored as it happens or all at once."""
    tracker = FakeTracker()
    mirror = Mirror(store, tracker)
    runner = play(store, 12, mirror if is_live else None, policy=WITH_BENEFIT, sparse_compute_s=1.3)
    held = dict(tracker.runs[PARENT]["tags"]) if is_live else None
    store.add_command(ROLLOUT, "resume", by="ann", at_s=START_S + 12)
    runner.tick(START_S + 12.5)

    assert mirror.run_once().reason == ""

    if held is not None:
        assert (held["outcome"], held["decided"], held["by"]) == ("held", "held", "compute")
        assert held["mlflow.runName"] == f"{ROLLOUT}: held: no gain"
    run = tracker.runs[PARENT]
    tags = run["tags"]
    assert (tags["outcome"], tags["by"], tags["decided"], tags["phase"]) == ("", "", "running", "running")
    assert tags["mlflow.runName"] == f"{ROLLOUT}: still running"
    assert tags["mlflow.note.content"].startswith("**Still running.** Not decided yet")
    assert [tracker.runs[key]["status"] for key in (PARENT, COURSE, f"{SHADOW}:0")] == ["RUNNING"] * 3
    assert tracker.runs[f"{SHADOW}:0"]["tags"]["outcome"] == ""


@pytest.mark.parametrize("is_live", [True, False])
def test_a_retried_rollout_is_no_longer_told_as_rolled_back(store: Store, is_live: bool) -> None:
    """The rollout goes on in the same run; the stage in which its first try failed stays failed."""
    tracker = FakeTracker()
    mirror = Mirror(store, tracker)
    retry = POLICY + "  rollback: {retry: {max: 3, cool_off: 0s}}\n"
    runner = play(store, 10, mirror if is_live else None, policy=retry, token_disagreement=0.6)
    store.add_command(ROLLOUT, "retry", by="ann", at_s=START_S + 11)
    runner.tick(START_S + 12)

    assert mirror.run_once().reason == ""

    tags = tracker.runs[PARENT]["tags"]
    assert (tags["outcome"], tags["by"], tags["decided"]) == ("", "", "running")
    assert tags["mlflow.runName"] == f"{ROLLOUT}: still running"
    assert [tracker.runs[key]["status"] for key in (PARENT, COURSE, f"{SHADOW}:1")] == ["RUNNING"] * 3
    failed = tracker.runs[f"{SHADOW}:0"]
    assert (failed["status"], failed["tags"]["outcome"], failed["tags"]["by"]) == (
        "FAILED",
        "rolled_back",
        "agree",
    )


def test_the_rung_of_a_rollout_is_the_one_that_it_reached(store: Store) -> None:
    """The policy's last rung is bold; this rollout failed at the mild one, and before that names no rung."""
    two = POLICY.replace("ladder: [{id: medium}]", "ladder: [{id: medium}, {id: bold}]").replace(
        "full, share: 95%, rung: medium, bake: 2s}\n  advance:",
        "full, share: 95%, rung: medium}\n    - {id: bold, share: 95%, rung: bold, bake: 2s}\n  advance:",
    )
    tracker = FakeTracker()
    mirror = Mirror(store, tracker)
    runner = play(store, 1, mirror, policy=two)
    begun = dict(tracker.runs[PARENT]["params"])
    store.add_command(ROLLOUT, "abort", by="ann", at_s=START_S + 2)
    runner.tick(START_S + 2.5)

    mirror.run_once()

    assert "rung" not in begun
    assert tracker.runs[PARENT]["params"]["rung"] == "medium"


@pytest.mark.parametrize("failures", [1, 2, 5, 17])
def test_tracker_that_was_away_ends_with_the_same_content(tmp_path: Path, failures: int) -> None:
    """Ticks go on while the tracker fails, at any call; in the end it holds what it would have held."""
    contents = []
    for num_failures in (0, failures):
        tracker = FakeTracker(num_failures)
        with Store.open(f"sqlite:///{tmp_path}/{num_failures}.db") as store:
            play(store, 15, Mirror(store, tracker))
            while Mirror(store, tracker).run_once().reason:
                pass
        contents.append(tracker.runs)

    assert contents[0] == contents[1]


def test_tracker_that_is_away_gives_a_reason_and_keeps_the_cursor(store: Store) -> None:
    """Nothing is skipped: the next run begins where this one could not."""
    play(store, 3)
    tracker = FakeTracker(failures=1)
    mirror = Mirror(store, tracker)

    away, back, idle = mirror.run_once(), mirror.run_once(), mirror.run_once()

    assert (away.num_events, away.reason) == (0, "the fake tracker is away")
    assert back.num_events > 0
    assert (idle.num_events, idle.reason) == (0, "")


def test_mirror_of_a_new_process_goes_on(store: Store) -> None:
    """The cursor is in the store: a restarted mirror repeats nothing."""
    play(store, 3)
    tracker = FakeTracker()
    Mirror(store, tracker).run_once()

    assert Mirror(store, tracker).run_once().num_events == 0


def test_drift_reports_are_kept_with_the_rollout(store: Store, tmp_path: Path) -> None:
    """Evidently's page becomes an artifact, its score a chart; a page that is gone is no error."""
    play(store, 1)
    page = tmp_path / "kl-0001.html"
    page.write_text("<html>drift")
    store.add_drift(DriftResult(ROLLOUT, "kl", 1.0, "drift", 3.0, 2.0, 10, 1, html_path=str(page)))
    store.add_drift(
        DriftResult(ROLLOUT, "kl", 2.0, "error", None, None, 10, 2, html_path=str(tmp_path / "gone"))
    )
    tracker = FakeTracker()

    result = Mirror(store, tracker).run_once()

    run = tracker.runs[PARENT]
    assert result.num_drift == 2
    assert run["artifacts"]["evidently/kl-0001.html"] == "<html>drift"
    assert sorted(m.value for m in tracker.runs[COURSE]["metrics"] if m.name == "drift/kl/is_drift") == [
        0.0,
        1.0,
    ]


def test_an_edited_policy_goes_on_being_mirrored(store: Store) -> None:
    """The stage's run keeps its first values, and says what they are now."""
    runner = play(store, 1)
    tracker = FakeTracker()
    Mirror(store, tracker).run_once()
    safer = POLICY.replace("share: 0, rung: medium}", "share: 0, rung: medium, hold_min: 9s}")
    store.add_revision(ROLLOUT, safer, by="ann", at_s=START_S + 1)
    assert not runner.tick(START_S + 1.5).error

    assert Mirror(store, tracker).run_once().reason == ""

    stage = tracker.runs[f"sentei-rollouts/rollout:{ROLLOUT}:stage:shadow:0"]
    assert (stage["params"]["hold_min_s"], stage["tags"]["changed.hold_min_s"]) == ("0.0", "9.0")
    points = sorted((m.step, m.value) for m in stage["metrics"] if m.name == "policy/hold_min_s")
    values = [value for _, value in points]
    assert (values, set(values)) == (sorted(values), {0.0, 9.0})


def test_what_is_refused_for_good_is_said_and_passed_over(store: Store) -> None:
    """One event that the tracker will never take costs that event only, and is not tried for ever."""
    play(store, 15)
    tracker = FakeTracker()
    tracker.refused_steps = {2}

    first, second = (Mirror(store, tracker).run_once() for _ in range(2))

    assert (first.reason, first.refused) == ("", ("the fake tracker refuses this step",))
    assert second.num_events == 0
    steps = {m.step for m in tracker.runs[COURSE]["metrics"]}
    assert steps == set(range(1, first.num_events + 1)) - {2}
    assert tracker.runs[PARENT]["tags"]["outcome"] == "promoted"
