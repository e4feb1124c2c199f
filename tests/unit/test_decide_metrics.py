"""Metrics of one's own: within for a whole window passes, out for a whole window acts, all else holds."""

from __future__ import annotations

from typing import Any

import pytest

from sentei.policies.edits import check_edit, edited_state
from sentei.policies.engine import Decision, state_from_json, state_to_json
from sentei.policies.signals import MetricSample
from sentei.policies.state import MetricTrack
from tests.strategies_policy import Story, make_policy, put, without_approval

METRIC = {
    "id": "cart",
    "url": "https://prometheus.example.com",
    "query": "sum(rate(cart_errors_total[5m]))",
    "bound": {"max": 0.02},
    "window": "60s",
    "every": "20s",
    "action": "rollback",
}


def policy(**changes: Any) -> Any:
    """TWO_SLICES without people, with one metric of its own."""

    def change(document: dict[str, Any]) -> None:
        without_approval(document)
        put("guardrails.prometheus", [METRIC | changes])(document)

    return make_policy(change)


class MetricStory(Story):
    """A story in which everything else is clean, and the metric is sampled every 20 seconds."""

    num_samples = 0

    def sample(self, value: float | None, status: str = "ok", **signals: Any) -> Decision:
        """A clean tick 20 s later that reads one sample."""
        self.num_samples += 1
        found = MetricSample(
            self.num_samples, "cart", self.now_s + 20.0, status, value, "why" if value is None else ""
        )
        return self.good_tick(after_s=20.0, samples=(found,), **signals)

    def samples(self, *values: float) -> Decision:
        """Several of them; returns the last decision."""
        return [self.sample(value) for value in values][-1]


def test_a_stage_ends_after_a_whole_window_within_the_bound() -> None:
    """Four samples, the bound itself included; the next stage asks for a window of its own."""
    story = MetricStory(policy())

    waiting = story.samples(0.01, 0.02, 0.0)
    assert (waiting.state.stage_id, waiting.state.waits_for) == ("shadow", "signal")
    assert waiting.reason == "cart: 0, bound max 0.02, within it for 40s of 1m"
    assert story.sample(0.01).state.stage_id == "half"

    assert story.samples(0.01, 0.01).state.stage_id == "half"
    assert story.samples(0.01, 0.01).state.stage_id == "half-medium"


def test_out_of_the_bound_for_a_window_rolls_back_where_sparse_serves() -> None:
    """Not before: a spike holds. The reason has the number, the bound and the time."""
    story = MetricStory(policy())
    story.samples(*[0.01] * 4)
    assert story.state.stage_id == "half"

    spike = story.samples(0.05, 0.05, 0.01)
    assert (spike.state.phase, spike.state.stage_id) == ("running", "half")
    before = story.samples(0.05, 0.06, 0.07)
    after = story.sample(0.08)

    assert before.state.phase == "running"
    assert (after.state.outcome, after.state.by) == ("rolled_back", "cart")
    assert after.reason == "cart: 0.08, bound max 0.02, out of it for 1m of 1m"


def test_in_shadow_nobody_is_served_so_it_holds_and_blames_nobody() -> None:
    """A service that is unwell is no moment to begin, and no fault of the candidate."""
    story = MetricStory(policy())

    done = story.samples(*[0.5] * 9)

    assert (done.state.phase, done.state.stage_id, done.state.waits_for) == ("running", "shadow", "signal")


def test_a_metric_that_may_only_hold_holds_for_ever() -> None:
    """action: hold never takes anybody off sparse."""
    story = MetricStory(policy(action="hold"))
    story.samples(*[0.01] * 4)

    done = story.samples(*[0.5] * 9)

    assert (done.state.phase, done.state.stage_id) == ("running", "half")


@pytest.mark.parametrize("status", ["no_data", "stale", "error"])
def test_no_number_is_never_a_pass_and_an_alert_once(status: str) -> None:
    """However long, it holds; the log has one alert, and another one only after a number in between."""
    story = MetricStory(policy())
    story.samples(0.01, 0.01, 0.01)

    lost = [story.sample(None, status) for _ in range(12)]

    assert {item.state.stage_id for item in lost} == {"shadow"}
    alerts = [action for item in lost for action in item.actions if action.kind == "lost_metric"]
    assert [action.detail for action in alerts] == [f"cart: {status.replace('_', ' ')}: why"]
    assert story.samples(0.01).actions == ()
    assert [action.kind for action in story.sample(None, status).actions] == ["lost_metric"]


def test_a_number_that_is_missing_breaks_a_stretch() -> None:
    """Within, unknown, within is not within all the time; nor is out, unknown, out."""
    story = MetricStory(policy())
    story.samples(0.01, 0.01, 0.01)
    story.sample(None, "error")

    assert story.samples(0.01, 0.01, 0.01).state.stage_id == "shadow"
    assert story.sample(0.01).state.stage_id == "half"


def test_old_samples_hold_and_are_an_alert() -> None:
    """Nobody asks any more: three times `every` and the longest query later it is no news."""
    story = MetricStory(policy())
    story.samples(0.01, 0.01, 0.01)

    quiet = [story.good_tick(after_s=20.0) for _ in range(6)]

    assert {item.state.stage_id for item in quiet} == {"shadow"}
    kinds = [[action.kind for action in item.actions] for item in quiet]
    assert kinds == [[], [], [], [], ["lost_metric"], []]
    assert quiet[-1].reason == "cart: the newest sample is 2m old"


def test_a_gap_breaks_a_stretch() -> None:
    """Two numbers with nothing in between for longer than a sample is news are two stretches."""
    story = MetricStory(policy())
    story.samples(0.01, 0.01, 0.01)
    story.now_s += 100

    assert story.samples(0.01, 0.01).state.stage_id == "shadow"


def test_before_the_first_answer_it_holds_and_is_late_after_a_while() -> None:
    """A rollout begins with no sample: no pass, and no alert before there can have been one."""
    story = MetricStory(policy())

    quiet = [story.good_tick(after_s=20.0) for _ in range(5)]

    assert quiet[0].reason == "cart: no answer from prometheus.example.com yet"
    assert [bool(item.actions) for item in quiet] == [False, False, False, False, True]


def test_once_promoted_the_watch_goes_on() -> None:
    """Out of its bound for a window after the last stage is a rollback, too."""
    story = MetricStory(policy())
    for _ in range(40):
        if story.sample(0.01).state.phase == "promoted":
            break
    assert story.state.phase == "promoted"

    assert story.samples(0.5, 0.5, 0.5).state.phase == "promoted"
    assert story.sample(0.5).state.by == "cart"


def test_a_lower_end_is_a_bound_too() -> None:
    """min is for what must not fall; both ends may be given."""
    story = MetricStory(policy(bound={"min": 0.95, "max": 1.0}))

    assert story.samples(0.96, 0.94, 0.96, 0.97, 1.0).state.stage_id == "shadow"
    assert story.sample(0.95).state.stage_id == "half"


def test_a_sample_counts_once() -> None:
    """A tick that reads it again, as after a crash, changes nothing."""
    story = MetricStory(policy())
    story.samples(0.01, 0.01)
    again = MetricSample(1, "cart", story.now_s + 1, "ok", 0.9)

    done = story.good_tick(after_s=1.0, samples=(again,))

    assert done.state.metrics[0].value == 0.01


def test_state_with_metrics_goes_through_its_bytes() -> None:
    """And one of before there were any is read as without."""
    story = MetricStory(policy())
    story.samples(0.01, 0.5)

    assert state_from_json(state_to_json(story.state)) == story.state
    assert story.state.metrics == (MetricTrack("cart", "out", story.now_s, story.now_s, 0.5, 2),)


def test_an_edit_may_add_a_metric_or_tighten_its_bound() -> None:
    """Samples are read again under the new bound; a looser one needs a new rollout."""
    old, tighter, looser = policy(), policy(bound={"max": 0.01}), policy(bound={"max": 0.03})
    story = MetricStory(old)
    story.samples(0.015, 0.015)

    state = edited_state(old, tighter, story.state, story.now_s)

    assert state.metrics == (MetricTrack("cart", since_s=story.now_s),)
    with pytest.raises(ValueError, match="may only be set, or fall"):
        check_edit(old, looser)
    without = make_policy(without_approval)
    assert [item.path for item in check_edit(without, old)] == ["spec.guardrails.prometheus[cart]"]
