"""Quantities and the small questions that a policy answers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentei.policies.schema.load import policy_json_schema
from sentei.policies.schema.metrics import COLUMNS, METRICS
from sentei.policies.schema.units import (
    format_duration,
    parse_duration,
    parse_number,
    parse_share,
    parse_window,
)
from tests.strategies_policy import make_policy


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("20s", 20.0), ("30m", 1800.0), ("12h", 43_200.0), ("2d", 172_800.0)],
)
def test_a_duration_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    """Each unit reads as seconds and is written back the same way."""
    assert parse_duration(text) == seconds
    assert format_duration(seconds) == text


@given(st.integers(0, 10**9).map(lambda count: count / 1000))
def test_a_duration_survives_its_text(seconds: float) -> None:
    """Formatting and parsing give the same seconds."""
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("bad", [30, "30", "s", "-5s", "1e3s", "", None, "5 s"])
def test_a_bare_number_is_no_duration(bad: object) -> None:
    """Without a unit the meaning would be a guess."""
    with pytest.raises(ValueError, match="a number with a unit"):
        parse_duration(bad)


def test_shares_and_numbers_may_be_percentages() -> None:
    """2 % and 0.02 are the same; out of range or of another kind is refused."""
    assert parse_share("2%") == parse_share(0.02) == parse_number("2%")
    for bad in ("101%", 1.5, -0.1, True, "half"):
        with pytest.raises(ValueError, match="a share is a number"):
            parse_share(bad)


@pytest.mark.parametrize(
    ("day", "hour", "is_frozen"),
    [(23, 15, False), (23, 16, True), (25, 12, True), (26, 7, True), (26, 8, False)],
)
def test_a_weekly_window_runs_over_the_end_of_the_week(day: int, hour: int, is_frozen: bool) -> None:
    """Friday 16:00 to Monday 08:00: its begin counts, its end does not."""
    window = parse_window("Fri 16:00-Mon 08:00 UTC")

    assert window.has(datetime(2026, 10, day, hour, tzinfo=UTC).timestamp()) is is_frozen


def test_a_window_knows_its_time_zone() -> None:
    """16:00 in Tokyo is 07:00 UTC."""
    window = parse_window("Fri 16:00-Fri 17:00 Asia/Tokyo")

    assert window.has(datetime(2026, 10, 23, 7, 30, tzinfo=UTC).timestamp())
    assert not window.has(datetime(2026, 10, 23, 16, 30, tzinfo=UTC).timestamp())


def test_a_policy_knows_its_stages_and_slices() -> None:
    """Lookup by id, routed slices without pinned ones, audits by stage or by default."""
    policy = make_policy()

    assert [item.id for item in policy.routed_slices] == ["mid", "long"]
    assert policy.rung_ids == ("mild", "medium")
    assert policy.stage("half").share == 0.5
    assert policy.audit_share(policy.stage("half")) == 1.0
    with pytest.raises(KeyError):
        policy.stage("nowhere")


def test_every_name_in_the_registries_says_what_it_is() -> None:
    """Metrics have a family and a unit; quality columns are those that may roll back."""
    assert all(metric.name == name and metric.unit for name, metric in METRICS.items())
    assert {name for name, kind in COLUMNS.items() if kind == "input"} == {"prompt_tokens"}


def test_no_field_can_say_one_thing_only() -> None:
    """But for those that a reader of the file would miss; a word that cannot be otherwise is no setting."""
    schema = policy_json_schema()
    models = [schema, *schema["$defs"].values()]

    single = {name for model in models for name, field in model["properties"].items() if "const" in field}

    assert single == {"apiVersion", "kind", "unit", "by", "value"}
