"""Scenarios of a policy over all cores, and the figures of each.

The simulation itself is `policies.simulation`; here are the seeds, the processes and the clock. The same seed
gives the same figures on any number of cores: rollouts fall into parts of a fixed size.
"""

from __future__ import annotations

import multiprocessing as mp
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from sentei.pipeline.progress import Progress
from sentei.policies.schema.load import load_policy
from sentei.policies.simulation.fleet import PAUSED, PROMOTED, ROLLED_BACK, RUNNING
from sentei.policies.simulation.study import Tally, Traffic, exact_interval, median_of, run_scenario
from sentei.policies.simulation.world import Scenario

PART = 250  # rollouts that one process takes at a time


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is asked for."""

    policy_text: str
    scenarios: tuple[Scenario, ...]
    traffic: Traffic
    rollouts: int = 2000
    seed: int = 0
    workers: int = 1
    approves: bool = True


def simulate(wanted: Simulation, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run every scenario; one row of figures each."""
    if wanted.rollouts < 1 or wanted.traffic.sessions < 1 or wanted.traffic.sessions_per_hour <= 0:
        raise ValueError(
            "a simulation needs at least one rollout, one session, and sessions per hour above 0"
        )
    load_policy(wanted.policy_text)  # an error is an error here, not in a process
    with _pool(wanted.workers) as pool:
        return [_run(wanted, scenario, pool, progress) for scenario in wanted.scenarios]


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=max(1, workers), mp_context=mp.get_context("spawn"))


def _run(
    wanted: Simulation, scenario: Scenario, pool: ProcessPoolExecutor, progress: Progress | None
) -> dict[str, Any]:
    begun = perf_counter()
    sizes = [min(PART, wanted.rollouts - done) for done in range(0, wanted.rollouts, PART)]
    seeds = np.random.SeedSequence([wanted.seed, zlib.crc32(scenario.name.encode())]).spawn(len(sizes))
    jobs = {
        pool.submit(_part, wanted, scenario, size, seed): index
        for index, (size, seed) in enumerate(zip(sizes, seeds, strict=True))
    }
    parts = _collect(jobs, sizes, lambda done: progress and progress(scenario.name, done, wanted.rollouts))
    total = Tally()
    for part in parts:
        total.add(part)
    return figures(scenario, total, perf_counter() - begun)


def _collect(
    jobs: dict[Future[Tally], int], sizes: Sequence[int], on_done: Callable[[int], object]
) -> list[Tally]:
    """The parts in their order, whichever is ready first."""
    parts: dict[int, Tally] = {}
    on_done(0)
    for job in as_completed(jobs):
        parts[jobs[job]] = job.result()
        on_done(sum(sizes[index] for index in parts))
    return [parts[index] for index in sorted(parts)]


def _part(wanted: Simulation, scenario: Scenario, rollouts: int, seed: np.random.SeedSequence) -> Tally:
    policy = load_policy(wanted.policy_text)
    return run_scenario(
        policy, scenario, wanted.traffic, rollouts=rollouts, seed=seed, approves=wanted.approves
    )


def figures(scenario: Scenario, tally: Tally, seconds: float) -> dict[str, Any]:
    """The row of one scenario; shares with their exact 95 % intervals."""
    num, outcomes = tally.rollouts, tally.outcome
    caught = [units for units in tally.caught_units if units >= 0]
    has_harm = any(effect.factor > 1 for effect in scenario.effects)
    false_rollback, false_promotion = sum(tally.false_alarm), sum(tally.false_pass)
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "rollouts": num,
        "false_rollback": false_rollback / num,
        "false_rollback_ci": exact_interval(false_rollback, num),
        "false_rollback_by_watch": sum(tally.is_watch) / num,
        "false_promotion": false_promotion / num,
        "false_promotion_ci": exact_interval(false_promotion, num),
        "units_to_rollback_p50": median_of(tally.caught_units) if has_harm else None,
        "units_to_rollback_p90": float(np.quantile(caught, 0.9)) if caught else None,
        "sessions_to_rollback_p50": median_of(tally.caught_sessions) if has_harm else None,
        "caught": len(caught) / num if has_harm else None,
        "exposure_share": tally.exposed / tally.could_be if tally.could_be else 0.0,
        "promoted": outcomes.count(PROMOTED) / num,
        "rolled_back": outcomes.count(ROLLED_BACK) / num,
        "paused": outcomes.count(PAUSED) / num,
        "undecided": outcomes.count(RUNNING) / num,
        "timed_out": sum(tally.timed_out) / num,
        "sessions_to_promotion_p50": median_of([at for at in tally.promoted_at if at >= 0]),
        "thresholds": _thresholds(tally, has_harm=has_harm),
        "seconds": seconds,
    }


def _thresholds(tally: Tally, *, has_harm: bool) -> list[dict[str, Any]]:
    """The threshold rules on the same sessions; what passed before harm began is missed for good."""
    num, rows = tally.rollouts, []
    for rule, (aborted, passed, wrong_stop, wrong_pass) in tally.naive.items():
        rows.append(
            {
                "rule": rule,
                "aborted": aborted / num,
                "promoted": passed / num,
                "false_rollback": wrong_stop / num,
                "false_rollback_ci": exact_interval(wrong_stop, num),
                "false_promotion": wrong_pass / num,
                "false_promotion_ci": exact_interval(wrong_pass, num),
                "missed": passed / num if has_harm else None,
            }
        )
    return rows
