"""Replay on a real store: the same policy decides the same, another one differently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sentei.monitors.events import EventLog
from sentei.monitors.records import DriftResult
from sentei.monitors.store import Store
from sentei.pipeline.cli.app import app
from sentei.pipeline.rollout.replay import replay, to_difference
from sentei.pipeline.rollout.runner import RolloutError, RolloutRunner, RunnerOptions, start_rollout
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request

STRICT = POLICY.replace(
    "excess_over_floor: 0.10, floor_cap: 0.10", "excess_over_floor: 0.02, floor_cap: 0.02"
)
SLOW = POLICY.replace("rung: medium}\n    - {id: full", "rung: medium, hold_min: 16s}\n    - {id: full")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def record(store: Store, seconds: int = 30, disagreement: float = 0.05, policy: str = POLICY) -> None:
    """A rollout of so many seconds, with an order of an operator on the way."""
    start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT)
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    for second in range(seconds):
        for i in range(second * 8, second * 8 + 8):
            is_sparse = bool(i % 2)
            variant = "sparse" if is_sparse else "dense"
            store.add_request(make_request(i, at_s=START_S + second, share=0.5, variant_assigned=variant))
            store.add_audit(make_audit(i, at_s=START_S + second, token_disagreement=disagreement))
        if second == 2:
            store.add_command(ROLLOUT, "pause", by="ann", at_s=START_S + second)
        if second == 4:
            store.add_command(ROLLOUT, "resume", by="ann", at_s=START_S + second)
        runner.tick(START_S + second + 0.5)


def test_the_same_policy_decides_the_same(store: Store) -> None:
    """A replay of the recorded policy has the same decisions at the same times, to the end."""
    record(store)

    found = replay(store, ROLLOUT, load_policy(POLICY))

    assert found.first_difference is None
    assert [step.kind for step in found.replayed] == ["pause", "resume", "advance", "advance", "promote"]
    assert [step.reason for step in found.replayed] == [step.reason for step in found.recorded]
    assert (found.recorded_end, found.replayed_end) == ("promoted", "promoted")


def test_a_stricter_policy_would_have_rolled_back(store: Store) -> None:
    """Under a bound below the recorded disagreement the replay ends in dense, and says where they part."""
    record(store)

    found = to_difference(replay(store, ROLLOUT, load_policy(STRICT)))

    assert not found["same_policy"]
    assert found["recorded"]["outcome"] == "promoted"
    assert found["replayed"]["outcome"] == "rolled_back"
    assert found["first_difference"] == 2
    assert "agree" in found["replayed"]["decisions"][2]["reason"]


def test_a_slower_policy_would_have_gone_on_later(store: Store) -> None:
    """Holds of the other policy run their time between the recorded events."""
    record(store, seconds=45)

    found = replay(store, ROLLOUT, load_policy(SLOW))

    assert found.replayed_end == "promoted"
    assert found.replayed[-1].at_s >= found.recorded[-1].at_s + 6
    assert found.first_difference is not None


def test_drift_is_replayed_as_it_was_known(store: Store) -> None:
    """A window that came late does not count before it was there."""
    policy = POLICY.replace(
        "  breaker:",
        "  signals:\n    - {id: kl_drift, column: kl, action: rollback, window_units: 10}\n  breaker:",
    )
    record(store, seconds=3, policy=policy)
    store.add_drift(DriftResult(ROLLOUT, "kl_drift", START_S + 3, "clear", 0.0, 0.1, 10, 1))
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    runner.tick(START_S + 3.5)
    store.add_drift(DriftResult(ROLLOUT, "kl_drift", START_S + 4, "drift", 0.3, 0.1, 10, 2))
    runner.tick(START_S + 4.5)

    found = replay(store, ROLLOUT, load_policy(policy))

    assert (found.recorded_end, found.replayed_end) == ("rolled_back", "rolled_back")
    assert found.first_difference is None


def test_replay_writes_nothing(store: Store) -> None:
    """The log and the records are as they were."""
    record(store, seconds=4)
    before = (EventLog(store).verify(), len(store.read_audits(ROLLOUT)))

    replay(store, ROLLOUT, load_policy(STRICT))

    assert (EventLog(store).verify(), len(store.read_audits(ROLLOUT))) == before


def test_an_unknown_rollout_is_named(store: Store) -> None:
    """The error says which there are."""
    record(store, seconds=1)

    with pytest.raises(RolloutError, match=ROLLOUT):
        replay(store, "other", load_policy(POLICY))


def test_the_command_shows_both_histories(store: Store, tmp_path: Path) -> None:
    """`policy replay --json` gives both, and where they part."""
    record(store)
    path = tmp_path / "strict.yaml"
    path.write_text(STRICT, encoding="utf-8")

    done = CliRunner().invoke(app, ["policy", "replay", str(path), ROLLOUT, "--store", store.url, "--json"])

    found = json.loads(done.stdout)
    assert found["first_difference"] == 2
    assert found["replayed"]["outcome"] == "rolled_back"
