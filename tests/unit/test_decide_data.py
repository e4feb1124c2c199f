"""decide(): silence, failed reads, drift windows, and what counts as evidence where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sentei.policies.signals import Observation, Verdict
from tests.stories_engine import in_shadow, staged
from tests.strategies_policy import Story, drift, make_policy, without_approval


def test_the_same_drift_window_counts_once_and_silence_is_no_clear_window() -> None:
    """A window is counted by its id; error and no_data neither add to a streak nor end it; clear ends it."""
    story = in_shadow()

    streaks = []
    for status, window in [
        ("drift", 1),
        ("drift", 1),
        ("error", 2),
        ("no_data", 2),
        ("clear", 2),
        ("drift", 3),
    ]:
        story.tick(drift=drift(status, window))
        streaks.append(story.state.drift[0].streak)

    assert streaks == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(("status", "text"), [("error", "the check failed"), ("drift", "1 of 2 windows")])
def test_a_signal_in_trouble_holds(status: str, text: str) -> None:
    """A failed check or a first window of drift stops growth and nothing else."""
    story = in_shadow()

    decision = story.good_tick(drift=drift(status, 1))

    assert text in decision.reason
    assert decision.state.stage_id == "shadow"


def test_a_signal_may_insist_on_its_first_window() -> None:
    """With no_data: hold the stage waits until Evidently has looked once."""

    def insist(document: dict[str, Any]) -> None:
        document["spec"]["signals"][0]["no_data"] = "hold"

    story = Story(make_policy(insist))

    assert "no full window yet" in story.good_tick().reason
    assert story.good_tick(drift=drift("clear", 1)).state.stage_id == "half"


def test_silence_holds_then_rolls_back() -> None:
    """Stale after max_age, no data after grace, rolled back after `after`; news starts the count again."""
    story = staged()
    reasons = [story.tick(after_s=70.0, is_news=False).reason]
    reasons.append(story.tick(after_s=60.0, is_news=False).reason)
    story.tick(after_s=1.0)
    fresh = story.tick(after_s=59.0, is_news=False)

    assert "stale after 1m" in reasons[0]
    assert "over 2m" in reasons[1]
    assert "no news" not in fresh.reason
    last = story.tick(after_s=250.0, is_news=False)
    assert (last.state.outcome, last.state.by) == ("rolled_back", "no_data")


def test_a_store_that_cannot_be_read_holds_then_rolls_back() -> None:
    """Unknown is not zero: a failed read moves no evidence, holds, and after `after` rolls back."""
    story = staged()
    before = story.state

    held = story.tick(after_s=20.0, read_error="timeout", is_news=False)
    last = story.tick(after_s=301.0, read_error="timeout", is_news=False)

    assert "cannot be read (timeout)" in held.reason
    assert replace(held.state, waits_for=None) == replace(before, waits_for=None)
    assert last.state.by == "no_data"


def test_stale_evidence_is_called_stale() -> None:
    """A proof of safety does not outlive the news it came from."""
    story = staged()
    story.good_tick()

    verdicts = {report.verdict for report in story.tick(after_s=90.0, is_news=False).verdicts}

    assert Verdict.SAFE not in verdicts
    assert Verdict.STALE in verdicts


def test_observations_of_unknown_places_are_left_alone() -> None:
    """A pinned or unknown slice, an unknown rung or value: no evidence, and the cursor moves on."""
    story = in_shadow()
    strange = tuple(
        Observation(i + 1, name, place, rung, "s", "dense", story.now_s, 0.9, 0.0)
        for i, (name, place, rung) in enumerate(
            [
                ("audit.kl", "short", "mild"),
                ("audit.kl", "nowhere", "mild"),
                ("audit.kl", "mid", "dense"),
                ("x", "mid", "mild"),
            ]
        )
    )
    story.seq = 4

    decision = story.tick(strange)

    assert decision.state.cells == ()
    assert decision.state.cursor == 4


def test_operational_evidence_starts_afresh_per_stage_and_quality_is_carried() -> None:
    """F15: failures depend on the share, quality on rung and slice."""
    story = Story(make_policy(without_approval))
    story.run_to("half")
    old = story.served(5, failed=5, at_s=story.state.stage_entered_s - 1.0)
    story.tick(old, after_s=0.0)
    assert story.state.cell("errors", "*", "") is None

    units = story.state.cell("agree", "mid", "mild").units  # type: ignore[union-attr]
    story.tick(story.served(12), after_s=0.0)
    assert story.state.cell("errors", "*", "").units == 12  # type: ignore[union-attr]
    story.run_to("half-medium")

    assert story.state.cell("errors", "*", "") is None
    assert story.state.cell("agree", "mid", "mild").units >= units  # type: ignore[union-attr]


def test_served_units_may_be_asked_for() -> None:
    """min_served_units waits for audits of sessions that sparse itself served in this stage."""

    def ask(document: dict[str, Any]) -> None:
        document["spec"]["advance"]["min_served_units"] = 30

    story = Story(make_policy(ask))
    story.run_to("half")
    held = story.tick(story.audits(24), after_s=20.0)
    assert "24 of 30 units served by sparse" in held.reason
    story.tick(story.audits(6) + story.served(30), after_s=1.0, traffic=story.fair_traffic())
    assert story.state.stage_id == "half-medium"


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_delays_no_rollback(jump_s: float) -> None:
    """An hour forward or back: a breach falls back in the tick that sees it, all the same."""
    for breach in (lambda s: s.served(80, failed=80), lambda s: s.audits(60, excess=0.9)):
        story = staged()

        decision = story.tick(breach(story), after_s=jump_s)

        assert decision.state.outcome == "rolled_back"


def test_a_clock_that_goes_back_holds_until_it_has_caught_up() -> None:
    """No stage ends in a time before it began, evidence is kept, and time in hold is not reset."""
    story = staged()
    entered, units = story.state.stage_entered_s, story.state.cells

    back = story.good_tick(after_s=-3600.0, commands=story.order("approve"))
    again = story.good_tick(after_s=3660.0, commands=story.order("approve"))

    assert "was entered just now" in back.reason
    assert back.state.stage_entered_s == entered
    assert len(back.state.cells) >= len(units)
    assert again.state.stage_id == "full"


def test_a_clock_that_goes_forward_advances_one_stage_with_news_and_goes_dense_without() -> None:
    """An hour that never was: with data as new as the clock one stage, with old data the safe side."""
    with_news, without = staged(), staged()

    one = with_news.good_tick(after_s=3600.0, commands=with_news.order("approve"))
    two = without.tick(after_s=3600.0, is_news=False)

    assert one.state.stage_id == "full"
    assert with_news.good_tick(after_s=1.0).state.stage_id == "full"
    assert (two.state.outcome, two.state.by) == ("rolled_back", "no_data")
