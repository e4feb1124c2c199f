"""The event log on SQLite and on Postgres: what is appended is chained, and whatever is changed is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sentei.monitors import events
from sentei.monitors.errors import StaleLeaseError
from sentei.monitors.events import BrokenChainError, EventLog
from sentei.monitors.store import Store
from sentei.monitors.tables import EVENTS, VALUES
from sentei.monitors.upkeep.upgrade import upgrade_store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store on each database: the same cases hold on both."""
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").new_database()
    else:
        url = f"sqlite:///{tmp_path}/state.db"
    with Store.open(url) as opened:
        yield opened


def fill(store: Store, num_events: int) -> EventLog:
    """Append events of two rollouts in turn."""
    token = store.acquire_lease("me", ttl_s=10, now_s=0)
    assert token is not None
    log = EventLog(store)
    for i in range(num_events):
        log.append(f"r{i % 2}", "advance", payload={"i": i}, state_after=f'{{"n":{i}}}', token=token, at_s=i)
    return log


def test_newest_event_of_a_rollout_holds_its_state(store: Store) -> None:
    """A restart goes on from what the newest event of that rollout left behind."""
    log = fill(store, 6)

    assert log.latest_state("r1") == '{"n":5}'
    assert log.latest_state("r0") == '{"n":4}'
    assert log.latest_state("never") is None
    assert [event.payload["i"] for event in log.read("r0", after=1)] == [2, 4]


def test_log_reads_over_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is longer than a page is read whole and in order."""
    monkeypatch.setattr("sentei.monitors.events._PAGE", 3)
    log = fill(store, 10)

    assert [event.seq for event in log.read()] == list(range(1, 11))
    assert log.verify() == 10


@pytest.mark.parametrize(
    ("column", "value"),
    [("payload_json", '{"i":7}'), ("state_json", "{}"), ("at_s", 99.0), ("rollout_id", "x")],
)
def test_changed_event_is_found(store: Store, column: str, value: object) -> None:
    """Changing any part of an event breaks the chain at that event."""
    log = fill(store, 5)
    with store.write("forgery") as connection:
        connection.execute(sa.update(EVENTS).where(EVENTS.c.seq == 3).values(**{column: value}))

    with pytest.raises(BrokenChainError, match="event 3 is broken: its content was changed"):
        log.verify()


def test_event_that_was_rehashed_breaks_the_next_one(store: Store) -> None:
    """A forger who repairs the hash of a changed event is found at the event after it."""
    log = fill(store, 5)
    with store.write("forgery") as connection:
        connection.execute(sa.update(EVENTS).where(EVENTS.c.seq == 4).values(prev_hash="0" * 64))

    with pytest.raises(BrokenChainError, match="event 4 is broken: it does not continue"):
        log.verify()


@pytest.mark.parametrize(("gone", "message"), [(2, "event 2 is broken"), (5, "event 5 is missing")])
def test_removed_event_is_found(store: Store, gone: int, message: str) -> None:
    """An event taken out of the middle, or cut off at the end, is missed."""
    log = fill(store, 5)
    with store.write("forgery") as connection:
        connection.execute(sa.delete(EVENTS).where(EVENTS.c.seq == gone))

    with pytest.raises(BrokenChainError, match=message):
        log.verify()


def test_controller_without_the_lease_cannot_append(store: Store) -> None:
    """The fencing token is checked in the transaction of the append: a stale one leaves no trace."""
    log = fill(store, 1)
    old = store.acquire_lease("me", ttl_s=10, now_s=5)
    store.acquire_lease("other", ttl_s=10, now_s=100)
    assert old is not None

    with pytest.raises(StaleLeaseError):
        log.append("r0", "advance", payload={}, state_after="{}", token=old, at_s=101)

    assert log.verify() == 1


def test_export_is_one_json_document_per_line(store: Store, tmp_path: Path) -> None:
    """The export holds every event with its hash."""
    log = fill(store, 3)

    assert log.export(tmp_path / "events.jsonl") == 3

    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["prev_hash"] for line in lines[1:]] == [line["hash"] for line in lines[:-1]]


def play(store: Store) -> RolloutRunner:
    """A rollout that was edited once, and is running."""
    start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT, about={"model": "m"})
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    for second in range(3):
        for i in range(second * 8, second * 8 + 8):
            store.add_request(make_request(i, at_s=START_S + second, share=0.5))
            store.add_audit(make_audit(i, at_s=START_S + second))
        runner.tick(START_S + second + 0.5)
    store.add_revision(ROLLOUT, POLICY.replace("bake: 2s", "bake: 4s"), by="ann", at_s=START_S + 3)
    assert not runner.tick(START_S + 3.5).error
    return runner


def test_an_export_is_the_same_log_in_another_store(store: Store, tmp_path: Path) -> None:
    """Imported, the chain verifies, exports to the same bytes, and the rollout goes on where it stood."""
    runner, path = play(store), tmp_path / "events.jsonl"
    num_events = EventLog(store).export(path)
    with Store.open(f"sqlite:///{tmp_path}/other.db") as other:
        log = EventLog(other)

        assert log.load(path) == num_events
        assert log.verify() == num_events
        log.export(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
        assert log.load(path) == 0  # nothing is new

        taken_up = RolloutRunner.open(other, ROLLOUT, RunnerOptions("me"))
        assert taken_up.state() == runner.state()
        make_records(other, 40)
        result = taken_up.tick(START_S + 5)
    assert taken_up.policy == runner.policy
    assert taken_up.policy.spec.stages[-1].bake == 4.0
    assert result.decision is not None
    state = runner.state()
    assert state is not None
    assert result.decision.state.cursor > state.cursor  # new records have higher numbers than old ones
    assert result.decision.state.revision == state.revision


def make_records(store: Store, i: int) -> None:
    """One more session."""
    store.add_request(make_request(i, at_s=START_S + 4, share=0.5))
    store.add_audit(make_audit(i, at_s=START_S + 4))


def test_a_longer_export_adds_only_its_end(store: Store, tmp_path: Path) -> None:
    """A log that is the beginning of the file is carried on; one that is not is left alone."""
    log, path = fill(store, 3), tmp_path / "events.jsonl"
    log.export(path)
    with Store.open(f"sqlite:///{tmp_path}/other.db") as other:
        assert EventLog(other).load(path) == 3
        token = store.acquire_lease("me", ttl_s=10, now_s=1)
        assert token is not None
        log.append("r0", "advance", payload={}, state_after="{}", token=token, at_s=9)
        log.export(path)

        assert EventLog(other).load(path) == 1
        assert EventLog(other).verify() == 4

    with Store.open(f"sqlite:///{tmp_path}/third.db") as third:
        theirs = fill(third, 5)
        with pytest.raises(BrokenChainError, match="5 events of another story"):
            theirs.load(path)
        assert theirs.verify() == 5


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda text: text.replace('"i":1', '"i":9'), "event 2 is broken: its content was changed"),
        (lambda text: "\n".join(text.splitlines()[::2]), "event 2 is broken"),
        (lambda text: text + "not json\n", "line 4 is no event"),
        (lambda text: text + "{}\n", "line 4 is no event"),
    ],
)
def test_a_forged_export_is_not_imported(
    store: Store, tmp_path: Path, forge: Callable[[str], str], message: str
) -> None:
    """The chain is checked before anything is written."""
    fill(store, 3).export(tmp_path / "events.jsonl")
    text = forge((tmp_path / "events.jsonl").read_text())
    (tmp_path / "forged.jsonl").write_text(text)
    with Store.open(f"sqlite:///{tmp_path}/other.db") as other:
        with pytest.raises(BrokenChainError, match=message):
            EventLog(other).load(tmp_path / "forged.jsonl")

        assert EventLog(other).verify() == 0


def test_nothing_but_a_written_row_uses_up_a_number(store: Store) -> None:
    """Leases, renewals, named values and records that are there already leave the numbering as it is."""
    store.add_request(make_request(1))
    store.acquire_lease("me", ttl_s=1, now_s=0)
    store.acquire_lease("other", ttl_s=1, now_s=5)
    store.save_value("x", "1")
    store.add_request(make_request(1))

    assert store.add_command(ROLLOUT, "pause", by="ann", at_s=0.0) == 2


def cut(store: Store, num_events: int) -> None:
    """Delete the newest events."""
    with store.write("forgery") as connection:
        newest = connection.execute(sa.select(sa.func.max(EVENTS.c.seq))).scalar_one()
        connection.execute(sa.delete(EVENTS).where(EVENTS.c.seq > newest - num_events))


def test_decisions_come_in_pages_and_are_counted(store: Store) -> None:
    """A page holds the newest decisions below a number, without the evidence in between."""
    token = store.acquire_lease("me", ttl_s=10, now_s=0)
    assert token is not None
    log = EventLog(store)
    for i in range(20):
        kind = "evidence" if i % 4 else "hold"  # decisions are events 1, 5, 9, 13 and 17
        log.append("r0", kind, payload={}, state_after="{}", token=token, at_s=i)
    fill(store, 2)

    newest = log.decisions("r0", limit=3)
    older = log.decisions("r0", before=newest[0].seq, limit=3)

    assert [[event.seq for event in page] for page in (newest, older)] == [[13, 17, 21], [1, 5, 9]]
    assert (log.count("r0"), log.count("r1"), log.count("never")) == (21, 1, 0)


def test_a_store_of_before_gets_its_indexes_and_its_count(store: Store) -> None:
    """What keeps status quick is made when the store is upgraded; the number goes on from the rows."""
    log = fill(store, 6)
    with store.write("a version of before") as connection:
        connection.execute(sa.delete(VALUES).where(VALUES.c.name.like("events.count.%")))
        for name in ("events_decisions", "events_by_kind"):
            connection.execute(sa.text(f"DROP INDEX {name}"))
        for table in ("alembic_version", "metrics"):  # a store of before has neither
            connection.execute(sa.text(f"DROP TABLE {table}"))
        connection.execute(sa.text("UPDATE counters SET value = 1 WHERE name = 'schema'"))
    url = store._engine.url.render_as_string(hide_password=False)
    upgrade_store(url, keeps_copy=False, is_forced=True)

    with Store.open(url) as again:
        with again.read("indexes") as connection:
            names = {item["name"] for item in sa.inspect(connection).get_indexes("events")}
        assert {"events_decisions", "events_by_kind", "events_by_rollout"} <= names
        assert log.count("r0") == 3
        token = again.acquire_lease("me", ttl_s=10, now_s=1)
        assert token is not None
        EventLog(again).append("r0", "x", payload={}, state_after="{}", token=token, at_s=9)
        assert log.count("r0") == 4


def test_a_page_is_found_and_not_looked_for(tmp_path: Path) -> None:
    """Neither a page of decisions nor the events of a kind walk over the evidence of a rollout."""
    with Store.open(f"sqlite:///{tmp_path}/plan.db") as store:
        seen: list[str] = []
        log = fill(store, 3)

        def note(connection: sa.Connection, cursor: object, text: str, values: object, *_: object) -> None:
            if text.startswith("SELECT events"):
                rows = connection.connection.cursor().execute(f"EXPLAIN QUERY PLAN {text}", values)
                seen.append(" ".join(str(row[3]) for row in rows))

        sa.event.listen(store._engine, "before_cursor_execute", note)
        log.decisions("r0", before=9)
        list(log.read("r0", kinds=("started", "edit")))

    assert ["events_decisions" in seen[0], "events_by_kind" in seen[1]] == [True, True], seen


@pytest.mark.parametrize("num_cut", [1, 2, 5])
def test_a_log_that_was_cut_is_not_carried_on(store: Store, num_cut: int) -> None:
    """The next append refuses what `verify` finds, says the way out, and so heals nothing."""
    log = fill(store, 5)
    cut(store, num_cut)
    token = store.acquire_lease("me", ttl_s=10, now_s=1)
    assert token is not None

    for attempt in (
        log.verify,
        lambda: log.resume("r0"),
        lambda: log.append("r0", "x", payload={}, state_after="{}", token=token, at_s=9),
    ):
        with pytest.raises(BrokenChainError, match=r"is missing: .* head is event 5\. Restore .* or export"):
            attempt()


def test_a_head_that_is_gone_is_missed(store: Store) -> None:
    """Who cuts the log and takes its kept head away is found too."""
    log = fill(store, 3)
    with store.write("forgery") as connection:
        connection.execute(sa.delete(VALUES).where(VALUES.c.name == "events.head"))

    for attempt in (log.verify, lambda: log.resume("r0")):
        with pytest.raises(BrokenChainError, match="not the head that was kept, unknown"):
            attempt()


@pytest.mark.parametrize(("seq", "is_hashed_again"), [(5, False), (5, True), (4, False), (4, True)])
def test_a_changed_newest_state_is_refused(store: Store, seq: int, is_hashed_again: bool) -> None:
    """Neither rollout goes on from a state that was changed, also where the forger made its hash again."""
    log = fill(store, 5)
    with store.write("forgery") as connection:
        row = dict(connection.execute(sa.select(EVENTS).where(EVENTS.c.seq == seq)).mappings().one())
        row["state_json"] = '{"n":99}'
        row["hash"] = events._hash(row) if is_hashed_again else row["hash"]
        connection.execute(sa.update(EVENTS).where(EVENTS.c.seq == seq).values(**row))

    with pytest.raises(BrokenChainError, match=f"event {5 if is_hashed_again else seq} is broken"):
        log.resume(f"r{(seq - 1) % 2}")


def test_a_tampered_state_is_not_obeyed(store: Store) -> None:
    """The tick after a forged promotion is an error: no decision, no event, no renewal of the routes."""
    runner, before = play(store), store.read_routing()
    with store.write("forgery") as connection:
        newest = connection.execute(sa.select(sa.func.max(EVENTS.c.seq))).scalar_one()
        row = connection.execute(sa.select(EVENTS).where(EVENTS.c.seq == newest)).mappings().one()
        forged = row["state_json"].replace('"stage_id":"', '"stage_id":"full').replace("fullfull", "full")
        connection.execute(sa.update(EVENTS).where(EVENTS.c.seq == newest).values(state_json=forged))

    result = runner.tick(START_S + 4)

    assert "its content was changed after it was written" in result.error
    assert result.decision is None
    assert store.read_routing() == before
