"""Rollouts of an older version go on: same phase, same stage, same evidence, and the next tick works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.monitors.upkeep.upgrade import upgrade_store
from sentei.pipeline.reports.rollout_report import build_report
from sentei.pipeline.rollout.replay import replay
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.pipeline.tracking.mirror import Mirror
from sentei.policies.engine import QuarantineError, state_to_json
from sentei.policies.schema.kept import SCHEMA, KeptPolicyError, read_kept
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.policies.state import Quarantined
from tests.fakes_records import FakeTracker, make_audit, make_request
from tests.old_store import OLD, build_old_store

MIDWAY_S = 1_002_061.0  # the lease of the old controller has run out
UP = {"dense": 1, "sparse": 1}
# The old file in today's words.
REWRITTEN = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: failed}
spec:
  ladder: [{id: mild}, {id: medium}, {id: bold}]
  slices:
    buckets:
      - {id: short, range: [0, 512], pin: control}
      - {id: long, range: [512, 8192]}
      - {id: huge, range: [8192, 32768], max_rung: mild}
  assignment: {salt: fixture}
  stages:
    - {id: shadow, share: 0, rung: mild}
    - {id: c25, share: 25%, rung: mild, hold_min: 10s}
    - {id: c50, share: 50%, rung: mild, hold_min: 20s, max: 1h}
    - {id: c50-medium, share: 50%, rung: medium, hold_min: 20s, approval: {by: [ann]}}
    - {id: full, share: 95%, rung: medium, bake: 20s}
  advance: {need: all_safe, min_units: 20, min_served_units: 2}
  audit: {select: {fraction: 1.0}}
  guardrails:
    items:
      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.10, floor_cap: 0.10},
         test: betting_paired, action: rollback}
      - {id: quality, value: audit.kl, bound: {excess_over_floor: 0.20, floor_cap: 0.20},
         test: betting_paired, action: previous_rung}
      - {id: mass, value: audit.dropped_mass_mean, bound: {max: 15%}, test: betting, action: rollback_slice}
      - {id: errors, value: serve.failed, bound: {ratio: 2}, test: event_split, per: all, action: rollback,
         advance: no_harm}
      - {id: ttft_slo, value: serve.ttft_ms, bound: {over: 20s, max: 10%}, test: beta_binomial,
         action: rollback_slice, advance: no_harm}
      - {id: srm, value: assignment, test: split_ramp, alpha: 0.001, action: freeze}
  benefit:
    - {id: compute, value: audit.compute_ratio, want: {max: 0.90}, need: not_disproved}
  signals:
    - {id: kl_drift, column: kl, action: rollback, consecutive: 3, window_units: 10}
  breaker: {variant: {window: 30s, min_requests: 50, failure_share: 50%}}
  data: {max_age: 60s, no_data: {grace: 60s, after: 300s}, monitor_lease: 5s}
  rollback: {retry: {max: 2, cool_off: 5s}}
  schedule: {check_every: 1s, freeze: ["Sat 00:00-Sun 00:00 UTC"]}
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The store as the old version left it, upgraded."""
    url = f"sqlite:///{tmp_path}/state.db"
    build_old_store(url)
    upgrade_store(url)
    with Store.open(url) as opened:
        yield opened


def raw_state(store: Store, rollout_id: str) -> dict[str, Any]:
    """The newest state, word for word."""
    event = EventLog(store).latest(rollout_id)
    assert event is not None
    state: dict[str, Any] = json.loads(event.state)
    return state


def serve(store: Store, second: int, rung_id: str = "mild") -> None:
    """Four sessions of the story of the fixture go on: half of each slice on sparse, all well."""
    for i in range(4):
        arm = ("dense", "sparse")[i // 2]
        same: dict[str, Any] = {
            "at_s": MIDWAY_S + second,
            "rollout_id": "midway",
            "slice_id": ("long", "huge")[i % 2],
            "rung_id": rung_id if i % 2 == 0 else "mild",
            "variant_served": arm,
        }
        number = 10_000 + second * 4 + i
        store.add_request(make_request(number, variant_assigned=arm, share=0.5, **same))
        store.add_audit(make_audit(number, **same))


def test_a_rollout_that_is_midway_goes_on_where_it_was(store: Store) -> None:
    """The next tick has the same stage and adds to the same evidence; the stage ends as its edit says."""
    before = raw_state(store, "midway")
    runner = RolloutRunner.open(store, "midway", RunnerOptions("new"))
    serve(store, 0)

    result = runner.tick(MIDWAY_S + 0.5)

    assert (result.error, result.has_lease) == ("", True)
    assert result.decision is not None
    state = result.decision.state
    assert (state.phase, state.stage_id, state.waits_for) == ("running", "c50", "time")
    assert state.stage_entered_s == before["stage_entered_s"]
    assert state.policy_digest == before["policy_digest"]
    agree = state.cell("agree", "long", "mild")
    assert agree is not None
    assert agree.units == 2 * 56 + 2  # of then, also what the newest event had not read, and of now

    for second in range(1, 110):
        serve(store, second)
        if second % 10 == 9:
            result = runner.tick(MIDWAY_S + second + 0.5)

    assert result.decision is not None
    assert (result.decision.state.stage_id, runner.num_errors) == ("c50-medium", 0)
    assert EventLog(store).verify() > 22


def test_evidence_is_read_to_the_byte(store: Store) -> None:
    """A tick without news comes to the very cells that the old version's last tick had in memory."""
    before = json.loads((OLD / "midway.json").read_text(encoding="utf-8"))

    result = RolloutRunner.open(store, "midway", RunnerOptions("new")).tick(MIDWAY_S)

    assert result.decision is not None
    now = {cell_key(cell): cell for cell in json.loads(state_to_json(result.decision.state))["cells"]}
    for cell in before["cells"]:
        assert known_then(now[cell_key(cell)], cell) == cell


def known_then(now: Any, then: Any) -> Any:
    """What is remembered now, without the fields that came later."""
    if isinstance(then, dict):
        return {name: known_then(now[name], value) for name, value in then.items()}
    return now


def cell_key(cell: dict[str, Any]) -> tuple[str, ...]:
    """Where the evidence belongs; what the old version collected is of both arms together."""
    return (cell["guardrail_id"], cell["slice_id"], cell["rung_id"], cell.get("arm", "all"))


def test_a_rollback_that_waits_for_dense_is_carried_out(store: Store) -> None:
    """What the old version wrote as prose is owed still, and said once dense is back."""
    runner = RolloutRunner.open(store, "sheltered", RunnerOptions("new", replicas=lambda: UP))

    result = runner.tick(MIDWAY_S)

    assert result.decision is not None
    state = result.decision.state
    assert (state.phase, state.outcome, state.by) == ("rolled_back", "rolled_back", "agree")
    assert state.reason.endswith("; dense is back")
    assert {item.rung_id for item in state.quarantine} == {"mild"}


def test_what_failed_under_the_old_version_stays_in_quarantine(store: Store) -> None:
    """The same policy in today's words has another digest, and cannot start all the same."""
    first = next(iter(EventLog(store).read("failed")))
    old, new = PolicyBook(store).find("failed", first.payload["policy_digest"]), load_policy(REWRITTEN)

    assert old.digest != new.digest == old.own_digest
    with pytest.raises(QuarantineError, match='rolled back at rung "mild" before'):
        start_rollout(store, REWRITTEN, now_s=MIDWAY_S)
    state = RolloutRunner.open(store, "failed", RunnerOptions("new")).state()
    assert state is not None
    assert state.quarantine == (Quarantined(old.digest, "mild"),)


def test_a_rollout_that_was_taken_up_is_edited_in_todays_words(store: Store) -> None:
    """The edit is compared with the policy as it was kept: only what differs is a change."""
    text = REWRITTEN.replace("name: failed", "name: fixture").replace("hold_min: 20s", "hold_min: 120s")
    store.add_revision("midway", text.replace("min_units: 20", "min_units: 30"), by="bob", at_s=MIDWAY_S)
    runner = RolloutRunner.open(store, "midway", RunnerOptions("new"))

    results = [runner.tick(MIDWAY_S + second) for second in range(2)]

    edit = next(iter(EventLog(store).read("midway", after=22, kinds=("edit",))))
    assert edit.payload["reason"] == "policy edited by bob: spec.advance.min_units: 24 -> 30"
    assert [result.error for result in results] == ["", ""]
    state = runner.state()
    assert state is not None
    assert (state.stage_id, state.policy_digest) == ("c50", runner.policy.own_digest)
    assert len(state.former_digests) == 2


def test_the_old_words_are_refused_in_a_new_file() -> None:
    """What could say one thing only is no word any more, but `slices.by`; the fault names what is known."""
    with pytest.raises(PolicyError) as caught:
        load_policy((OLD / "policy.yaml").read_text(encoding="utf-8"))

    gone = [item.path for item in caught.value.errors]
    assert len(gone) == 16
    assert 'unknown key "misfire"; allowed: check_every, freeze' in str(caught.value)


def test_mirror_report_and_replay_read_the_old_log(store: Store) -> None:
    """Everything that tells of a rollout reads its policies as they were kept."""
    tracker = FakeTracker()

    result = Mirror(store, tracker).run_once()

    assert (result.num_events, result.reason) == (22, "")
    digests = {run["tags"].get("policy_digest") for run in tracker.runs.values()} - {None}
    started = {e.payload["policy_digest"] for e in EventLog(store).read(kinds=("started",))}
    assert digests == started
    report = build_report(store, "failed")
    assert (report.outcome, report.by) == ("rolled_back", "agree")
    told = replay(store, "failed", load_policy(REWRITTEN))
    assert (told.is_same_policy, told.first_difference) == (True, None)


def test_the_log_keeps_the_resolved_policy(store: Store) -> None:
    """A rollout that starts now carries every default, so that no later one changes it."""
    store.add_command("midway", "abort", by="ann", at_s=MIDWAY_S)
    RolloutRunner.open(store, "midway", RunnerOptions("new")).tick(MIDWAY_S)
    start_rollout(store, REWRITTEN.replace("salt: fixture", "salt: other"), now_s=MIDWAY_S, rollout_id="new")
    RolloutRunner.open(store, "new", RunnerOptions("new")).tick(MIDWAY_S)

    payload = next(iter(EventLog(store).read("new"))).payload

    assert payload["policy_schema"] == SCHEMA
    assert payload["policy"]["spec"]["audit"]["missing"] == {"max_share": 0.1, "window": "1h"}
    del payload["policy_text"]  # nothing reads it
    assert read_kept(payload).digest == payload["policy_digest"]
    with pytest.raises(KeptPolicyError, match=r"kept in schema 5, this Sentei reads up to 4"):
        read_kept({**payload, "policy_schema": SCHEMA + 1})


def test_a_younger_rule_does_not_stop_what_runs() -> None:
    """A kept policy is held to the rules of its start: what no file may say any more goes on."""
    policy = load_policy(REWRITTEN)
    document = policy.model_dump(mode="json", by_alias=True)
    document["spec"]["assignment"]["salt"] = "a\nb"  # refused in a file

    kept = read_kept({"policy_schema": SCHEMA, "policy": document, "policy_digest": "d"})

    assert (kept.digest, kept.spec.assignment.salt) == ("d", "a\nb")
