"""What lint and explain say of a policy before it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from sentei.policies.review.advice import find_advice, readable
from sentei.policies.review.forecast import (
    Expected,
    bad_units,
    bearable_missing,
    best_s,
    clean_units,
    forecast,
    worst_s,
)
from sentei.policies.review.sentences import explain
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from tests.strategies_policy import EXAMPLES, Story, make_policy, without_approval

UNKNOWN = Expected()


def example(name: str) -> Policy:
    """A shipped policy."""
    return load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def messages(policy: Policy, expected: Expected = UNKNOWN) -> list[str]:
    """Every remark as path and words."""
    return [
        f"{'.'.join(str(part) for part in item.path)}: {item.message}"
        for item in find_advice(policy, expected)
    ]


def edited(change: Callable[[dict[str, Any]], None]) -> Policy:
    """TWO_SLICES with its `spec` edited."""
    return make_policy(lambda document: change(document["spec"]))


def test_without_traffic_only_holds_take_time() -> None:
    """Best is the sum of holds and bake, each stage at least one check; worst has no end."""
    stages = forecast(make_policy(), UNKNOWN)

    assert [stage.best_s for stage in stages] == [60, 60, 60, 60]
    assert worst_s(stages) is None


def test_a_policy_that_rolls_back_at_its_ends_has_a_worst_time() -> None:
    """Four stages of at most 30 minutes, under on_max: rollback, take at most two hours."""

    def end(spec: dict[str, Any]) -> None:
        spec["advance"]["on_max"] = "rollback"
        for stage in spec["stages"]:
            stage["max"] = "30m"

    assert worst_s(forecast(edited(end), UNKNOWN)) == 4 * 1800


def test_traffic_turns_units_into_time() -> None:
    """Twice the traffic halves the time for evidence; each stage asks for its own, of what sparse served."""
    slow, fast = (forecast(make_policy(), Expected(rate)) for rate in (100.0, 200.0))

    assert slow[0].best_s == pytest.approx(2 * fast[0].best_s, rel=0.05)
    shadow, half = slow[0].needs[0], slow[1].needs[0]
    assert shadow.audits == half.audits > 0
    assert shadow.sessions == shadow.audits
    assert half.sessions == 2 * half.audits  # each served by sparse, at half of them


def test_the_best_time_is_what_a_clean_rollout_takes() -> None:
    """A real rollout of clean sessions is promoted after the forecast's number of audits, not before."""
    policy = make_policy(without_approval)
    needed = forecast(policy, Expected(3600.0))[0].needs[0].audits
    story = Story(policy)

    for _ in range(needed - 1):
        story.good_tick(1, after_s=1.0)
        assert story.state.stage_id == "shadow"
    story.good_tick(1, after_s=1.0)

    assert story.state.stage_id == "half"


@pytest.mark.parametrize(
    ("gate_id", "clean", "bad"), [("agree", 135, 4), ("ttft_slo", 99, 7), ("errors", None, None)]
)
def test_a_guardrail_costs_what_its_test_costs(gate_id: str, clean: int | None, bad: int | None) -> None:
    """Clean sessions to safety and bad ones to harm; events of two arms cannot be counted so."""
    policy = example("cautious")
    gate = next(item for item in policy.spec.guardrails.items if item.id == gate_id)

    assert (clean_units(policy, gate), bad_units(policy, gate)) == (clean, bad)


def test_missing_audits_beyond_the_bound_make_safety_unprovable() -> None:
    """Each counts as the worst session, so a bound of 5 % cannot be proven with 5 % of them missing."""
    policy = example("yardstick")
    mass, agree, _, slo = policy.spec.guardrails.items[:4]

    assert bearable_missing(policy, mass) == pytest.approx(0.05)
    assert bearable_missing(policy, agree) == pytest.approx(0.05)
    assert bearable_missing(policy, slo) is None


def only_over_all(spec: dict[str, Any]) -> None:
    """A policy in which nothing gives units of a slice."""
    spec["stages"] = spec["stages"][1:2] + spec["stages"][3:]
    spec["stages"][1]["rung"] = "mild"
    spec["guardrails"]["items"] = [spec["guardrails"]["items"][2] | {"advance": "all_safe"}]
    spec["signals"] = []


def whole_week(spec: dict[str, Any]) -> None:
    """Two windows that leave nothing."""
    spec["schedule"]["freeze"] = ["Mon 00:00-Fri 00:00 UTC", "Thu 12:00-Mon 00:00 UTC"]


def hidden(spec: dict[str, Any]) -> None:
    """A second, weaker bound on the same value."""
    first = spec["guardrails"]["items"][0]
    wide = first["bound"] | {"excess_over_floor": 0.5}
    spec["guardrails"]["items"].append(first | {"id": "wide", "bound": wide})


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        (only_over_all, "stages.0", "can never end"),
        (whole_week, "schedule.freeze", "cover the whole week"),
        (hidden, "guardrails.items.4", "can never fire first"),
        (lambda spec: spec.update(mode="advise"), "guardrails.items.2", "can never fire in mode advise"),
        (lambda spec: spec["ladder"].append({"id": "bold"}), "ladder.2.id", "unreachable"),
        (
            lambda spec: spec["slices"]["buckets"][2].update(max_rung="medium"),
            "slices.buckets.2.max_rung",
            "limits nothing",
        ),
        (
            lambda spec: spec["data"].update(monitor_lease="30s"),
            "data.monitor_lease",
            "goes dense in between",
        ),
        (lambda spec: spec["data"].update(max_age="5s"), "data.max_age", "stale at most checks"),
        (
            lambda spec: spec["guardrails"]["items"][2].update(
                bound={"ratio": 100}, test="event_split", action="rollback"
            ),
            "guardrails.items.2.bound",
            "can never fire at 90%",
        ),
    ],
)
def test_what_can_never_happen_is_said(
    change: Callable[[dict[str, Any]], None], path: str, words: str
) -> None:
    """Each thing that is legal and yet surely not meant has a remark with its path."""
    found = messages(edited(change))

    assert any(item.startswith(path) and words in item for item in found), found


def test_a_stage_that_never_ends_makes_later_ones_unreachable() -> None:
    """They are named, and the best time is for ever."""
    policy = edited(only_over_all)

    assert any("unreachable: full and promoted" in item for item in messages(policy))
    assert best_s(forecast(policy, UNKNOWN)) == math.inf


def test_a_policy_that_looks_at_no_answer_is_told_so() -> None:
    """Without a guardrail of audits, and the shadow that is refused without one, lint has a warning."""

    def look_away(spec: dict[str, Any]) -> None:
        kept = [item for item in spec["guardrails"]["items"] if not item["value"].startswith("audit.")]
        spec["guardrails"]["items"] = kept
        spec["advance"]["need"] = "no_harm"
        spec["stages"] = [stage for stage in spec["stages"] if stage["share"] != 0]

    policy = edited(look_away)
    (said,) = [text for text in messages(policy) if text.startswith("guardrails.items:")]

    assert policy.spec.stages[0].share > 0
    assert said.startswith(
        "guardrails.items: no guardrail is of audits, so answers that are wrong roll nothing back"
    )
    assert not any("no guardrail is of audits" in text for text in messages(make_policy()))


def test_traffic_shows_what_is_too_short() -> None:
    """At ten sessions an hour an hour is too short for a stage, and the breaker can hardly trip."""
    found = messages(make_policy(), Expected(10.0))

    assert any(item.startswith("stages.1.max") or "can hardly trip" in item for item in found)


def test_the_watch_is_said_to_be_loud() -> None:
    """Where its mean time between false alarms is shorter than the rollout, a remark says so."""

    def loud(spec: dict[str, Any]) -> None:
        spec["guardrails"]["detector_arl"] = 100

    assert any("false alarm every" in item for item in messages(edited(loud), Expected(1000.0)))


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_a_shipped_policy_has_nothing_that_cannot_happen(name: str) -> None:
    """Rungs beyond its own are the only thing that a shipped policy may leave unused."""
    found = messages(example(name))

    assert all(re.match(r"ladder\.\d\.id", item) for item in found) or example(name).spec.mode == "advise"


def test_explain_names_every_part() -> None:
    """Stages, guardrails, benefits, signals, breaker, freeze, silence and retry each have their sentence."""
    policy = make_policy()
    text = "\n".join(explain(policy, forecast(policy, Expected(1000.0))))

    parts = [*(s.id for s in policy.spec.stages), *(g.id for g in policy.spec.guardrails.items)]
    for part in (
        *parts,
        "gain",
        "kl_drift",
        "Breaker",
        "Fri 16:00",
        "No news for 1m",
        "retry",
        "ann must approve",
    ):
        assert part in text
    assert "short stays dense" in text


def test_explain_says_what_is_weaker() -> None:
    """A policy that only asks for no harm, and one that only advises, are said to."""
    weak = edited(lambda spec: spec["advance"].update(need="no_harm", min_units=20))
    quiet = edited(lambda spec: spec.update(mode="advise"))

    assert "safety is not proven" in "\n".join(explain(weak, forecast(weak, UNKNOWN)))
    assert "only advises" in "\n".join(explain(quiet, forecast(quiet, UNKNOWN)))


@pytest.mark.parametrize(
    ("seconds", "text"), [(90_000, "1.04d"), (5400, "1.5h"), (90, "1.5m"), (2, "2s"), (math.inf, "for ever")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    """The largest unit that fits, three figures."""
    assert readable(seconds) == text


def test_a_mix_must_fit_the_slices() -> None:
    """As many numbers as routed slices, none below 0."""
    for mix in ((1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="mid, long"):
            Expected(100.0, mix).per_slice(make_policy())
