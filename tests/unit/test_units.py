"""What a unit is when it is read: a session counts once per arm, half and period of a phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sentei.monitors.signals_reader import SignalQuery, read_signals
from sentei.monitors.store import Store
from sentei.policies.signals import Observation, Signals, SliceLengths
from tests.fakes_records import ROLLOUT, make_audit, make_request

BEGIN_S = 1000.0
QUERY = SignalQuery(
    rollout_id=ROLLOUT,
    value_names=frozenset({"audit.kl", "serve.failed"}),
    health_window_s=30.0,
    audit_limit_s=1e9,
    since_s=BEGIN_S,
    unit_period_s=600.0,
    borders={"long": 8000.0},
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def write(
    store: Store, i: int, at_s: float, *, tokens: int = 4000, user: str = "ann", **audit: object
) -> None:
    """One request of a user, and its audit."""
    where = {"session_id": user, "at_s": at_s}
    store.add_request(make_request(i, prompt_tokens=tokens, **where))
    store.add_audit(make_audit(i, **where, **audit))


def read(store: Store, cursor: int = 0, *, now_s: float = 5000.0, query: SignalQuery = QUERY) -> Signals:
    """Read everything above the cursor."""
    return read_signals(store, query, cursor=cursor, now_s=now_s)


def audited(signals: Signals) -> list[Observation]:
    """The units of audits."""
    return [item for item in signals.observations if item.value_name == "audit.kl"]


def test_a_session_counts_again_after_its_period(store: Store) -> None:
    """Of two audits within ten minutes the first is the unit; a later period gives another."""
    for i, at_s in enumerate((1001.0, 1100.0, 1601.0)):
        write(store, i, at_s)

    assert [item.at_s for item in audited(read(store))] == [1001.0, 1601.0]


def test_a_new_phase_counts_everybody_again(store: Store) -> None:
    """The same user within the same minute is a unit of the stage before and of this one."""
    write(store, 0, 990.0)
    cursor = read(store).cursor
    write(store, 1, 1001.0)

    assert [item.at_s for item in audited(read(store, cursor))] == [1001.0]
    before = replace(QUERY, since_s=900.0)
    assert audited(read(store, cursor, query=before)) == []


def test_either_half_of_a_slice_is_seen(store: Store) -> None:
    """A conversation that grows over the border gives a unit on each side of it."""
    for i, tokens in enumerate((4000, 5000, 8000)):
        write(store, i, 1001.0 + i, tokens=tokens)
    write(store, 3, 1004.0, tokens=20_000, user="bob")

    signals = read(store)
    assert [item.half for item in audited(signals)] == ["lower", "upper", "upper"]
    assert signals.lengths == (SliceLengths("long", 4, 2),)


def test_the_border_is_the_median_of_what_was_served_before(store: Store) -> None:
    """Before a phase enough requests say where a slice splits; those within it move nothing."""
    for i in range(30):
        write(store, i, 900.0 + i, tokens=100 * (i + 1), user=f"s{i}")
    for i in range(30, 60):
        write(store, i, 1001.0 + i, tokens=100_000, user=f"s{i}")
    write(store, 60, 1200.0, tokens=1700, user="new")

    halves = {item.session_id: item.half for item in audited(read(store))}
    assert halves["new"] == "upper"
    assert read(store).lengths == (SliceLengths("long", 31, 31),)


def test_each_arm_has_its_own_unit(store: Store) -> None:
    """Who was served by dense first is a unit again once sparse serves him."""
    write(store, 0, 1001.0, variant_served="dense")
    write(store, 1, 1002.0, variant_served="sparse")

    assert [item.variant for item in audited(read(store))] == ["dense", "sparse"]


def test_reading_in_parts_finds_the_same_units(store: Store) -> None:
    """Whether a row is a unit does not depend on how far the read before it had come."""
    for i in range(40):
        write(store, i, 1001.0 + 40 * i, user=f"s{i % 7}", tokens=4000 + 300 * i)
    whole = audited(read(store))

    parts, cursor = [], 0
    for _ in range(80):
        signals = read(store, cursor, query=replace(QUERY, num_numbers=3))
        parts += audited(signals)
        cursor = signals.cursor

    assert parts == whole
    assert len(whole) > 20


def test_a_missing_audit_counts_until_there_is_a_score_and_says_why(store: Store) -> None:
    """The unit is missing, then scored; a second missing one adds nothing."""
    for i, status in enumerate(("missing", "missing", "scored")):
        write(store, i, 1001.0 + i, status=status)

    assert [item.missing for item in audited(read(store))] == [True, False]


def test_units_carry_the_share_that_was_recorded(store: Store) -> None:
    """Of an audit and of a request: what the session was assigned under, not what the stage has now."""
    write(store, 0, 1001.0)

    assert {item.share for item in read(store).observations} == {0.25}


def test_a_record_from_the_future_is_no_news(store: Store) -> None:
    """A stamp a day ahead must not keep silence from being noticed."""
    write(store, 0, 1001.0)
    write(store, 1, 90_000.0, user="bob")

    assert read(store, now_s=1100.0).newest_data_at_s == 1001.0


def test_audits_that_are_due_and_never_scored_have_a_clock(store: Store) -> None:
    """It runs from the first chosen request after the newest score, and stops with the next score."""
    write(store, 0, 1001.0)
    assert read(store).unscored_since_s is None
    for i, at_s in ((1, 1050.0), (2, 1060.0)):
        store.add_request(make_request(i, at_s=at_s))

    assert read(store).unscored_since_s == 1050.0
    store.add_audit(make_audit(2, at_s=1070.0))
    assert read(store).unscored_since_s is None
