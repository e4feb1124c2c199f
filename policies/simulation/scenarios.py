"""The worlds that every policy is shown: at its bounds, on both sides of them, and going wrong late."""

from __future__ import annotations

import math

from sentei.policies.schema.policy import Policy
from sentei.policies.simulation.plan import Gate, Plan, make_plan
from sentei.policies.simulation.world import Effect, Scenario

OVER = 1.25  # a violation that is small: it must not be promoted
DOUBLE = 2.0  # one that is not: it must be found soon
GOOD_UNITS = 2000  # before a regression
AFTER_UNITS = 400


def default_scenarios(policy: Policy) -> tuple[Scenario, ...]:
    """What `sentei policy simulate` shows of a policy."""
    plan = make_plan(policy)
    last = plan.slice_ids[-1]
    proven = [gate for gate in plan.gates if "all_safe" in gate.needs and gate.kind in ("betting", "count")]
    quality = [gate for gate in plan.gates if gate.family == "quality"]
    first = (quality or proven)[0] if quality or proven else None
    found = [
        Scenario("aa", "dense against dense: nothing is wrong anywhere"),
        Scenario("near", "within every bound, at 0.8 of it", level=0.8, excess=0.8),
        *(_over(gate, last) for gate in proven),
    ]
    if first is not None:
        found += [
            Scenario(
                "bound",
                f"{first.id} exactly at its bound in {last}, requests of a session correlated by 0.5",
                (Effect(first.id, 1.0, last),),
                concentration=1.0,
                requests=20,
            ),
            _all_at_bound(plan),
            *(_double(gate, last) for gate in quality),
            _regression(plan, first, last),
            Scenario(
                "drift",
                f"{first.id} in {last} grows from well to twice its bound over 1000 sessions",
                (Effect(first.id, DOUBLE, last, grows_over=1000),),
            ),
        ]
    return (*found, *_troubles(policy))


def _over(gate: Gate, place: str) -> Scenario:
    about = f"{gate.id} at {OVER} times its bound in {place}"
    return Scenario(f"over:{gate.id}", about, (Effect(gate.id, OVER, place),))


def _double(gate: Gate, place: str) -> Scenario:
    about = f"{gate.id} at {DOUBLE:g} times its bound in {place}"
    return Scenario(f"double:{gate.id}", about, (Effect(gate.id, DOUBLE, place),))


def _all_at_bound(plan: Plan) -> Scenario:
    """Every guardrail in every slice at its bound: as near to a false rollback as a good variant can be."""
    effects = tuple(Effect(gate.id, 1.0) for gate in plan.gates if gate.kind != "ratio")
    about = "every guardrail exactly at its bound in every slice, requests correlated by 0.5"
    return Scenario("bound:all", about, effects, concentration=1.0, requests=20)


def _regression(plan: Plan, gate: Gate, place: str) -> Scenario:
    """Good for long, then twice the bound; a policy that audits few sessions sees fewer good units."""
    is_all = bool((plan.audit == 1).all())
    if not is_all:
        about = f"{gate.id} in {place} doubles its bound after 800 good sessions"
        return Scenario("regression", about, (Effect(gate.id, DOUBLE, place, begins_at=800),))
    about = f"{gate.id} in {place} doubles its bound after {GOOD_UNITS} good units"
    sessions = math.ceil((GOOD_UNITS + AFTER_UNITS) * len(plan.slice_ids))
    return Scenario(
        "regression", about, (Effect(gate.id, DOUBLE, place, begins_at=GOOD_UNITS),), sessions=sessions
    )


def _troubles(policy: Policy) -> tuple[Scenario, ...]:
    grace_h = policy.spec.data.no_data.grace / 3600
    after_h = policy.spec.data.no_data.after / 3600
    length = (grace_h + after_h) / 2
    return (
        Scenario("outage", f"nothing arrives for {length * 60:.0f} minutes", silence=(0.5, 0.5 + length)),
        Scenario("missing", "1 % of the chosen audits are never scored", missing=0.01),
        Scenario("skew", "sparse gets sessions at odds 1.65 times those of its share", tilt=0.5),
    )
