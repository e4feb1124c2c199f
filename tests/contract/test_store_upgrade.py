"""A store of an older version, on SQLite and on Postgres: it is taken up with what it has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from sentei.monitors.store import Store
from tests.fakes_records import ROLLOUT, make_arrival, make_audit, make_request

NEW_IN_AUDITS = ("prompt_tokens", "share", "audit_probability", "span_start", "reason", "artifact")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").new_database())
    return f"sqlite:///{tmp_path}/state.db"


def test_store_of_before_gets_columns_and_arrivals(url: str) -> None:
    """Opened by this version it has the new columns, its sessions as arrivals, and takes records."""
    with Store.open(url) as store:
        store.add_request(make_request(1))
        store.add_request(make_request(2, session_id="s1"))
        store.add_audit(make_audit(1))
        with store.write("test") as connection:
            connection.execute(sa.text("DROP TABLE arrivals"))
            connection.execute(sa.text("ALTER TABLE requests DROP COLUMN audit_probability"))
            for name in NEW_IN_AUDITS:
                connection.execute(sa.text(f"ALTER TABLE audits DROP COLUMN {name}"))

    with Store.open(url) as store:
        store.add_request(make_request(3, audit_probability=0.1, at_s=time.time() + 86_400))
        store.add_audit(make_audit(3, artifact="a" * 64))
        is_new = [store.add_arrival(make_arrival(i)) for i in (1, 3)]
        audits, requests = store.read_audits(ROLLOUT), store.read_requests(ROLLOUT)

    assert is_new == [False, True]
    assert [row["artifact"] for row in audits] == [None, "a" * 64]
    assert [row["audit_probability"] for row in requests] == [None, None, 0.1]
    assert requests[2]["at_s"] == pytest.approx(time.time(), abs=60)
