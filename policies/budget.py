"""Who may spend how much of alpha: over guardrails, slices and fresh starts."""

from __future__ import annotations

from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Guardrail


def num_tests(policy: Policy, guardrail: Guardrail) -> int:
    """In how many places this guardrail is tested at a time."""
    return 1 if guardrail.per == "all" else len(policy.routed_slices)


def num_starts(policy: Policy, guardrail: Guardrail) -> int:
    """How often its evidence may start afresh within one rollout."""
    family = guardrail.metric.family
    if family == "assignment":
        return 1
    if family == "operational":
        return max(1, sum(stage.share > 0 for stage in policy.spec.stages))
    used = {policy.rung_ids.index(stage.rung) for stage in policy.spec.stages}
    has_rung_down = any(item.action == "previous_rung" for item in policy.spec.guardrails.items)
    return max(used) + 1 if has_rung_down else len(used)


def harm_alpha(policy: Policy, guardrail: Guardrail) -> float:
    """The part of alpha_total that one test of this guardrail may spend on a false alarm (F10).

    Source: docs/statistics.md F10, the union bound over guardrails, slices and fresh starts. Guarantee:
    the parts of all tests with all their fresh starts sum to alpha_total, so over a whole rollout something
    that is within every bound is called harmful by an e-process with at most that probability.
    """
    items = policy.spec.guardrails.items
    if guardrail.alpha is not None:
        each = guardrail.alpha / num_tests(policy, guardrail)
    else:
        rest = policy.spec.guardrails.alpha_total - sum(item.alpha or 0.0 for item in items)
        each = rest / sum(num_tests(policy, item) for item in items if item.alpha is None)
    return each / num_starts(policy, guardrail)
