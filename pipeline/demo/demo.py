"""The main job once, from a frozen model to one rollout promoted and one rolled back; the CLI shows it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import torch
import yaml

from sentei.monitors.store import Store
from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.demo.traffic import MixOptions, TrafficDriver, TrafficTotals, prompt_mix
from sentei.pipeline.evaluation.evaluate import EvaluateOptions
from sentei.pipeline.home import short_name
from sentei.pipeline.ladder.calibrate import CalibrateOptions
from sentei.pipeline.ladder.distill import DistillOptions
from sentei.pipeline.progress import Progress
from sentei.pipeline.reports.rollout_report import Report, build_report, save_report
from sentei.pipeline.rollout.client import ADMIN_TOKEN_VARIABLE, AdminClient
from sentei.pipeline.steps import Workbench, calibrate_step, distill_step, evaluate_step, read_evaluation
from sentei.pipeline.text.corpus import split_documents
from sentei.pipeline.tracking.mirror import Mirror
from sentei.pipeline.tracking.tracker import MlflowTracker

POLL_S = 0.5
LEAD_S = 3.0  # traffic flows this long before a rollout starts, so that its first tick sees a live app
OUTCOMES = ("promoted", "rolled_back", "held")


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How large the demo is for one model; the pocket model's fits in minutes on two cores."""

    distill: DistillOptions
    calibrate: CalibrateOptions
    evaluate: EvaluateOptions
    mix: MixOptions
    clients: int
    think_s: float  # a client's pause between sessions: audits of all sessions must keep up on the same cores
    fault_past_tokens: int
    attention: str
    max_rollout_s: float
    waits_for_audits: bool = False  # a client's next session waits, too, until all replays are done
    threads: int = 1
    dense_replicas: int = 1
    engine: str = "builtin"
    expected: str = "promoted"  # how the rollout of the calibrated rung has to end
    policy: str = "demo"  # the shipped one that both rollouts follow


@dataclass(frozen=True, slots=True)
class Story:
    """One rollout and how it has to end."""

    name: str
    title: str
    expected: str
    fault: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rollout's rung takes and costs; None where nothing was measured."""

    rung: str
    model_time_ratio: float | None  # sparse over dense, the same requests of this rollout through both
    ppl_cost_pct: float | None  # of the rung, on held-out text, by this demo's evaluation
    recall: float | None  # right answers of the rung, by this demo's evaluation, on the same prompts as dense
    recall_dense: float | None
    gain_proven: bool


@dataclass(frozen=True, slots=True)
class StoryEnd:
    """How one rollout ended."""

    name: str
    rollout_id: str
    outcome: str
    expected: str
    by: str
    seconds: float
    reason: str
    answered: int
    failed: int
    recall_pct: float | None  # of the questions in its traffic, whoever answered them
    report: str
    measured: Measured | None = None

    @property
    def is_as_expected(self) -> bool:
        """Whether it ended the way it had to."""
        return self.outcome == self.expected


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo leaves behind."""

    model: str
    rollouts: tuple[StoryEnd, ...]
    evaluation: Mapping[str, Any] | None
    mlflow_uri: str
    report: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `sentei demo --json`."""
        rollouts = [
            {
                "name": end.name,
                "rollout_id": end.rollout_id,
                "outcome": end.outcome,
                "by": end.by,
                "seconds": round(end.seconds, 1),
                "reason": end.reason,
                "report": end.report,
                **(asdict(end.measured) if end.measured is not None else {}),
            }
            for end in self.rollouts
        ]
        return {
            "model": self.model,
            "rollouts": rollouts,
            "mlflow_uri": self.mlflow_uri,
            "report": self.report,
            "seconds": round(self.seconds, 1),
            "evaluation": self.evaluation,
        }


Watch = Callable[[Story, Mapping[str, Any], TrafficTotals], None]


def prepare(bench: Workbench, size: DemoSize, progress: Progress) -> None:
    """Distil, calibrate and evaluate."""
    distill_step(bench, size.distill, progress)
    calibrate_step(bench, size.calibrate, progress)
    evaluate_step(bench, size.evaluate, progress)


def stories(size: DemoSize) -> tuple[Story, Story]:
    """Return the two rollouts: the calibrated rung, and the same with a planted silent fault."""
    fault = {"kind": "pooled_keys_lost", "past_tokens": size.fault_past_tokens}
    title = f"(b) silent fault: pooled keys lost past {size.fault_past_tokens} tokens"
    return (
        Story("calibrated", "(a) the calibrated rung", size.expected, None),
        Story("planted-fault", title, "rolled_back", fault),
    )


def demo_policy(name: str, example: str = "demo") -> str:
    """Return a shipped policy under another name."""
    text = resources.files("sentei.policies").joinpath(f"examples/{example}.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    document["metadata"]["name"] = name
    return yaml.safe_dump(document, sort_keys=False)


def serve_config(bench: Workbench, size: DemoSize) -> dict[str, Any]:
    """Return the arguments of the local app."""
    return {
        "model": bench.loaded.name,
        "model_name": short_name(bench.loaded.name),
        "adapter": str(bench.adapter_dir),
        "dtype": str(bench.loaded.model.dtype).removeprefix("torch."),
        **_device_options(bench.loaded.device),
        "attention": size.attention,
        "threads": size.threads,
        "dense_replicas": size.dense_replicas,
        "engine": size.engine,
        "store_url": bench.home.store_url,
        "mlflow_uri": bench.home.mlflow_uri,
        "mirror_every_s": 5.0,
        "drift_every_s": 5.0,
        "allow_faults": True,
    }


def _device_options(device: torch.device) -> dict[str, Any]:
    """Dense and sparse share a GPU where there is but one."""
    if device.type != "cuda":
        return {"device": device.type}
    return {"device": device.type, "replica_gpus": 0.5 if torch.cuda.device_count() == 1 else 1.0}


def run_stories(
    bench: Workbench, size: DemoSize, *, seed: int, watch: Watch, told: Sequence[Story] | None = None
) -> tuple[StoryEnd, ...]:
    """Serve, and run the rollouts under real traffic, both stories of the demo unless told others.

    Nothing is left running.
    """
    token = secrets.token_urlsafe(24)
    environment = {ADMIN_TOKEN_VARIABLE: token, "SENTEI_HOME": str(bench.home.root)}
    folder = bench.home.root / "demo"
    with LocalServer(serve_config(bench, size), folder, environment=environment) as server:
        admin = AdminClient(server.url, token)
        ends = [
            _run_story(bench, size, admin, story=story, seed=seed + place, watch=watch)
            for place, story in enumerate(told if told is not None else stories(size))
        ]
        admin.close()
    store = Store.open(bench.home.store_url)
    Mirror(store, MlflowTracker(bench.home.mlflow_uri, bench.home.mlflow_artifacts)).run_once()
    return tuple(_with_report(bench, store, end) for end in ends)


def _run_story(
    bench: Workbench,
    size: DemoSize,
    admin: AdminClient,
    *,
    story: Story,
    seed: int,
    watch: Watch,
) -> StoryEnd:
    _, held_out = split_documents(bench.corpus)
    prefix = f"{story.name}-{int(time.time())}"
    prompts = prompt_mix(bench.loaded.tokenizer, held_out, options=size.mix, seed=seed, prefix=prefix)
    model_name = short_name(bench.loaded.name)
    driver = TrafficDriver(
        admin.url,
        model_name,
        prompts,
        clients=size.clients,
        think_s=size.think_s,
        may_go_on=admin.are_audits_done if size.waits_for_audits else None,
    )
    with driver as traffic:
        time.sleep(LEAD_S)
        started = time.monotonic()
        policy = demo_policy(f"demo-{story.name}", size.policy)
        # An earlier demo in the same home has left the second story's policy in quarantine, and the first
        # story is promoted when the second one begins. The fault comes after the start, not before: what the
        # first story's sessions meet belongs to the first story.
        rollout_id = admin.start_rollout(
            policy, f"{size.policy}.yaml", release_quarantine=True, replace=True
        )["rollout_id"]
        admin.plant_fault(story.fault)
        found = admin.rollout(rollout_id)
        while found["outcome"] not in OUTCOMES and time.monotonic() - started < size.max_rollout_s:
            time.sleep(POLL_S)
            found = admin.rollout(rollout_id)
            watch(story, found, traffic.totals)
        seconds = time.monotonic() - started
        if found["outcome"] not in OUTCOMES:
            admin.command(rollout_id, "abort", reason=f"no outcome in {size.max_rollout_s:.0f} s")
    totals = traffic.totals
    return StoryEnd(
        name=story.name,
        rollout_id=rollout_id,
        outcome=found["outcome"] or "undecided",
        expected=story.expected,
        by=found["by"] or "",
        seconds=seconds,
        reason=str(found["reason"]),
        answered=totals.sent - totals.failed,
        failed=totals.failed,
        recall_pct=100.0 * totals.answered_right / totals.asked if totals.asked else None,
        report="",
    )


def _with_report(bench: Workbench, store: Store, end: StoryEnd) -> StoryEnd:
    report = build_report(store, end.rollout_id, evaluation=read_evaluation(bench))
    html, _ = save_report(report, bench.home.reports / end.rollout_id)
    return replace(end, report=str(html), measured=_measured(report))


def _measured(report: Report) -> Measured:
    """What the rollout's newest rung takes, from its report, and what it costs, from the evaluation."""
    rung = report.evaluated_rung
    change = report.savings.paired_compute_change
    return Measured(
        rung=report.rung_id,
        model_time_ratio=None if change is None else 1 + change,
        ppl_cost_pct=None if rung is None else rung["ppl_cost_pct"],
        recall=None if rung is None else rung["recall"]["mean"],
        recall_dense=None if rung is None else rung["recall"]["dense_mean"],
        gain_proven=report.is_gain_proven,
    )


def is_as_expected(ends: Sequence[StoryEnd]) -> bool:
    """Whether every rollout ended the way it had to."""
    return len(ends) > 0 and all(end.is_as_expected for end in ends)
