"""Thousands of damaged policies: each loads or explains itself in less than a second.

A few hundred in each run of the tests; all 20,000 with SENTEI_MUTATIONS=20000 (and in parts with
SENTEI_MUTATIONS_FROM=5000).
"""

from __future__ import annotations

import os
import time

from sentei.policies.schema.load import PolicyError, PolicyFault, load_policy
from tests.mutations import mutate
from tests.strategies_policy import TEXTS

COUNT = int(os.environ.get("SENTEI_MUTATIONS", "300"))
FROM = int(os.environ.get("SENTEI_MUTATIONS_FROM", "0"))
LIMIT_S = 1.0


def examine(text: str) -> str:
    """Load one text: "loads", or "explains" with lines, messages and the file's name in each."""
    faults: list[PolicyFault] = []
    try:
        load_policy(text, "p.yaml")
    except PolicyError as error:
        faults = error.errors
        assert faults, "an error without a fault"
    for item in faults:
        assert 1 <= item.line <= text.count("\n") + 2
        assert item.message
        assert str(item).startswith("p.yaml:")
        assert len(str(item)) < 900
        assert str(item).isprintable()
    return "explains" if faults else "loads"


def test_a_damaged_policy_loads_or_explains_itself_within_a_second() -> None:
    """No other exception, none slower than a second of CPU; the seed in the message makes it again."""
    found, slowest = {"loads": 0, "explains": 0}, (0.0, -1)
    for seed in range(FROM, FROM + COUNT):
        text = mutate(TEXTS[seed % len(TEXTS)], seed)
        begin_s = time.process_time()
        try:
            found[examine(text)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, (time.process_time() - begin_s, seed))

    print(f"seeds {FROM} to {FROM + COUNT - 1}: {found}, slowest {slowest[0]:.3f} s at seed {slowest[1]}")
    assert slowest[0] < LIMIT_S, f"seed {slowest[1]} took {slowest[0]:.2f} s"
    assert min(found.values()) > 0


def test_the_same_seed_does_the_same_damage() -> None:
    """A finding can be made again."""
    assert mutate(TEXTS[0], 7) == mutate(TEXTS[0], 7)
    assert len({mutate(TEXTS[0], seed) for seed in range(50)}) > 40
