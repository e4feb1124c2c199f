"""Health, arrivals and news: what one session, a faster variant or a wrong clock cannot do to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sentei.monitors.health import (
    MAX_PER_SESSION,
    read_health,
    read_newest_at,
    read_traffic,
    read_unscored_since,
)
from sentei.monitors.store import Store
from sentei.monitors.upkeep.upgrade import upgrade_store
from sentei.policies.evidence import SRM_TILTS, Split, log_threshold
from sentei.policies.signals import VariantHealth
from tests.fakes_records import ROLLOUT, make_arrival, make_audit, make_request
from tests.old_store import build_old_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def sparse_health(store: Store, now_s: float = 1010.0) -> VariantHealth:
    """What sparse did in the last 60 seconds."""
    with store.read("health") as connection:
        return read_health(connection, ROLLOUT, window_s=60.0, now_s=now_s, replicas={})[1]


def test_one_session_cannot_carry_the_breaker(store: Store) -> None:
    """Forty failures of one client are no failure of the variant, and count as three requests."""
    for i in range(40):
        store.add_request(make_request(i, at_s=1000.0, session_id="one", outcome="failed"))

    health = sparse_health(store)

    assert (health.requests, health.failures) == (MAX_PER_SESSION, 0)


def test_failures_of_many_sessions_are_the_variants(store: Store) -> None:
    """Each session brings its newest requests, so a busy healthy one cannot hide failing others."""
    for i in range(40):
        store.add_request(make_request(i, at_s=1000.0, session_id="busy"))
    for i in range(40, 50):
        store.add_request(make_request(i, at_s=1000.0, outcome="fallback_before"))

    health = sparse_health(store)

    assert (health.requests, health.failures) == (MAX_PER_SESSION + 10, 10)


def test_request_that_nobody_could_answer_is_no_failure(store: Store) -> None:
    """What depends on the request alone is not held against the variant that it was assigned to."""
    for i in range(10):
        store.add_request(make_request(i, at_s=1000.0, outcome="refused"))

    assert sparse_health(store).failures == 0


def test_session_arrives_once_in_a_slice(store: Store) -> None:
    """A session that comes back, also at another share, has the place that it had: not counted again."""
    first, again = make_arrival(1), make_arrival(1, at_s=9000.0, share=0.5)

    assert (store.add_arrival(first), store.add_arrival(again)) == (True, False)

    with store.read("traffic") as connection:
        (found,) = read_traffic(connection, ROLLOUT, after=0, upto=99)
    assert (found.share, found.candidate, found.total) == (0.25, 1, 1)


def test_faster_variant_is_no_skewed_split(store: Store) -> None:
    """Answers of 10 s against 20 s: arrivals at assignment keep the ratio, at the end they would not."""
    rng = np.random.default_rng(0)
    is_sparse = rng.random(400) < 0.5
    at_end_s = np.arange(400) / 10 + np.where(is_sparse, 10.0, 20.0)  # ten sessions a second
    for i, sparse in enumerate(is_sparse):
        arm = "sparse" if sparse else "dense"
        store.add_arrival(make_arrival(i, share=0.5, at_s=float(i) / 10, variant_assigned=arm))

    with store.read("traffic") as connection:
        (found,) = read_traffic(connection, ROLLOUT, after=0, upto=10_000)
    early = is_sparse[at_end_s < 20]

    assert (found.candidate, found.total) == (int(is_sparse.sum()), 400)
    evidence = [
        Split.start(SRM_TILTS).update(hits, units, 0.5).log_e_max
        for hits, units in ((found.candidate, found.total), (int(early.sum()), len(early)))
    ]
    assert (evidence[0] < log_threshold(1e-3), evidence[1] > log_threshold(1e-3)) == (True, True)


def test_record_from_the_future_is_no_news(store: Store) -> None:
    """One stamp of tomorrow does not keep a silent rollout fresh for a day."""
    store.add_request(make_request(1, at_s=1000.0))
    store.add_request(make_request(2, at_s=1000.0 + 86_400))
    store.add_audit(make_audit(3, at_s=1000.0 + 86_400))

    with store.read("news") as connection:
        assert read_newest_at(connection, ROLLOUT, now_s=1100.0) == 1000.0
        assert read_unscored_since(connection, ROLLOUT, since_s=900.0, now_s=1100.0) == 1000.0


def test_stamp_ahead_of_the_stores_clock_becomes_its_now(store: Store) -> None:
    """An ingress whose clock is a day ahead writes records of now."""
    tomorrow_s = time.time() + 86_400
    store.add_request(make_request(1, at_s=tomorrow_s))
    store.add_audit(make_audit(1, at_s=tomorrow_s))

    rows = [store.read_requests(ROLLOUT)[0], store.read_audits(ROLLOUT)[0]]

    assert all(abs(row["at_s"] - time.time()) < 60 for row in rows)


def test_audit_that_nobody_scored_keeps_how_it_was_drawn(store: Store) -> None:
    """A chosen request without a score says its length, its share, its probability, and that time ran out."""
    store.add_request(make_request(1, at_s=1000.0, prompt_tokens=77, share=0.5, audit_probability=0.05))

    store.expire_audits(ROLLOUT, older_than_s=1040.0, now_s=1100.0)

    (row,) = store.read_audits(ROLLOUT)
    assert (row["prompt_tokens"], row["share"], row["audit_probability"]) == (77, 0.5, 0.05)
    assert (row["status"], row["reason"]) == ("missing", "timeout")


def test_older_store_gets_the_new_columns_and_keeps_its_arrivals(tmp_path: Path) -> None:
    """What was not recorded then is not known, no number; sessions that arrived do not arrive again."""
    url = f"sqlite:///{tmp_path}/state.db"
    build_old_store(url)
    with Store.connect(url) as old, old.read("test") as connection:
        sessions = connection.exec_driver_sql("SELECT count(*) FROM requests WHERE is_arrival").scalar_one()
    upgrade_store(url)

    for _ in range(2):
        with Store.open(url) as store, store.read("test") as connection:
            traffic = read_traffic(connection, "midway", after=0, upto=1 << 40)
            total = connection.exec_driver_sql("SELECT count(*) FROM arrivals").scalar_one()
            audit = store.read_audits("midway")[0]

    assert (total, audit["prompt_tokens"], audit["artifact"]) == (sessions, None, None)
    assert sum(item.total for item in traffic) > 0
