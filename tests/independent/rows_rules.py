"""A4, A6 and B11: what a rule does with what it is told; only `decide` is the product's."""

from __future__ import annotations

import hashlib
import heapq
from typing import Any

import numpy as np

from tests.independent.counting import Count, Progress, Row, count
from tests.independent.product import IS_NOW, engine, load_policy, signals, tell
from tests.independent.streams import POLICY, START_S, TICK_S

RATIO, FAILED, ANSWER_S = 1.25, 0.10, 1200.0
TWO_ARMS = POLICY.replace("- {id: shadow, share: 0, rung: mild}\n    ", "").replace(
    """      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.05, floor_cap: 5%},
         test: betting_paired, action: rollback}
""",
    f"""      - {{id: errors, value: serve.failed, bound: {{ratio: {RATIO}}}, test: event_split,
         action: rollback}}
""",
)
SECOND_STAGE = ("c50", "full")


def rows() -> tuple[Row, ...]:
    """All that a rule can show."""
    return (
        Row(
            "A4",
            "failures twice the bounded ratio from the second stage on, answers of 20 min: promoted",
            "at most 5%",
            _late_answers,
            100,
        ),
        Row(
            "A6",
            "promoted, then the replicas run another artifact: sparse serves on after the next tick",
            "never",
            _another_artifact,
            40,
            key="swapped",
        ),
        Row(
            "B11",
            "one crash loses 15 to 60 audits, all are scored from then on: still in error after two hours",
            "never",
            _crash,
            40,
        ),
    )


def _late_answers(trials: int, progress: Progress) -> Count:
    return count(trials, progress, lambda seed: bool(_two_arms(seed).outcome == "promoted"))


def _two_arms(seed: int) -> Any:
    """Sessions are assigned when they come and told when they end, often in the next stage."""
    rng, policy = np.random.default_rng((seed, 4)), load_policy(TWO_ARMS, "independent.yaml")
    state, now_s, seq = engine.initial_state(policy, f"r{seed}", START_S), START_S, 0
    running: list[tuple[float, int, str, float]] = []
    number = 0
    while now_s < START_S + 12 * 3600.0 and state.outcome is None:
        share = engine.routing(policy, state).routes[1].share
        for _ in range(rng.poisson(40.0)):
            number += 1
            arm = "sparse" if rng.random() < share else "dense"
            heapq.heappush(running, (now_s + rng.exponential(ANSWER_S), number, arm, share))
        now_s += TICK_S
        ended: list[Any] = []
        while running and running[0][0] <= now_s:
            at_s, name, arm, recorded = heapq.heappop(running)
            is_worse = arm == "sparse" and state.stage_id in SECOND_STAGE
            own = FAILED * 2 * RATIO if is_worse else FAILED * 0.6 if arm == "sparse" else FAILED
            seq += 1
            ended.append(
                tell(
                    signals.Observation,
                    seq=seq,
                    value_name="serve.failed",
                    slice_id="long",
                    rung_id="mild",
                    session_id=f"s{name}",
                    variant=arm,
                    at_s=at_s,
                    value=float(rng.random() < own),
                    share=recorded,
                )
            )
        told = tell(signals.Signals, observations=tuple(ended), cursor=seq, newest_data_at_s=now_s)
        state = engine.decide(policy, state, told, now_s).state
    return state


def _proven(policy: Any, rng: np.random.Generator, artifact: str) -> Any:
    """A rollout that is promoted by audits without a fault."""
    state, now_s, seq = engine.initial_state(policy, "r1", START_S), START_S, 0
    while state.outcome is None:
        now_s += TICK_S
        units = tuple(_audit(seq + i + 1, now_s, state, policy, rng) for i in range(80))
        seq += 80
        told = tell(
            signals.Signals, observations=units, cursor=seq, newest_data_at_s=now_s, artifact=artifact
        )
        state = engine.decide(policy, state, told, now_s).state
    return state, now_s, seq


def _audit(
    seq: int, now_s: float, state: Any, policy: Any, rng: np.random.Generator, reason: str | None = None
) -> Any:
    share = engine.routing(policy, state).routes[1].share
    return tell(
        signals.Observation,
        seq=seq,
        value_name="audit.token_disagreement",
        slice_id="long",
        rung_id="mild",
        session_id=f"s{seq}",
        variant="sparse" if share > 0 else "dense",
        at_s=now_s,
        value=float(rng.beta(1, 200)),
        floor=0.0,
        share=share,
        half="upper" if seq % 2 else "lower",
        missing=reason is not None,
        reason=reason or "",
    )


def _another_artifact(trials: int, progress: Progress) -> Count:
    def is_wrong(seed: int) -> bool:
        rng, policy = np.random.default_rng((seed, 6)), load_policy(POLICY, "independent.yaml")
        own = hashlib.sha256(rng.bytes(8)).hexdigest()
        state, now_s, seq = _proven(policy, rng, own)
        other = hashlib.sha256(rng.bytes(8)).hexdigest()
        told = tell(signals.Signals, cursor=seq + 1, newest_data_at_s=now_s + TICK_S, artifact=other)
        after = engine.decide(policy, state, told, now_s + TICK_S).state
        return bool(engine.routing(policy, after).routes[1].share > 0)

    found = count(trials, progress, is_wrong)
    return found if IS_NOW else Count(found.hits, found.trials, "no tick is told what runs")


def _crash(trials: int, progress: Progress) -> Count:
    def is_wrong(seed: int) -> bool:
        rng, policy = np.random.default_rng((seed, 11)), load_policy(POLICY, "independent.yaml")
        state, now_s, seq = engine.initial_state(policy, "r1", START_S), START_S, 0
        lost = int(rng.integers(15, 61))
        for tick in range(120):
            now_s += TICK_S
            is_first = tick == 0
            chosen = lost + 3 if is_first else int(rng.poisson(1))
            units = tuple(
                _audit(
                    seq + i + 1,
                    now_s,
                    state,
                    policy,
                    rng,
                    "auditor_stopped" if is_first and i < lost else None,
                )
                for i in range(chosen)
            )
            seq += chosen
            told = tell(signals.Signals, observations=units, cursor=seq, newest_data_at_s=now_s)
            decision = engine.decide(policy, state, told, now_s)
            state = decision.state
        return any(item.verdict == "error" for item in decision.verdicts)

    return count(trials, progress, is_wrong)
