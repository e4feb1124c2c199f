"""Each shipped policy does in simulation what it is for: a healthy rung passes, a bad one is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.simulation.fleet import PROMOTED, ROLLED_BACK
from sentei.policies.simulation.study import Study, Tally, Traffic
from sentei.policies.simulation.world import Effect, Scenario
from tests.strategies_policy import EXAMPLES

ROLLOUTS = 20


@dataclass(frozen=True)
class Purpose:
    """One policy in its own traffic: how far a healthy rung gets, and what is harmed for the other story."""

    name: str
    traffic: Traffic
    reaches: str  # a stage, or "promoted"
    harmed: str
    place: str
    falls_to: str  # "dense", "milder" or "everybody dense"
    is_served: bool = True


PURPOSES = (
    Purpose("cautious", Traffic(20_000, 70_000), "c10", "agree", "mid", "dense"),
    Purpose("fast-staging", Traffic(3600, 2400), "promoted", "agree", "long", "everybody dense"),
    Purpose("advise-only", Traffic(2000, 52_000), "look-medium", "agree", "long", "dense", is_served=False),
    Purpose("cost-first", Traffic(2000, 14_000), "promoted", "quality", "mid", "milder"),
    Purpose("long-context-only", Traffic(60, 3000), "promoted", "quality", "huge", "dense"),
    Purpose("yardstick", Traffic(1200, 5000), "promoted", "mass", "huge", "dense"),
    Purpose("demo", Traffic(7200, 400), "promoted", "agree", "long", "everybody dense"),
    Purpose("demo-smollm2", Traffic(180, 400), "promoted", "agree", "long", "everybody dense"),
)


def example(name: str) -> Policy:
    """A shipped policy."""
    return load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def play(purpose: Purpose, scenario: Scenario, until: Callable[[Study], bool]) -> tuple[Study, Tally]:
    """Some rollouts in that world, until what is waited for has happened in all of them."""
    policy = example(purpose.name)
    study = Study(policy, scenario, purpose.traffic, rollouts=ROLLOUTS, seed=np.random.SeedSequence(3))
    for _ in study.play():
        if until(study):
            break
    return study, study.tally()


def has_reached(purpose: Purpose, study: Study) -> np.ndarray:
    """Which rollouts have come as far as they should."""
    stages = [*study.plan.stage_ids, "promoted"]
    reached = np.where(study.fleet.phase == PROMOTED, len(stages) - 1, study.fleet.stage)
    return np.asarray(reached >= stages.index(purpose.reaches))


def has_fallen(purpose: Purpose, study: Study) -> np.ndarray:
    """Which rollouts have fallen back as they should."""
    fleet, place = study.fleet, study.plan.slice_ids.index(purpose.place)
    if purpose.falls_to == "everybody dense":
        return np.asarray(fleet.phase == ROLLED_BACK)
    is_milder = fleet.ceiling[:, place] < study.plan.num_rungs - 1
    return np.asarray(fleet.is_dense[:, place] | (is_milder & (purpose.falls_to == "milder")))


def test_every_shipped_policy_has_its_story() -> None:
    """No example is shipped without one."""
    assert {purpose.name for purpose in PURPOSES} == {path.stem for path in EXAMPLES.glob("*.yaml")}


@pytest.mark.parametrize("purpose", PURPOSES, ids=lambda purpose: purpose.name)
def test_a_healthy_rung_gets_through(purpose: Purpose) -> None:
    """Nine of ten healthy rollouts or more get as far as they should, and none is stopped wrongly."""
    study, tally = play(
        purpose,
        Scenario("aa", "", level=0.2, compares=False),
        lambda study: bool(has_reached(purpose, study).all()),
    )

    assert has_reached(purpose, study).mean() >= 0.9
    assert sum(tally.false_alarm) == 0
    assert (tally.exposed > 0) == purpose.is_served


@pytest.mark.parametrize("purpose", PURPOSES, ids=lambda purpose: purpose.name)
def test_a_bad_rung_is_stopped(purpose: Purpose) -> None:
    """Four times the bound in one slice falls back as the policy says, nearly unseen by users."""
    harm = Effect(purpose.harmed, 4.0, purpose.place, from_rung=0)

    study, tally = play(
        purpose,
        Scenario("harm", "", (harm,), compares=False),
        lambda study: bool(has_fallen(purpose, study).all()),
    )

    assert has_fallen(purpose, study).all()
    assert sum(tally.false_pass) == 0
    assert tally.exposed <= 0.02 * tally.could_be


def test_the_cost_first_ramp_stops_where_nothing_is_saved() -> None:
    """A rung that is safe and saves nothing is never promoted."""
    purpose = next(item for item in PURPOSES if item.name == "cost-first")

    world = Scenario("useless", "", (Effect("compute", 1.3),), compares=False)

    study, tally = play(purpose, world, lambda study: False)

    assert (study.fleet.phase != PROMOTED).all()
    assert sum(tally.false_alarm) == 0
