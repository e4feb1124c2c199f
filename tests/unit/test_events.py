"""The event log: what is appended is chained, and whatever is changed afterwards is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sentei.monitors.errors import StaleLeaseError
from sentei.monitors.store import Store
from sentei.monitors.tables import EVENTS
from sentei.pipeline.events import BrokenChainError, EventLog


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
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
    monkeypatch.setattr("sentei.pipeline.events._PAGE", 3)
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
