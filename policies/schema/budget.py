"""Who may spend how much of alpha: over tries, guardrails, slices, arms and fresh starts (F10)."""

from __future__ import annotations

from typing import Protocol

from sentei.policies.schema.sections import Benefit, Guardrail, Guardrails, Slice, Stage


class Terms(Protocol):
    """The sections that the budget is about."""

    @property
    def mode(self) -> str:
        """Whether sparse serves anybody."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In their order."""

    @property
    def guardrails(self) -> Guardrails:
        """Who is tested, and alpha_total."""

    @property
    def benefit(self) -> tuple[Benefit, ...]:
        """Which gains are asked for."""


class Tested(Protocol):
    """What the budget must know of a policy; the rules of the schema ask before there is one."""

    @property
    def spec(self) -> Terms:
        """Its sections."""

    @property
    def rung_ids(self) -> tuple[str, ...]:
        """The ladder, mild to aggressive."""

    @property
    def routed_slices(self) -> tuple[Slice, ...]:
        """The slices that may go to the candidate."""


def try_alpha(policy: Tested, try_number: int = 1) -> float:
    """What one try may spend: half of alpha_total for the first, half of the rest for each that follows.

    So all tries of one artifact together, however many there are, spend at most alpha_total. Every proof of
    safety is made at this level, and harm_alpha splits it.
    """
    return policy.spec.guardrails.alpha_total / 2.0 ** min(try_number, 60)


def num_tests(policy: Tested, guardrail: Guardrail) -> int:
    """In how many places this guardrail is tested at a time: slices, and both arms of quality (F16)."""
    if guardrail.per == "all":
        return 1
    has_arms = guardrail.metric.family == "quality" and policy.spec.mode == "enforce"
    return len(policy.routed_slices) * (2 if has_arms else 1)


def rungs_in_reach(policy: Tested) -> tuple[str, ...]:
    """The rungs that a slice may be served at within one try, mild to aggressive: those of the stages.

    Where a guardrail may send a slice a rung down, every rung from the mildest to the boldest of the stages.
    """
    used = {policy.rung_ids.index(stage.rung) for stage in policy.spec.stages}
    has_rung_down = any(item.action == "previous_rung" for item in policy.spec.guardrails.items)
    places = range(max(used) + 1) if has_rung_down else sorted(used)
    return tuple(policy.rung_ids[place] for place in places)


def _num_rungs(policy: Tested) -> int:
    return len(rungs_in_reach(policy))


def num_starts(policy: Tested, guardrail: Guardrail) -> int:
    """How often its evidence of harm may start afresh within one try."""
    family = guardrail.metric.family
    if family == "assignment":
        return 1
    if family == "operational":
        return max(1, sum(stage.share > 0 for stage in policy.spec.stages))
    return _num_rungs(policy)


def harm_alpha(policy: Tested, guardrail: Guardrail, try_number: int = 1) -> float:
    """The part of alpha_total that one test of this guardrail may spend on a false alarm (F10).

    Source: docs/statistics.md F10, the union bound over tries, guardrails, slices, arms and fresh starts.
    Guarantee: the parts of all tests with all their fresh starts sum to what the try may spend, and the tries
    to alpha_total, so something that is within every bound is ever called harmful by an e-process with at
    most that probability.
    """
    items = policy.spec.guardrails.items
    total = policy.spec.guardrails.alpha_total
    if guardrail.alpha is not None:
        each = guardrail.alpha / num_tests(policy, guardrail)
    else:
        rest = total - sum(item.alpha or 0.0 for item in items)
        each = rest / sum(num_tests(policy, item) for item in items if item.alpha is None)
    return each / num_starts(policy, guardrail) * try_alpha(policy, try_number) / total


def no_gain_alpha(policy: Tested, try_number: int = 1) -> float:
    """What one test may spend on calling a gain absent that is there (F17).

    Source: docs/statistics.md F17, the union bound over benefits, slices, arms and the rungs that a slice may
    come to, also by falling back.
    Guarantee: all tests of all tries together hold a candidate that has its gains with probability at most
    alpha_total, beside and not out of what guardrails may spend: it stops growth and takes nobody off sparse.
    A proof of the gain is made at `try_alpha`, as every proof of safety is.
    """
    arms = 2 if policy.spec.mode == "enforce" else 1
    tests = max(1, len(policy.spec.benefit)) * max(1, len(policy.routed_slices)) * arms * _num_rungs(policy)
    return try_alpha(policy, try_number) / tests
