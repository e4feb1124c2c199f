"""What the demo changes for a large model still is a policy."""

import pytest

from sentei.pipeline.demo.demo import demo_policy
from sentei.pipeline.demo.sizes import demo_size
from sentei.policies.schema.load import load_policy


@pytest.mark.parametrize("model", ["pocket", "gemma-3-270m"])
def test_the_demos_policy_loads(model: str) -> None:
    """Every dotted path of a size's changes leads to a place that the schema knows."""
    assert load_policy(demo_policy("calibrated", demo_size(model)), model).metadata.name == "calibrated"


def test_a_change_reaches_into_a_list() -> None:
    """The large demo widens its first guardrail's bound, as its sessions are slow."""
    policy = load_policy(demo_policy("calibrated", demo_size("gemma-3-270m")), "large")

    assert policy.spec.guardrails.items[0].bound.excess_over_floor == 0.2
