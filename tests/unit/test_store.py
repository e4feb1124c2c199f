"""The store: numbers, units, commands, routes, the lease, and errors that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from sentei.monitors.errors import StaleLeaseError, StoreError, StoreVersionError
from sentei.monitors.records import DriftResult, Rollout
from sentei.monitors.store import Store
from sentei.monitors.tables import COUNTERS
from sentei.policies.signals import RoutingTable, SliceRoute
from tests.fakes_records import ROLLOUT, make_audit, make_request

TABLE = RoutingTable(ROLLOUT, 3, "salt", 5.0, (SliceRoute("long", 512, 32768, 0.25, "medium", 0.1),))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def test_request_comes_back_as_it_was_written(store: Store) -> None:
    """Every field of a record survives the database."""
    record = make_request(1, error="sparse died", outcome="fallback_mid", ttft_ms=None)

    assert store.add_request(record)

    row = store.read_requests(ROLLOUT)[0]
    assert {name: row[name] for name in record.__dataclass_fields__} == {
        name: getattr(record, name) for name in record.__dataclass_fields__
    }


def test_what_attention_kept_comes_back_with_its_request(store: Store) -> None:
    """The compact record is stored with its request once, and a request without one has an empty text."""
    kept = make_request(1, attention='{"sparse_calls":4}')
    store.add_request(kept)
    store.add_request(kept)
    store.add_request(make_request(2))

    found = store.read_request("q1")

    assert found is not None
    assert found["attention"] == '{"sparse_calls":4}'
    assert [row["attention"] for row in store.read_requests(ROLLOUT)] == ['{"sparse_calls":4}', ""]
    assert store.read_request("q3") is None


def test_writing_a_request_twice_changes_nothing(store: Store) -> None:
    """A writer that is not sure may write again: the first record stays."""
    store.add_request(make_request(1))

    assert not store.add_request(make_request(1, outcome="failed"))

    assert [row["outcome"] for row in store.read_requests(ROLLOUT)] == ["ok"]


def test_session_is_the_unit(store: Store) -> None:
    """Of a session's requests only the first counts as arrival, and as unit once per rung and share."""
    for i, changes in enumerate([{}, {}, {"share": 0.5}, {"rung_id": "bold"}, {"slice_id": "huge"}]):
        store.add_request(make_request(i, session_id="same", **changes))

    rows = store.read_requests(ROLLOUT)

    assert [row["is_arrival"] for row in rows] == [True, False, False, False, True]
    assert [row["is_unit"] for row in rows] == [True, False, True, True, True]


def test_first_scored_audit_of_a_session_is_its_unit(store: Store) -> None:
    """A missing audit counts only as long as its session has no score, and a score always counts once."""
    for i, status in enumerate(["missing", "missing", "scored", "scored", "missing"]):
        store.add_audit(make_audit(i, session_id="same", status=status))

    assert [row["is_unit"] for row in store.read_audits(ROLLOUT)] == [True, False, True, False, False]


def test_audit_that_never_comes_is_written_down_as_missing_once(store: Store) -> None:
    """A chosen request without a score in time becomes one missing score, and a late score is refused."""
    store.add_request(make_request(1, at_s=1000.0))
    store.add_request(make_request(2, at_s=1000.0, chosen_for_audit=False))
    store.add_request(make_request(3, at_s=1050.0))

    counts = [store.expire_audits(ROLLOUT, older_than_s=1040.0, now_s=1100.0) for _ in range(2)]

    assert counts == [1, 0]
    assert [(row["request_id"], row["status"]) for row in store.read_audits(ROLLOUT)] == [("q1", "missing")]
    assert not store.add_audit(make_audit(1))


def test_numbers_grow_over_all_kinds_of_rows(store: Store) -> None:
    """One sequence orders requests, scores and commands, so one cursor covers them."""
    store.add_request(make_request(1))
    store.add_audit(make_audit(1))
    command = store.add_command(ROLLOUT, "pause", by="ann", at_s=1.0)

    numbers = [store.read_requests(ROLLOUT)[0]["seq"], store.read_audits(ROLLOUT)[0]["seq"], command]

    assert numbers == sorted(set(numbers))


def test_routing_table_survives_and_each_publication_renews(store: Store) -> None:
    """What is published is read back equal, and the number of renewals grows each time."""
    assert store.read_routing() is None
    token = store.acquire_lease("me", ttl_s=10, now_s=0)
    assert token is not None

    for _ in range(3):
        store.publish_routing(TABLE, token=token, now_s=1.0)

    assert store.read_routing() == (TABLE, 3)


def test_stopped_rollout_is_dense_whatever_is_published(store: Store) -> None:
    """An operator's stop needs no lease and outlives a controller that has not heard of it, until a retry."""
    token = store.acquire_lease("me", ttl_s=10, now_s=0)
    assert token is not None
    store.publish_routing(TABLE, token=token, now_s=1.0)
    store.add_command(ROLLOUT, "abort", by="ann", at_s=2.0, stops=True)
    store.publish_routing(replace(TABLE, version=4), token=token, now_s=3.0)
    stopped = store.read_routing()
    store.publish_routing(replace(TABLE, rollout_id="next"), token=token, now_s=4.0)
    other = store.read_routing()
    store.publish_routing(TABLE, token=token, now_s=5.0)
    store.add_command(ROLLOUT, "retry", by="ann", at_s=6.0)

    assert stopped is not None
    assert other is not None
    assert stopped[0].routes == (SliceRoute("long", 512, 32768, 0.0, "dense", 0.0),)
    assert other[0].routes == TABLE.routes
    assert store.read_routing() == (TABLE, 4)


def test_clock_that_stepped_back_does_not_keep_a_lease_for_an_hour(store: Store) -> None:
    """A dead owner's lease lasts as long as it was given for, by the monotonic time of who waits for it."""
    store.acquire_lease("dead", ttl_s=10, now_s=4000.0)

    found = [store.acquire_lease("new", ttl_s=10, now_s=400.0 + i, monotonic_s=i) for i in (0.0, 9.0, 10.0)]

    assert [token is not None for token in found] == [False, False, True]


def test_owner_that_renews_keeps_its_lease_under_any_clock(store: Store) -> None:
    """As long as somebody renews, a waiting controller with a clock of its own gets nothing."""
    for i in range(30):
        store.acquire_lease("alive", ttl_s=10, now_s=4000.0 + i)
        assert store.acquire_lease("new", ttl_s=10, now_s=400.0 + i, monotonic_s=float(i)) is None


def test_routing_never_goes_back_to_an_older_version(store: Store) -> None:
    """An older version of the same rollout is refused; another rollout starts where it likes."""
    token = store.acquire_lease("me", ttl_s=10, now_s=0)
    assert token is not None
    store.publish_routing(TABLE, token=token, now_s=1.0)

    with pytest.raises(StoreError, match="version 2 is older than the published 3"):
        store.publish_routing(replace(TABLE, version=2), token=token, now_s=2.0)

    store.publish_routing(replace(TABLE, rollout_id="next", version=1), token=token, now_s=3.0)


def test_lease_has_one_holder_and_a_growing_token(store: Store) -> None:
    """Nobody gets the lease while it runs; its holder keeps the token; the next holder gets a higher one."""
    first = store.acquire_lease("a", ttl_s=10, now_s=0)

    assert store.acquire_lease("b", ttl_s=10, now_s=5) is None
    assert store.acquire_lease("a", ttl_s=10, now_s=9) == first
    second = store.acquire_lease("b", ttl_s=10, now_s=20)
    assert first is not None
    assert second is not None
    assert second > first


def test_old_token_cannot_publish(store: Store) -> None:
    """A controller that has lost its lease is refused, and the routes stay as they are."""
    old = store.acquire_lease("a", ttl_s=1, now_s=0)
    new = store.acquire_lease("b", ttl_s=9, now_s=5)
    assert old is not None
    assert new is not None
    store.publish_routing(TABLE, token=new, now_s=5)

    with pytest.raises(StaleLeaseError, match="another controller has taken over"):
        store.publish_routing(replace(TABLE, version=9), token=old, now_s=6)

    assert store.read_routing() == (TABLE, 1)


def test_rollout_cannot_change_its_policy(store: Store) -> None:
    """A rollout id stands for one policy text."""
    store.add_rollout(Rollout("a", "policy 1", 1.0, {"model": "pocket"}))

    assert not store.add_rollout(Rollout("a", "policy 1", 1.0, {}))
    with pytest.raises(StoreError, match="exists with another policy"):
        store.add_rollout(Rollout("a", "policy 2", 2.0, {}))

    assert [r.policy_text for r in store.read_rollouts()] == ["policy 1"]


def test_drift_results_and_values_are_kept(store: Store) -> None:
    """Drift results come back after a number, named values by name."""
    result = DriftResult(ROLLOUT, "kl_drift", 1.0, "drift", 3.0, 2.0, 10, 1, "why", "/x.html")
    seq = store.add_drift(result)
    store.save_value("cursor", "1")
    store.save_value("cursor", "2")

    assert store.read_drift(ROLLOUT) == [(seq, result)]
    assert store.read_drift(ROLLOUT, after=seq) == []
    assert (store.read_value("cursor"), store.read_value("nothing")) == ("2", None)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A store that cannot be opened says which one and what to do."""
    with pytest.raises(StoreError, match=r"nowhere/state\.db.*Check that the folder exists"):
        Store.open(f"sqlite:///{tmp_path}/nowhere/state.db")


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    """A file of another kind is refused with the way out."""
    (tmp_path / "state.db").write_text("this is no database, and long enough to be looked at" * 50)

    with pytest.raises(StoreError, match="no SQLite database"):
        Store.open(f"sqlite:///{tmp_path}/state.db")


@pytest.mark.parametrize("url", ["nosuchdb+x://me:secret@host/db", "nosuchdb+x://me@host/db?password=secret"])
def test_bad_url_is_named_without_its_password(url: str) -> None:
    """A URL that cannot be used is shown, its password is not."""
    with pytest.raises(StoreError, match=r"nosuchdb\+x://me(:\*\*\*)?@host/db'") as caught:
        Store.open(url)

    assert "secret" not in str(caught.value)


def test_locked_database_says_so(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits too long gets an error about the lock, and nothing is written."""
    monkeypatch.setattr("sentei.monitors.database.BUSY_TIMEOUT_MS", 1)

    with (
        Store.open(f"sqlite:///{tmp_path}/state.db") as impatient,
        store.write("test"),
        pytest.raises(StoreError, match="holds the write lock"),
    ):
        impatient.add_request(make_request(1))

    assert store.read_requests(ROLLOUT) == []


def test_full_database_says_so(store: Store) -> None:
    """A disk without room gives an error about space."""
    with store.read("size") as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    with pytest.raises(StoreError, match="disk is full"):
        store.add_request(make_request(1, error="x" * 500_000))

    assert store.read_requests(ROLLOUT) == []


def test_other_schema_version_is_refused(store: Store, tmp_path: Path) -> None:
    """A database of another schema version is not touched."""
    with store.write("version") as connection:
        connection.execute(sa.update(COUNTERS).where(COUNTERS.c.name == "schema").values(value=99))
        connection.exec_driver_sql("DROP TABLE alembic_version")

    with pytest.raises(StoreVersionError, match="schema version 99"):
        Store.open(f"sqlite:///{tmp_path}/state.db")
