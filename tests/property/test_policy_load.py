"""Whatever a policy file says, it loads or gives a readable error, and nothing else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.policies.schema.load import PolicyError, load_policy
from sentei.policies.schema.policy import Policy
from tests.strategies_policy import TEXTS, mutated_texts, policies, to_text


def loads_or_explains(text: str) -> None:
    """Load the text; an error must name its line, a message and survive being printed."""
    found: PolicyError | None = None
    try:
        policy = load_policy(text, "p.yaml")
    except PolicyError as error:
        found = error
    if found is None:
        assert load_policy(to_text(policy)) == policy
        return
    assert found.errors
    for item in found.errors:
        assert item.line >= 1
        assert item.message
        assert "p.yaml:" in str(item)


@settings(max_examples=60)
@given(policies())
def test_a_policy_survives_a_yaml_round_trip(policy: Policy) -> None:
    """Dumped and loaded it is equal, to the digest, and dumping again gives the same text."""
    text = to_text(policy)
    loaded = load_policy(text)

    assert loaded == policy
    assert loaded.digest == policy.digest
    assert to_text(loaded) == text


@settings(max_examples=80)
@given(mutated_texts())
def test_a_mutated_policy_loads_or_explains_itself(text: str) -> None:
    """Values replaced, dropped or renamed: no other exception; what loads survives a YAML round trip."""
    loads_or_explains(text)


@settings(max_examples=80)
@given(st.sampled_from(TEXTS), st.data())
def test_a_text_with_a_hole_or_a_graft_loads_or_explains_itself(text: str, data: st.DataObject) -> None:
    """Characters cut out or put in anywhere never raise anything but PolicyError."""
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))

    loads_or_explains(text[:begin] + data.draw(st.text(max_size=6)) + text[end:])
