"""Records are written, or their loss is counted."""

from __future__ import annotations

from sentei.monitors.records import RequestRecord
from sentei.serving.ingress.writer import RETRY_S, RecordWriter
from tests.fakes_serving import FakeStore


def record(name: str = "a") -> RequestRecord:
    """One request of no rollout."""
    return RequestRecord(
        request_id=name,
        session_id="s",
        rollout_id="",
        at_s=0.0,
        slice_id="none",
        variant_assigned="dense",
        variant_served="dense",
        rung_id="dense",
        share=0.0,
        prompt_tokens=1,
        completion_tokens=1,
        ttft_ms=1.0,
        tpot_ms=None,
        total_ms=1.0,
        outcome="ok",
    )


def test_store_that_comes_back_loses_nothing() -> None:
    """A store that is away for a moment gets the record at a later try."""
    store, pauses = FakeStore(failures_left=2), list[float]()
    writer = RecordWriter(store, sleep=pauses.append)

    writer.write(record())

    assert len(store.requests) == 1
    assert (writer.written, writer.dropped, pauses) == (1, 0, list(RETRY_S[:2]))


def test_store_that_stays_away_is_counted() -> None:
    """A record that cannot be written is counted as lost, and the writer goes on."""
    store = FakeStore(failures_left=4)
    writer = RecordWriter(store, sleep=lambda _: None)

    writer.write(record("a"))
    writer.write(record("b"))

    assert [r.request_id for r in store.requests] == ["b"]
    assert (writer.written, writer.dropped) == (1, 1)


def test_full_queue_is_counted() -> None:
    """What finds no room is counted at once, and the caller does not wait."""
    writer = RecordWriter(FakeStore(), max_waiting=1)

    assert [writer.put(record("a")), writer.put(record("b"))] == [True, False]
    assert (writer.waiting, writer.dropped) == (1, 1)


def test_stop_writes_what_waits() -> None:
    """Stopping loses nothing."""
    store = FakeStore()
    writer = RecordWriter(store)
    for name in ("a", "b", "c"):
        writer.put(record(name))
    writer.start()

    writer.stop()

    assert [r.request_id for r in store.requests] == ["a", "b", "c"]
