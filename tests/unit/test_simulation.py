"""The simulation decides as `decide` does, and counts what it should."""

from __future__ import annotations

import numpy as np
import pytest

from sentei.policies.machine import Phase
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.simulation.fleet import PAUSED, PROMOTED, ROLLED_BACK, RUNNING
from sentei.policies.simulation.study import Study, Traffic
from sentei.policies.simulation.world import Effect, Scenario
from tests.simulated_signals import Twin
from tests.strategies_policy import EXAMPLES, make_policy

PHASES = {
    Phase.RUNNING: RUNNING,
    Phase.PAUSED: PAUSED,
    Phase.PROMOTED: PROMOTED,
    Phase.ROLLED_BACK: ROLLED_BACK,
}


def example(name: str) -> Policy:
    """A shipped policy."""
    return load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def assert_twins_agree(policy: Policy, scenario: Scenario, traffic: Traffic, *, rows: int = 4) -> list[str]:
    """Tick for tick, each simulated rollout and the real one fed the same sessions are in the same state."""
    study = Study(policy, scenario, traffic, rollouts=rows, seed=np.random.SeedSequence(5))
    plan, fleet = study.plan, study.fleet
    twins = [Twin(policy, plan, row) for row in range(rows)]
    rung, live = fleet.rung, fleet.is_live
    for batch in study.play():
        for twin in twins:
            state = twin.state
            if state.phase != Phase.ROLLED_BACK:
                state = twin.tick(batch, rung, live, study.now_s).state
            row = twin.row
            assert fleet.phase[row] == PHASES[Phase(state.phase)], (state.reason, study.num_sessions)
            assert plan.stage_ids[fleet.stage[row]] == state.stage_id
            for place, slice_id in enumerate(plan.slice_ids):
                own = state.slice_state(slice_id)
                assert bool(fleet.is_dense[row, place]) == own.is_dense
                assert int(fleet.served[row, place]) == own.served_units or own.is_dense
        rung, live = fleet.rung, fleet.is_live
    return [twin.state.outcome or twin.state.phase for twin in twins]


FAST = Traffic(sessions_per_hour=14_400, sessions=900)
WORLDS = {
    "healthy": Scenario("healthy", ""),
    "one slice harmed": Scenario("harm", "", (Effect("agree", 2.0, "long"),)),
    "requests agree": Scenario("bound", "", (Effect("agree", 1.0),), concentration=1.0, requests=20),
    "missing audits": Scenario("missing", "", missing=0.08),
    "too many missing": Scenario("missing", "", missing=0.2),
    "a late regression": Scenario("late", "", (Effect("agree", 4.0, begins_at=150),)),
    "drift": Scenario("drift", "", (Effect("agree", 3.0, "long", begins_at=50, grows_over=200),)),
    "failures": Scenario("failures", "", (Effect("errors", 1.6),)),
    "a skewed split": Scenario("tilt", "", tilt=1.5),
    "a short silence": Scenario("silence", "", silence=(0.02, 0.05)),
    "a long silence": Scenario("silence", "", silence=(0.02, 1.0)),
}


@pytest.mark.parametrize("name", sorted(WORLDS))
@pytest.mark.parametrize("policy_name", ["demo", "fast-staging", "two-slices"])
def test_every_world_is_decided_alike(policy_name: str, name: str) -> None:
    """Phase, stage, fallen slices and served units are those of `decide`, after every tick."""
    policy = make_policy() if policy_name == "two-slices" else example(policy_name)

    assert_twins_agree(policy, WORLDS[name], FAST, rows=2)


@pytest.mark.parametrize(
    ("scenario", "outcome"),
    [
        (Scenario("aa", ""), "promoted"),
        (Scenario("ratio", "", (Effect("errors", 4.0),)), "rolled_back"),
        (Scenario("slo", "", (Effect("ttft_slo", 3.0, "huge"),)), "promoted"),
        (Scenario("mass", "", (Effect("mass", 2.0),)), "rolled_back"),
    ],
    ids=lambda value: value.name if isinstance(value, Scenario) else "",
)
def test_the_yardstick_is_decided_alike(scenario: Scenario, outcome: str) -> None:
    """With each kind of test, through every stage to the end."""
    sessions = 4500 if scenario.name == "ratio" else 9000  # events of two arms are slow to prove
    outcomes = assert_twins_agree(example("yardstick"), scenario, Traffic(3000, sessions), rows=2)

    assert outcome in outcomes


def changed(**changes: object) -> Policy:
    """TWO_SLICES with other advance rules, mode or actions."""

    def edit(document: dict) -> None:  # type: ignore[type-arg]
        spec = document["spec"]
        for key, value in changes.items():
            if key == "mode":
                spec["mode"] = value
            elif key in spec["advance"] or key in ("on_max", "min_served_units"):
                spec["advance"][key] = value
            else:
                next(item for item in spec["guardrails"]["items"] if item["id"] == key)["action"] = value

    return make_policy(edit)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "advise"},
        {"min_served_units": 60},
        {"on_max": "rollback"},
        {"need": "no_harm", "min_units": 20},
        {"srm": "rollback"},
        {"quality": "previous_rung", "agree": "rollback_slice"},
    ],
    ids=str,
)
@pytest.mark.parametrize("world", ["healthy", "one slice harmed", "a skewed split"])
def test_every_rule_of_a_policy_is_decided_alike(changes: dict[str, object], world: str) -> None:
    """Modes, least served units, an end of a stage, weaker needs and other actions, too."""
    assert_twins_agree(changed(**changes), WORLDS[world], FAST, rows=2)


def test_the_breaker_trips_alike() -> None:
    """Failures in the breaker's window, also while harm is not proven yet."""

    def quick(document: dict) -> None:  # type: ignore[type-arg]
        document["spec"]["breaker"]["variant"] |= {"min_requests": 2, "window": "2m"}

    policy = make_policy(quick)
    outcomes = assert_twins_agree(policy, Scenario("dead", "", (Effect("errors", 4.0),)), FAST, rows=3)

    assert outcomes == ["rolled_back"] * 3


def test_production_is_decided_alike() -> None:
    """Three rungs, few audits, two arms over all slices, a benefit, approvals and a freeze window."""
    world = Scenario("harm", "", (Effect("quality", 2.0, "mid", from_rung=1),), level=0.2)
    outcomes = assert_twins_agree(example("cautious"), world, Traffic(40_000, 60_000), rows=1)

    assert outcomes == ["running"]
