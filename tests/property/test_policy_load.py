"""Whatever a policy file says, it loads or gives a readable error, and nothing else."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.policies.load import PolicyError, dump_policy, load_policy
from tests.strategies_policy import EXAMPLES, TWO_SLICES

TEXTS = [TWO_SLICES, *(path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.yaml")))]

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["30m", "5%", "mild", "dense", "all_safe", "rollback", "audit.kl", "-1s", "1e9d"]),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside plain values."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A good policy with up to three values replaced, dropped or renamed."""
    document = yaml.safe_load(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        place = document
        for part in path[:-1]:
            place = place[part]
        kind = draw(st.sampled_from(["replace", "drop", "rename"]))
        if kind == "replace" or not isinstance(place, dict):
            place[path[-1]] = draw(odd_values)
        elif kind == "drop":
            del place[path[-1]]
        else:
            place[str(path[-1]) + draw(st.sampled_from(["s", "x", ""]))] = place.pop(path[-1])
        if not places(document):
            break
    return yaml.safe_dump(document, sort_keys=False)


def loads_or_explains(text: str) -> None:
    """Load the text; an error must name its line, a message and survive being printed."""
    found: PolicyError | None = None
    try:
        policy = load_policy(text, "p.yaml")
    except PolicyError as error:
        found = error
    if found is None:
        assert load_policy(dump_policy(policy)) == policy
        return
    assert found.errors
    for item in found.errors:
        assert item.line >= 1
        assert item.message
        assert "p.yaml:" in str(item)


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
