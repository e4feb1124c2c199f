"""Reading signals: what a tick may know, in which order, and from where it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sentei.monitors.records import DriftResult
from sentei.monitors.signals_reader import AUDIT_VALUES, SERVE_VALUES, SignalQuery, read_signals
from sentei.monitors.store import Store
from sentei.policies.schema.metrics import METRICS
from sentei.policies.signals import Signals
from tests.fakes_records import ROLLOUT, make_arrival, make_audit, make_request

QUERY = SignalQuery(
    rollout_id=ROLLOUT,
    value_names=frozenset({"audit.kl", "serve.failed", "serve.ttft_ms"}),
    health_window_s=30.0,
    audit_limit_s=60.0,
    replicas={"dense": 1, "sparse": 2},
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def read(store: Store, cursor: int = 0, now_s: float = 1010.0, query: SignalQuery = QUERY) -> Signals:
    """Read with the defaults of this module."""
    return read_signals(store, query, cursor=cursor, now_s=now_s)


def values(signals: Signals, name: str) -> list[float]:
    """The values of one name."""
    return [o.value for o in signals.observations if o.value_name == name]


def test_every_registered_value_can_be_read() -> None:
    """A policy may watch any registered value, so each one has a reader (assignment comes from traffic)."""
    assert set(AUDIT_VALUES) | set(SERVE_VALUES) == set(METRICS) - {"assignment"}


def test_empty_store_says_nothing(store: Store) -> None:
    """Without data there are no observations, no age and no movement."""
    signals = read(store)

    assert (signals.observations, signals.traffic, signals.cursor) == ((), (), 0)
    assert signals.newest_data_at_s is None
    assert [(h.variant, h.requests, h.replicas_ready) for h in signals.health] == [
        ("dense", 0, 1),
        ("sparse", 0, 2),
    ]


def test_same_cursor_gives_the_same_observations(store: Store) -> None:
    """Reading is repeatable: a tick that was killed reads the same again."""
    for i in range(5):
        store.add_request(make_request(i))
        store.add_audit(make_audit(i))

    assert read(store) == read(store)


def test_observations_come_in_order_and_once(store: Store) -> None:
    """Two reads in a row see each unit exactly once, in the order of their numbers."""
    for i in range(4):
        store.add_request(make_request(i))
        store.add_audit(make_audit(i, kl=float(i)))
    first = read(store)
    for i in range(4, 7):
        store.add_audit(make_audit(i, kl=float(i)))

    second = read(store, cursor=first.cursor)

    assert values(first, "audit.kl") + values(second, "audit.kl") == [0, 1, 2, 3, 4, 5, 6]
    assert [o.seq for o in first.observations] == sorted(o.seq for o in first.observations)
    assert read(store, cursor=second.cursor).observations == ()


def test_quiet_tick_leaves_the_cursor(store: Store) -> None:
    """Writes that say nothing new, such as a renewed lease, do not move the cursor."""
    store.add_request(make_request(1))
    cursor = read(store).cursor
    store.acquire_lease("me", ttl_s=10, now_s=0)
    store.add_request(make_request(2, session_id="s1"))
    store.add_request(make_request(3, rollout_id="other"))

    assert read(store, cursor=cursor).cursor == cursor


def test_backlog_is_read_in_bounded_steps(store: Store) -> None:
    """A long outage is caught up piece by piece, and no unit is lost on the way."""
    for i in range(30):
        store.add_audit(make_audit(i, kl=float(i)))
    query, cursor, seen = replace(QUERY, num_numbers=7), 0, list[float]()

    for _ in range(20):
        signals = read(store, cursor=cursor, query=query)
        cursor = signals.cursor
        seen += values(signals, "audit.kl")

    assert seen == [float(i) for i in range(30)]


def test_failure_counts_where_it_was_assigned(store: Store) -> None:
    """A request that dense rescued is a failure of sparse: as evidence and for the breaker."""
    for i in (1, 2):
        store.add_request(make_request(i, variant_served="dense", outcome="fallback_before"))

    signals = read(store)

    observation = next(o for o in signals.observations if o.value_name == "serve.failed")
    assert (observation.variant, observation.value) == ("sparse", 1.0)
    assert [(h.variant, h.requests, h.failures) for h in signals.health] == [
        ("dense", 0, 0),
        ("sparse", 2, 2),
    ]


def test_health_looks_back_one_window(store: Store) -> None:
    """The breaker sees every request of its window and none before."""
    store.add_request(make_request(1, at_s=900.0, outcome="failed"))
    store.add_request(make_request(2, at_s=1000.0, session_id="s1"))

    sparse = read(store, now_s=1010.0).health[1]

    assert (sparse.requests, sparse.failures) == (1, 0)


def test_no_first_token_is_late_and_a_user_who_left_says_nothing(store: Store) -> None:
    """A failed request without first token is later than any limit; a cancelled one gives no value."""
    store.add_request(make_request(1, ttft_ms=None, outcome="failed"))
    store.add_request(make_request(2, ttft_ms=None, outcome="cancelled"))

    assert values(read(store), "serve.ttft_ms") == [math.inf]
    assert values(read(store), "serve.failed") == [1.0, 0.0]


def test_missing_audit_becomes_a_missing_observation(store: Store) -> None:
    """A score that never came is said to be missing, with no number."""
    store.add_request(make_request(1, at_s=1000.0))

    signals = read(store, now_s=1100.0)

    found = next(o for o in signals.observations if o.value_name == "audit.kl")
    assert found.missing
    assert math.isnan(found.value)


def test_not_a_number_stays_an_error(store: Store) -> None:
    """A scored audit whose value is NaN is read as NaN, never as zero."""
    store.add_audit(make_audit(1, kl=math.nan))

    found = read(store).observations[0]

    assert math.isnan(found.value)
    assert not found.missing


def test_traffic_counts_each_session_once_per_share(store: Store) -> None:
    """The sample-ratio test sees arrivals, by slice and by the share that they met."""
    for i in range(6):
        variant = "sparse" if i % 2 else "dense"
        store.add_arrival(make_arrival(i, session_id=f"s{i // 2}", variant_assigned=variant))
    store.add_arrival(make_arrival(9, share=0.5))

    traffic = read(store).traffic

    assert [(t.slice_id, t.share, t.candidate, t.total) for t in traffic] == [
        ("long", 0.25, 0, 3),
        ("long", 0.5, 1, 1),
    ]


def test_newest_data_is_a_request_or_a_score(store: Store) -> None:
    """An audit given up as missing is no news."""
    store.add_request(make_request(1, at_s=1000.0))

    assert read(store, now_s=1200.0).newest_data_at_s == 1000.0


def test_newest_drift_result_per_signal_is_read(store: Store) -> None:
    """Each signal shows its last result."""
    for window_id, status in enumerate(["clear", "drift"], start=1):
        store.add_drift(DriftResult(ROLLOUT, "kl", 1.0, status, 1.0, 2.0, 10, window_id))
    store.add_drift(DriftResult(ROLLOUT, "length", 1.0, "clear", 1.0, 2.0, 10, 1))

    assert [(d.id, d.status, d.window_id) for d in read(store).drift] == [
        ("kl", "drift", 2),
        ("length", "clear", 1),
    ]


def test_commands_are_read_after_a_number(store: Store) -> None:
    """An inbox is read from where its reader stopped, for one rollout."""
    first = store.add_command(ROLLOUT, "pause", by="ann", reason="lunch", at_s=1.0)
    store.add_command("other", "abort", by="bob", at_s=2.0)
    store.add_command(ROLLOUT, "resume", by="ann", at_s=3.0)

    kinds = [
        [c.kind for c in read_signals(store, QUERY, cursor=0, command_cursor=after, now_s=4.0).commands]
        for after in (0, first)
    ]

    assert kinds == [["pause", "resume"], ["resume"]]
