"""`sentei policy simulate` on a terminal: figures that are whole, and a world of one's own."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from sentei.pipeline.cli.policy import errors_table
from sentei.pipeline.cli.simulate import (
    _stays_in,
    _stuck,
    figures_table,
    own_scenario,
    rules_table,
)
from sentei.pipeline.rollout.simulate import figures
from sentei.policies.schema.load import PolicyError, load_policy
from sentei.policies.simulation.study import Tally
from sentei.policies.simulation.world import Effect, Scenario
from tests.strategies_policy import TWO_SLICES

RULES = ("argo, failureLimit 0", "argo, failureLimit 3", "flagger, threshold 10")


def row(name: str, num: int, hits: int) -> dict[str, Any]:
    """The figures of a scenario in which all that can be counted is `hits` of `num`."""
    flags = [index < hits for index in range(num)]
    tally = Tally(rollouts=num, outcome=[2] * num, false_alarm=flags, false_pass=flags)
    tally.is_watch, tally.timed_out = [False] * num, [False] * num
    tally.caught_units = tally.caught_sessions = [1234] * num
    tally.promoted_at, tally.exposed, tally.could_be = [4000] * num, 1, 1
    tally.naive = dict.fromkeys(RULES, (hits, hits, hits, hits))
    return figures(Scenario(name, "", (Effect("mass", 2.0),)), tally, 1234.5)


ROWS = [row("aa", 2000, 0), row("double:agreement", 2000, 1998), row("over:agreement", 2000, 2000)]


def lines_of(table: Table, width: int) -> list[str]:
    """The table as a terminal of that width shows it."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("table", [figures_table("yardstick", ROWS), rules_table(ROWS)])
def test_every_figure_is_whole_at_a_hundred_columns(table: Table) -> None:
    """The widest figures that there are stand on one line each, and no line is longer than the terminal."""
    lines = lines_of(table, 100)
    text = "\n".join(lines)

    assert max(len(line) for line in lines) <= 100
    assert "…" not in text
    for figure in ("0.0 (0.0-0.2)", "99.9 (99.6-100.0)", "100.0 (99.8-100.0)"):
        assert text.count(figure) >= 2, figure
    assert all(name["scenario"] in text for name in ROWS)


@pytest.mark.parametrize("width", [60, 40])
@pytest.mark.parametrize("make", [lambda rows: figures_table("yardstick", rows), rules_table])
def test_a_narrow_terminal_folds_and_loses_nothing(make: Any, width: int) -> None:
    """Cells go over several lines; every digit is still there."""
    rows = [ROWS[1]]
    wide, narrow = ("".join(lines_of(make(rows), size)) for size in (100, width))

    assert "…" not in narrow
    assert sorted(re.findall(r"\d", narrow)) == sorted(re.findall(r"\d", wide))


def test_a_long_path_of_an_error_is_folded() -> None:
    """`policy lint` shows the whole path on a narrow terminal, too."""
    with pytest.raises(PolicyError) as caught:
        load_policy(TWO_SLICES.replace("excess_over_floor: 0.2", "excess_over_floor: 7"), "p.yaml")

    text = "\n".join(lines_of(errors_table(caught.value), 60))

    assert "…" not in text
    path = caught.value.errors[0].path
    assert all(part in re.sub(r"[^\w.\[\]]", "", text) for part in path.split(".")[:2])


def test_no_option_is_no_world() -> None:
    """Without effects the shipped scenarios are played."""
    assert own_scenario([]) is None


def test_a_world_is_what_its_options_say() -> None:
    """Sizes, places, a regression, drift, correlation, missing audits and an outage, and words for them."""
    own = own_scenario(
        ["mass=1.25@huge", "agree=2"],
        begins_at=800,
        grows_over=100,
        correlation=0.5,
        missing=0.01,
        outage="30m-90m",
    )

    assert own is not None
    assert own.effects == (
        Effect("mass", 1.25, "huge", begins_at=800, grows_over=100),
        Effect("agree", 2.0, None, begins_at=800, grows_over=100),
    )
    assert (own.concentration, own.requests, own.missing, own.silence) == (1.0, 20, 0.01, (0.5, 1.5))
    for words in ("mass=1.25@huge, agree=2", "800", "over 100", "by 0.5", "0.01", "30m-90m"):
        assert words in own.about


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effects": ["mass:2"]}, "--effect looks like agree=2"),
        ({"effects": ["mass=x"]}, "not 'mass=x'"),
        ({"effects": [], "begins_at": 5}, "belong to an --effect"),
        ({"effects": [], "outage": "30m"}, "--outage looks like 30m-90m"),
        ({"effects": [], "outage": "90m-30m"}, "--outage must end after it begins"),
        ({"effects": [], "outage": "30-90"}, "a number with a unit"),
    ],
)
def test_a_world_that_cannot_be_read_is_named(options: dict[str, Any], words: str) -> None:
    """The option, what it looks like, and what was given."""
    with pytest.raises(ValueError, match=re.escape(words)):
        own_scenario(**options)


@pytest.mark.parametrize(("exposed", "stays_in"), [(0.0, "shadow"), (0.2, None)])
def test_a_policy_that_never_leaves_shadow_says_so(exposed: float, stays_in: str | None) -> None:
    """Zeros everywhere are not a good result, and the output says which stage it never left."""
    policy = load_policy(TWO_SLICES)
    row: dict[str, Any] = {"scenario": "healthy", "exposure_share": exposed, "undecided": 1.0}

    row["stays_in"] = _stays_in(policy, row)

    said = [str(text) for text in _stuck([row])]
    assert row["stays_in"] == stays_in
    (told,) = said
    assert ("no rollout ever left stage shadow in: healthy" in told) == (stays_in is not None)
    assert ("most rollouts had no end yet in: healthy (100%)" in told) == (stays_in is None)


def test_rollouts_that_have_ended_say_nothing_more() -> None:
    """Most have an end: their columns may be read as they are."""
    assert _stuck([{"scenario": "healthy", "stays_in": None, "undecided": 0.4}]) == []
