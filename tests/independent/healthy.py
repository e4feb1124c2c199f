"""What healthy traffic costs: sessions and hours until the last stage of the shipped policies is entered.

    python -m tests.independent.healthy [POLICY ...]

The fleet of `policy simulate` with everything at 0.3 of its bound, 5,000 sessions an hour, an operator who
approves at once, and no freeze; medians of 20 rollouts. It compares rules, so it may be the product's own
fleet. With PYTHONPATH at the sources of an older checkout it says what it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import sentei.policies
from sentei.policies.simulation.study import Study, Traffic
from sentei.policies.simulation.world import Scenario
from tests.independent.product import load_policy

EXAMPLES = Path(str(sentei.policies.__file__)).parent / "examples"
PER_HOUR, ROLLOUTS, MOST_SESSIONS = 5_000, 20, 400_000
SHIPPED = ("cautious", "cost-first", "fast-staging")


def main() -> None:
    """Print a line for each policy."""
    for name in sys.argv[1:] or SHIPPED:
        policy = load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), name)
        schedule = policy.spec.schedule.model_copy(update={"freeze": ()})
        policy = policy.model_copy(update={"spec": policy.spec.model_copy(update={"schedule": schedule})})
        scenario = Scenario("healthy", "", level=0.3, excess=0.3, compares=False)
        study = Study(
            policy,
            scenario,
            Traffic(PER_HOUR, MOST_SESSIONS),
            rollouts=ROLLOUTS,
            seed=np.random.SeedSequence(3),
        )
        last, entered = len(study.plan.stage_ids) - 1, np.full(ROLLOUTS, np.inf)
        for ticks, _ in enumerate(study.play(), start=1):
            is_there = (study.fleet.stage == last) & np.isinf(entered)
            entered[is_there] = ticks * study.plan.tick_s
            if not np.isinf(entered).any():
                break
        hours = float(np.median(entered)) / 3600
        print(f"| `{name}` | {hours * PER_HOUR:,.0f} sessions, {hours:.2f} h |", flush=True)


if __name__ == "__main__":
    main()
