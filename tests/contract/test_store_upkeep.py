"""Check and prune, on SQLite and on Postgres."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sqlalchemy as sa

from sentei.monitors.events import EventLog
from sentei.monitors.records import AuditScore, MetricResult, Rollout
from sentei.monitors.store import Store
from sentei.monitors.upkeep import prune
from sentei.monitors.upkeep.check import check_store
from sentei.monitors.upkeep.prune import prune_store
from sentei.monitors.upkeep.upgrade import upgrade_store
from sentei.pipeline.reports.rollout_report import build_report
from sentei.pipeline.rollout.replay import replay
from sentei.pipeline.rollout.runner import RolloutError, RolloutRunner, RunnerOptions
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, make_arrival, make_audit, make_request
from tests.old_store import NUM_EVENTS, build_old_store

EXAMPLE = Path(__file__).parents[2] / "policies" / "examples" / "fast-staging.yaml"
OLD_S, CUT_S, YOUNG_S = 1_000.0, 2_000.0, 3_000.0
NEWEST = "(SELECT max(seq) FROM events WHERE rollout_id = 'failed')"
STATE = f"UPDATE events SET state_json = {{}} WHERE seq = {NEWEST}"
TABLES = ("requests", "audits", "arrivals", "attention", "metrics")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").new_database())
    return f"sqlite:///{tmp_path}/state.db"


def fill(store: Store, rollout_id: str, first: int) -> None:
    """A rollout with four requests, two old and two young, each audited, but for the audit of the last."""
    store.add_rollout(Rollout(rollout_id, POLICY, 0.0, about={}))
    for i in range(first, first + 4):
        at_s = (OLD_S if i < first + 2 else YOUNG_S) + i
        place = {"rollout_id": rollout_id, "at_s": at_s}
        store.add_arrival(make_arrival(i, **place))
        store.add_request(make_request(i, **place, attention='{"kept": 1}'))
        store.add_metric(MetricResult(rollout_id, "cart", at_s, "ok", 0.01, ""))
        if i < first + 3:
            # Scored after the border, as its request was before it: both go together.
            late = place | {"at_s": YOUNG_S}
            store.add_audit(make_audit(i, **late))
    orphan: AuditScore = make_audit(first + 4, rollout_id=rollout_id, at_s=OLD_S)
    store.add_audit(dataclasses.replace(orphan, request_id=f"alone-{rollout_id}"))


def sizes(store: Store) -> dict[str, int]:
    """How many rows each table has."""
    with store.read("sizes") as connection:
        return {
            name: int(connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one())
            for name in (*TABLES, "events", "rollouts", "drift", "commands")
        }


def test_prune_takes_old_records_of_rollouts_that_are_over(url: str) -> None:
    """Requests with their audits; what is young stays, and all of the newest rollout."""
    with Store.open(url) as store:
        fill(store, "first", 0)
        fill(store, "newest", 10)
        before = sizes(store)

        dry = prune_store(store, before_s=CUT_S, is_dry=True)
        assert sizes(store) == before
        done = prune_store(store, before_s=CUT_S)

        assert dry == done
        assert [(line.rollout_id, line.is_over, line.requests, line.audits) for line in done] == [
            ("first", True, 2, 3),
            ("newest", False, 2, 3),
        ]
        assert {
            name: before[name] - number for name, number in sizes(store).items() if before[name] != number
        } == {
            "requests": 2,
            "audits": 3,
            "arrivals": 2,
            "attention": 2,
            "metrics": 2,
        }
        assert [item.at_s for _, item in store.read_metrics("first")] == [YOUNG_S + 2, YOUNG_S + 3]
        assert [row["request_id"] for row in store.read_requests("first")] == ["q2", "q3"]
        assert [row["request_id"] for row in store.read_audits("first")] == ["q2"]
        assert len(store.read_requests("newest")) == 4
        assert (store.read_pruned("first"), store.read_pruned("newest")) == (CUT_S, None)
        assert all(finding.is_ok for finding in check_store(store))


def test_prune_goes_in_small_steps(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, a transaction deletes a few: writers get their turn in between."""
    monkeypatch.setattr(prune, "ROWS_AT_A_TIME", 3)
    with Store.open(url) as store:
        store.add_rollout(Rollout("first", POLICY, 0.0, about={}))
        for i in range(10):
            place = {"rollout_id": "first", "at_s": OLD_S}
            store.add_request(make_request(i, **place))
            store.add_arrival(make_arrival(i, **place))
            store.add_audit(make_audit(i, **place))
            store.add_metric(MetricResult("first", "cart", OLD_S, "ok", 0.01, ""))
        store.add_rollout(Rollout("newest", POLICY, 0.0, about={}))

        prune_store(store, before_s=CUT_S)

        assert [sizes(store)[name] for name in TABLES] == [0] * 5


def test_prune_leaves_every_event(url: str) -> None:
    """The log is whole, the running rollout ticks on, and who needs what is gone says so."""
    build_old_store(url)
    upgrade_store(url, keeps_copy=False)
    with Store.open(url) as store:
        policy = load_policy(EXAMPLE.read_text(encoding="utf-8"), str(EXAMPLE))
        replay(store, "failed", policy)

        prune_store(store, before_s=1_002_000.0)

        assert EventLog(store).verify() == NUM_EVENTS
        assert store.read_requests("failed") == []
        with pytest.raises(RolloutError, match=r"cannot be replayed: .* 1970-01-12 14:20 UTC were pruned"):
            replay(store, "failed", policy)
        assert build_report(store, "failed").pruned_before_s == 1_002_000.0
        result = RolloutRunner.open(store, "midway", RunnerOptions("new")).tick(1_002_061.0)
        assert (result.error, result.decision is not None) == ("", True)


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        ("UPDATE events SET payload_json = '{}' WHERE seq = 7", "event log", "event 7 is broken"),
        ("DELETE FROM events WHERE seq = 22", "event log", "event 22 is missing"),
        ("DELETE FROM rollouts WHERE rollout_id = 'failed'", "rollouts", "failed is not written down"),
        ("UPDATE counters SET value = 5 WHERE name = 'writes'", "numbering", "counter 5, highest 8"),
        ("DROP INDEX events_decisions", "tables", "events_decisions"),
        ("ALTER TABLE audits DROP COLUMN artifact", "tables", "audits.artifact"),
        ("UPDATE routing SET table_json = 'x'", "routing table", "midway"),
        ("UPDATE routing SET table_json = '{}'", "routing table", "midway"),
        (STATE.format("'{}'"), "rollouts", "the newest state of failed cannot be read"),
        (
            STATE.format("replace(state_json, '\"stage_id\"', '\"stage\"')"),
            "rollouts",
            "state of failed cannot",
        ),
        (
            STATE.format("replace(state_json, '\"failed\"', '\"midway\"')"),
            "rollouts",
            "failed is one of midway",
        ),
        ("INSERT INTO kv VALUES ('events.count.failed', '99')", "numbers of events", "failed: 99 kept"),
        ("INSERT INTO kv VALUES ('events.count.failed', 'many')", "numbers of events", "many"),
    ],
)
def test_check_finds_what_is_wrong(url: str, change: str, name: str, word: str) -> None:
    """One fault is told where it is, and hides nothing else."""
    build_old_store(url)
    upgrade_store(url, keeps_copy=False)
    with Store.open(url) as store:
        assert [finding for finding in check_store(store) if not finding.is_ok] == []
        with store.write("fault") as connection:
            connection.execute(sa.text(change))

        wrong = {finding.name: finding.found for finding in check_store(store) if not finding.is_ok}

    assert word in wrong[name]
    assert set(wrong) <= {name, "numbers of events", "rollouts", "event log"}
