"""What a decision costs does not depend on how many sessions lie behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from time import perf_counter
from typing import Any

from sentei.policies.engine import RolloutState, decide, initial_state, state_from_json, state_to_json
from sentei.policies.evidence import Split
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Observation, Signals, SliceTraffic
from tests.strategies_policy import EXAMPLES, load_policy

NUM_BEHIND = 1_000_000


def cautious() -> Policy:
    """The production policy, with six rungs and slices of evidence."""
    return load_policy((EXAMPLES / "cautious.yaml").read_text(encoding="utf-8"), "cautious.yaml")


def grown(policy: Policy, per_tick: int, ticks: int) -> tuple[RolloutState, Signals]:
    """A state after some ticks at half of the traffic, and the signals of one more."""
    state = replace(initial_state(policy, "r1", 0.0), stage_id="c50")
    seq = 0
    for tick in range(ticks):
        seen = []
        for index in range(per_tick):
            place: tuple[Any, ...] = (("mid", "long")[index % 2], ("medium", "mild")[index % 2], f"s{seq}")
            at = (*place, ("sparse", "dense")[index % 4 // 2], float(tick))
            seen += [
                Observation(seq + 1, "audit.kl", *at, value=0.02, floor=0.01),
                Observation(seq + 2, "audit.token_disagreement", *at, value=0.01, floor=0.01),
                Observation(seq + 3, "audit.compute_ratio", *at, value=0.5),
                Observation(
                    seq + 4, "serve.failed", *at, value=float((tick * per_tick + index) % 100 in (0, 2))
                ),
                Observation(seq + 5, "serve.ttft_ms", *at, value=900.0),
            ]
            seq += 5
        traffic = tuple(SliceTraffic(name, 0.5, per_tick // 2, per_tick) for name in ("mid", "long"))
        signals = Signals(tuple(seen), traffic=traffic, cursor=seq, newest_data_at_s=float(tick))
        state = decide(policy, state, signals, float(tick)).state
    assert state.phase == "running"  # one failure in a hundred of each variant is no harm
    behind = max(item.seq for item in signals.observations)
    moved = tuple(replace(item, seq=item.seq + behind) for item in signals.observations)
    return state, replace(signals, observations=moved, cursor=2 * behind)


def aged(state: RolloutState) -> RolloutState:
    """The same state as if a million sessions had been seen in every cell."""
    cells = []
    for cell in state.cells:
        parts: dict[str, Any] = {}
        for name in ("harm", "safe", "watch", "interval"):
            part = getattr(cell, name)
            if part is None:
                continue
            factor = NUM_BEHIND / max(part.units, 1)
            changes: dict[str, Any] = {"units": NUM_BEHIND}
            for field in ("total", "spread", "weight", "weighted", "noise"):
                if hasattr(part, field):
                    changes[field] = getattr(part, field) * factor
            if hasattr(part, "hits") and not isinstance(part, Split):
                changes["hits"] = round(part.hits * factor)
            parts[name] = replace(part, **changes)
        cells.append(replace(cell, **parts))
    return replace(state, cells=tuple(cells))


def best_ms(policy: Policy, state: RolloutState, signals: Signals) -> float:
    """The fastest of many decisions: what it costs when the machine does nothing else."""
    times = []
    for _ in range(25):
        begun = perf_counter()
        decision = decide(policy, state, signals, 100.0)
        times.append(perf_counter() - begun)
    assert decision.changed
    return min(times) * 1000


def test_a_decision_over_a_million_sessions_takes_at_most_five_milliseconds() -> None:
    """Ten new sessions on top of a million, in every cell of the production policy."""
    policy = cautious()
    state, signals = grown(policy, per_tick=10, ticks=20)

    assert best_ms(policy, aged(state), signals) <= 5.0


def test_the_state_has_one_size() -> None:
    """A million sessions make the bytes of a state hardly longer: only the numbers have more digits."""
    policy = cautious()
    state, _ = grown(policy, per_tick=10, ticks=20)

    young, old = len(state_to_json(state)), len(state_to_json(aged(state)))

    assert old <= 1.1 * young
    assert old < 20_000


def test_fifty_times_the_sessions_leave_the_state_as_large_as_it_was() -> None:
    """Really fed, not aged: ten thousand sessions need the same cells and numbers as two hundred."""
    policy = cautious()
    (young, _), (old, _) = (grown(policy, per_tick=10, ticks=ticks) for ticks in (20, 1000))

    assert old.cells[0].units == 50 * young.cells[0].units
    assert [cell.key for cell in old.cells] == [cell.key for cell in young.cells]
    numbers = [count_values(json.loads(state_to_json(state))) for state in (young, old)]
    assert numbers[0] <= numbers[1] <= 1.05 * numbers[0]  # the window of missing audits has two parts by now
    assert len(state_to_json(old)) <= 1.05 * len(state_to_json(young))


def count_values(value: Any) -> int:
    """How many plain values there are inside."""
    if isinstance(value, dict):
        return sum(count_values(inner) for inner in value.values())
    return sum(count_values(inner) for inner in value) if isinstance(value, list) else 1


def test_a_state_without_intervals_is_still_read() -> None:
    """A rollout that was begun by the version before goes on; only its reports have no intervals."""
    policy = cautious()
    state, signals = grown(policy, per_tick=10, ticks=3)
    document = json.loads(state_to_json(state)) | {"schema": 1}
    for cell in document["cells"]:
        del cell["interval"]

    read = state_from_json(json.dumps(document))

    assert read == replace(state, cells=tuple(replace(cell, interval=None) for cell in state.cells))
    assert decide(policy, read, signals, 100.0).changed
