"""A store of an older version, on SQLite and on Postgres: refused with the command, and upgraded by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from sentei.monitors.errors import StoreError, StoreVersionError
from sentei.monitors.events import BrokenChainError, EventLog
from sentei.monitors.migrations.revision import HEAD
from sentei.monitors.store import Store
from sentei.monitors.tables import METADATA
from sentei.monitors.upkeep.check import check_store
from sentei.monitors.upkeep.upgrade import MIGRATIONS, run_migrations, upgrade_store
from tests.fakes_records import ROLLOUT, make_arrival, make_audit, make_request
from tests.old_store import NUM_EVENTS, build_old_store

MIDWAY_LEASE_S = 1_002_056.0  # within the lease of the controller that the old store had


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").new_database())
    return f"sqlite:///{tmp_path}/state.db"


@contextmanager
def raw(url: str) -> Iterator[sa.Connection]:
    """A transaction past the store."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_an_older_store_is_refused_with_the_command(url: str) -> None:
    """Whoever opens it is told what to run, and nothing in it is changed."""
    build_old_store(url)

    with pytest.raises(
        StoreVersionError, match=r"revision 0001, .* run: sentei store upgrade --store"
    ) as caught:
        Store.open(url)

    assert caught.value.is_absent
    with raw(url) as connection:
        assert not sa.inspect(connection).has_table("arrivals")


def test_an_upgrade_keeps_rollouts_and_the_chain(url: str) -> None:
    """Its three rollouts are there, the log is whole, sessions are arrivals, and it takes records."""
    build_old_store(url)

    done = upgrade_store(url)

    assert (done.before, done.after, done.events) == ("0001", HEAD, NUM_EVENTS)
    with Store.open(url) as store:
        assert EventLog(store).verify() == NUM_EVENTS
        assert [item.rollout_id for item in store.read_rollouts()] == ["failed", "sheltered", "midway"]
        requests = store.read_requests("midway")
        arrived = [row for row in requests if row["is_arrival"]]
        newest = make_arrival(1, rollout_id="midway", session_id=arrived[0]["session_id"], slice_id="long")
        assert store.add_arrival(newest) is False
        assert {row["audit_probability"] for row in requests} == {None}
        store.add_request(make_request(3, audit_probability=0.1, at_s=time.time() + 86_400))
        store.add_audit(make_audit(3, artifact="a" * 64))
        assert [row["artifact"] for row in store.read_audits(ROLLOUT)] == ["a" * 64]
        assert all(finding.is_ok for finding in check_store(store)), check_store(store)


def test_an_upgraded_store_is_left_alone(url: str) -> None:
    """The second upgrade has nothing to do."""
    build_old_store(url)
    upgrade_store(url)

    again = upgrade_store(url)

    assert (again.before, again.after, again.backup) == (HEAD, HEAD, None)


def test_a_file_is_copied_first(tmp_path: Path) -> None:
    """The copy is the old store; without one if nobody wants it."""
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two")]
    for url in urls:
        build_old_store(url)

    copied, plain = upgrade_store(urls[0]), upgrade_store(urls[1], keeps_copy=False)

    assert plain.backup is None
    assert copied.backup is not None
    with pytest.raises(StoreVersionError, match="revision 0001"):
        Store.open(f"sqlite:///{copied.backup}")


def test_migrations_and_tables_say_the_same(url: str) -> None:
    """What the revisions make, one after another, is what a new store has at once."""
    with raw(url) as connection:
        run_migrations(connection)

        found = compare_metadata(MigrationContext.configure(connection), METADATA)

    assert found == []


def test_the_newest_revision_is_head() -> None:
    """The number that stores are held against is that of the last file."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))

    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_a_store_of_just_before_there_were_revisions_is_known_by_its_columns(url: str) -> None:
    """One that has all tables of then and only lacks the mark is upgraded from there, and marked."""
    with raw(url) as connection:
        METADATA.create_all(connection)
        connection.execute(sa.text("DROP TABLE metrics"))
        connection.execute(sa.text("INSERT INTO counters VALUES ('writes', 7), ('schema', 1)"))

    with pytest.raises(StoreVersionError, match="revision 0002"):
        Store.open(url)
    upgrade_store(url)

    with Store.open(url) as store:
        assert store.add_arrival(make_arrival(1))

    with raw(url) as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == [
            HEAD
        ]
        schema = sa.text("SELECT value FROM counters WHERE name = 'schema'")
        assert connection.execute(schema).scalar() == 2  # a version of before refuses it


def test_a_store_of_the_first_days_gets_all_tables(url: str) -> None:
    """It had no edits and no thinned attention yet."""
    build_old_store(url)
    with raw(url) as connection:
        for name in ("attention", "revisions"):
            connection.execute(sa.text(f"DROP TABLE {name}"))

    upgrade_store(url)

    with Store.open(url) as store:
        assert all(finding.is_ok for finding in check_store(store))


def test_an_upgrade_that_fails_changes_nothing(url: str) -> None:
    """Half of it was done when it failed; it is undone."""
    build_old_store(url)
    with raw(url) as connection:
        connection.execute(sa.text("CREATE TABLE other (seq INTEGER)"))
        connection.execute(sa.text("CREATE INDEX arrivals_by_seq ON other (seq)"))

    with pytest.raises(StoreError, match="arrivals_by_seq"):
        upgrade_store(url, keeps_copy=False)

    with raw(url) as connection:
        inspector = sa.inspect(connection)
        assert not {"arrivals", "alembic_version"} & set(inspector.get_table_names())
        assert "artifact" not in {column["name"] for column in inspector.get_columns("audits")}


def test_no_upgrade_under_an_app(url: str) -> None:
    """While the lease of a controller runs it is refused, unless one insists."""
    build_old_store(url)

    with pytest.raises(StoreError, match=r"lease of controller 'builder' runs for \d+ s more"):
        upgrade_store(url, clock=lambda: MIDWAY_LEASE_S)

    assert upgrade_store(url, clock=lambda: MIDWAY_LEASE_S, is_forced=True).after == HEAD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE leases SET owner = 'late', expires_at_s = 9e9", "lease of controller 'late' runs"),
        ("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)", "changed while it was looked at"),
    ],
)
def test_who_comes_while_it_is_looked_at_is_seen(url: str, change: str, words: str) -> None:
    """The last look is inside the transaction of the upgrade: what came since the first one is not missed."""
    build_old_store(url)
    num_calls = 0

    def clock() -> float:
        """Somebody writes just before the transaction, after all that was looked at."""
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            with raw(url) as connection:
                connection.execute(sa.text(change))
        return MIDWAY_LEASE_S + 3600.0

    with pytest.raises(StoreError, match=words):
        upgrade_store(url, keeps_copy=False, clock=clock)

    with raw(url) as connection:
        assert "alembic_version" not in sa.inspect(connection).get_table_names()


def test_a_broken_log_is_not_upgraded(url: str) -> None:
    """Whoever upgrades learns of it before anything is changed."""
    build_old_store(url)
    with raw(url) as connection:
        connection.execute(sa.text("UPDATE events SET payload_json = '{}' WHERE seq = 7"))

    with pytest.raises(BrokenChainError, match="event 7 is broken"):
        upgrade_store(url)

    with pytest.raises(StoreVersionError):
        Store.open(url)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "9999"),
        ("UPDATE alembic_version SET version_num = 'a1b2'", "a1b2"),
    ],
)
def test_a_newer_store_is_refused(url: str, change: str, word: str) -> None:
    """By open and by upgrade; nothing is done to it."""
    Store.open(url).close()
    with raw(url) as connection:
        connection.execute(sa.text(change))

    for use in (Store.open, upgrade_store):
        with pytest.raises(StoreVersionError, match=rf"does not know \(.*{word}"):
            use(url)


def test_what_is_no_store_is_not_upgraded(url: str) -> None:
    """An empty database gets no tables by mistake."""
    with raw(url) as connection:
        connection.execute(sa.text("CREATE TABLE other (seq INTEGER)"))

    with pytest.raises(StoreVersionError, match="no tables of Sentei"):
        upgrade_store(url)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    """Upkeep, and whoever only reads, makes no file."""
    used: tuple[Any, ...] = (upgrade_store, Store.connect, lambda url: Store.open(url, must_exist=True))

    for use in used:
        with pytest.raises(StoreError, match="is not there"):
            use(f"sqlite:///{tmp_path}/none.db")

    assert list(tmp_path.iterdir()) == []
