"""Each shipped policy loads, keeps every rule, and behaves as its guide says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sentei.policies.engine import decide, initial_state, routing
from sentei.policies.evidence import PAIRED_CUT, log_threshold, paired_bound, units_to_prove
from sentei.policies.review.forecast import gain_units
from sentei.policies.schema.budget import harm_alpha, try_alpha
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Observation, Signals, SliceTraffic
from tests.evidence_paths import betting_paths
from tests.strategies_policy import EXAMPLES, drift

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "policy.md"


def example(name: str) -> Policy:
    """A shipped policy."""
    return load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def test_the_shipped_policies_are_there() -> None:
    """Production, staging and demo."""
    assert {"cautious", "fast-staging", "demo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_loads_and_starts_dense(name: str) -> None:
    """It is without fault, carries its own name, and its first table sends nobody to sparse."""
    policy = example(name)
    table = routing(policy, initial_state(policy, "r1", 0.0))

    assert policy.metadata.name == name
    assert all(route.share == 0 for route in table.routes)
    assert table.routes[0].min_tokens == 0


def play(
    policy: Policy, excess: float, *, seed: int = 0, ticks: int = 240, ratio: float = 0.6
) -> tuple[str | None, str | None, int, float]:
    """Two sessions a tick with beta-distributed disagreement and KL: outcome, by, sessions, seconds."""
    rng = np.random.default_rng(seed)
    state = initial_state(policy, "r1", 0.0)
    seq = sessions = window = 0
    for tick in range(1, ticks):
        stage = policy.stage(state.stage_id)
        share = stage.share
        seen, candidates = [], 0
        for _ in range(2):
            seq, sessions = seq + 1, sessions + 1
            value = float(rng.beta(excess * 8, (1 - excess) * 8))
            is_sparse = bool(rng.random() < share)
            candidates += is_sparse
            variant = "sparse" if is_sparse else "dense"
            place = ("long", stage.rung, f"s{seq}", variant, float(tick))
            seen += [
                Observation(seq, "audit.token_disagreement", *place, value=value, floor=0.0),
                Observation(seq, "audit.kl", *place, value=value, floor=0.0),
                Observation(seq, "audit.compute_ratio", *place, value=ratio),
                Observation(seq, "serve.failed", *place, value=0.0),
                Observation(seq, "serve.ttft_ms", *place, value=400.0),
            ]
        window += tick % 8 == 0
        signals = Signals(
            observations=tuple(seen),
            drift=drift("clear", window) if window else (),
            traffic=(SliceTraffic("long", share, candidates, 2),),
            cursor=seq,
            newest_data_at_s=float(tick),
        )
        state = decide(policy, state, signals, float(tick)).state
        if state.outcome:
            return state.outcome, state.by, sessions, float(tick)
    return state.outcome, state.by, sessions, float(ticks)


def test_the_demo_promotes_a_good_rung_within_its_time() -> None:
    """At an excess of 2 % nineteen of twenty seeds or more end promoted, in about a minute of ticks."""
    runs = [play(example("demo"), 0.02, seed=seed) for seed in range(20)]

    assert sum(outcome == "promoted" for outcome, *_ in runs) >= 19
    assert np.median([seconds for *_, seconds in runs]) <= 75


@pytest.mark.parametrize("name", ["demo", "demo-smollm2"])
def test_a_demo_holds_a_rung_that_does_not_pay(name: str) -> None:
    """Clean, and as dear as dense: nobody is ever served by it, and it is said within a hundred sessions."""
    runs = [play(example(name), 0.02, seed=seed, ratio=1.0) for seed in range(20)]

    assert all((outcome, by) == ("held", "compute") for outcome, by, *_ in runs)
    assert max(sessions for _, _, sessions, _ in runs) <= 100


def test_the_demo_of_smollm2_promotes_within_the_sessions_that_its_time_allows() -> None:
    """A rung of 0.68 of dense's time that changes one token in twenty: 75 sessions do for most seeds."""
    runs = [play(example("demo-smollm2"), 0.05, seed=seed, ratio=0.68) for seed in range(20)]

    assert sum(outcome == "promoted" for outcome, *_ in runs) >= 19
    assert np.median([sessions for _, _, sessions, _ in runs]) <= 75


@pytest.mark.parametrize("name", ["demo", "demo-smollm2"])
def test_a_demo_catches_a_real_harm_within_twenty_sessions(name: str) -> None:
    """At a disagreement of 60 % every seed is rolled back by a quality guardrail, most within 20 sessions."""
    runs = [play(example(name), 0.60, seed=seed) for seed in range(20)]

    assert all((outcome, by in ("agree", "quality")) == ("rolled_back", True) for outcome, by, *_ in runs)
    assert np.quantile([sessions for _, _, sessions, _ in runs], 0.9) <= 20


def cost(policy: Policy, gate_id: str, excess: float) -> int | None:
    """Sessions to prove safety of a constant excess under a paired bound."""
    gate = next(item for item in policy.spec.guardrails.items if item.id == gate_id)
    assert gate.bound is not None
    assert gate.bound.excess_over_floor is not None
    assert gate.bound.floor_cap is not None
    scale = policy.spec.audit.values.kl.cap if gate.value == "audit.kl" else 1.0
    cap, limit = gate.bound.floor_cap / scale, gate.bound.excess_over_floor / scale
    direction = "safe" if excess / scale < limit else "harm"
    alpha = try_alpha(policy) if direction == "safe" else harm_alpha(policy, gate)
    value = (excess / scale + cap) / (1 + cap)
    return units_to_prove(
        value, bound=paired_bound(limit, cap), direction=direction, alpha=alpha, cut=PAIRED_CUT
    )


def test_the_costs_in_the_demo_file_are_computed() -> None:
    """The numbers in the comment of demo.yaml are what the formulas give."""
    policy = example("demo")

    assert cost(policy, "agree", 0.0) == 19
    assert cost(policy, "agree", 0.02) == 21
    assert cost(policy, "agree", 0.40) == 17


def test_the_costs_in_the_file_of_the_demo_of_smollm2_are_computed() -> None:
    """Of both guardrails of quality, and of the gain."""
    policy = example("demo-smollm2")

    assert [cost(policy, "agree", excess) for excess in (0.05, 0.1, 0.4)] == [18, 23, 21]
    assert [cost(policy, "quality", excess) for excess in (0.0, 0.05, 0.1, 0.4)] == [19, 24, 35, 15]
    assert [gain_units(policy, policy.spec.benefit[0], ratio) for ratio in (0.65, 0.70)] == [20, 25]


def test_the_guide_quotes_the_computed_costs() -> None:
    """Every row of the guide's table is recomputed from the shipped policies."""
    rows = re.findall(
        r"^\| ([\w-]+) `(\w+)` \| ([\d.]+) \| (\d+|never) \|$", GUIDE.read_text(encoding="utf-8"), re.M
    )

    assert len(rows) >= 12
    for name, gate_id, excess, units in rows:
        found = cost(example(name), gate_id, float(excess))
        assert str(found if found is not None else "never") == units, (name, gate_id, excess, found)


def test_a_varying_stream_needs_little_more_than_a_constant_one() -> None:
    """The guide says that the table's constant streams are a fair guide: the median is within a third."""
    policy = example("demo")
    values = np.random.default_rng(0).beta(0.02 * 20, 0.98 * 20, (400, 200))

    log_e = betting_paths(
        (values + 0.2) / 1.2, bound=paired_bound(0.2, 0.2), direction="safe", alpha=0.05, cut=0.9
    )

    hit = log_e >= log_threshold(0.05)
    median = np.median(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 201))
    assert median <= 1.34 * (cost(policy, "agree", 0.02) or 0)
