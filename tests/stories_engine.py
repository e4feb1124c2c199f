"""Rollouts that wait for something, and what may break while they do."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import lru_cache

from sentei.policies.edits import edited_state
from sentei.policies.engine import Decision
from sentei.policies.signals import SliceTraffic
from tests.strategies_policy import Story, drift, make_policy, sparse_health, without_approval

FRIDAY_NIGHT = 86_400.0 * 8 + 20 * 3600.0  # 1970-01-09, 20:00 UTC


def bad_traffic() -> tuple[SliceTraffic, ...]:
    """Far too many sessions on the candidate."""
    return (SliceTraffic("mid", 0.5, 100, 100),)


@lru_cache
def _staged() -> Story:
    story = Story(make_policy())
    story.run_to("half-medium")
    return story


def staged() -> Story:
    """A rollout in the stage with the human gate, built once and copied."""
    return copy(_staged())


def in_shadow() -> Story:
    """Waiting for evidence, no user on sparse."""
    return Story(make_policy())


def in_hold() -> Story:
    """Waiting for the least time of the stage."""
    story = Story(make_policy())
    story.run_to("half")
    story.tick(story.audits(3), after_s=1.0)
    return story


def in_approval() -> Story:
    """Waiting for a human."""
    story = staged()
    assert "waits for the approval" in story.good_tick().reason
    return story


def in_freeze() -> Story:
    """Waiting for the end of a freeze window."""
    story = Story(make_policy(without_approval), now_s=FRIDAY_NIGHT - 4 * 3600.0 - 45.0)
    story.run_to("half")
    story.now_s += 20.0
    assert (
        "freeze window"
        in story.tick(story.audits(40) + story.served(40), traffic=story.fair_traffic()).reason
    )
    return story


def in_bake() -> Story:
    """Waiting for the end of the last stage's bake."""
    story = Story(make_policy())
    story.run_to("full")
    assert "full holds" in story.good_tick(after_s=5.0).reason
    return story


def in_silence() -> Story:
    """Waiting for news."""
    story = staged()
    assert "stale" in story.tick(after_s=70.0, is_news=False).reason
    return story


def in_pause() -> Story:
    """Waiting for an operator."""
    story = staged()
    assert "paused by ann" in story.tick(commands=story.order("pause")).reason
    return story


def in_promotion() -> Story:
    """Promoted; the watch goes on."""
    story = in_bake()
    story.good_tick()
    assert story.state.outcome == "promoted"
    return story


def in_signal_trouble() -> Story:
    """Waiting for a drift check that works again."""
    story = staged()
    assert story.tick(drift=drift("error", 1)).state.waits_for == "signal"
    return story


def in_edit() -> Story:
    """Just after an edit of the running policy."""
    story = staged()
    safer = make_policy(lambda document: document["spec"]["advance"].update(min_units=50))
    story.state = edited_state(story.policy, safer, story.state, story.now_s)
    story.policy = safer
    return story


def in_evidence() -> Story:
    """Waiting for proof, with users on sparse."""
    story = staged()
    decision = story.tick(story.audits(12, excess=0.1), after_s=30.0)
    assert "is undecided" in decision.reason
    return story


def in_benefit() -> Story:
    """Waiting for proof of a gain."""
    story = staged()
    assert "at most 0.9 is not proven" in at_ratio(story, 0.9).reason
    return story


def in_no_gain() -> Story:
    """Held: the gain is proven absent."""
    story = staged()
    assert "no gain: 1.6 times" in at_ratio(story, 1.6).reason
    return story


def at_ratio(story: Story, ratio: float, count: int = 40) -> Decision:
    """A tick in which everything is clean and sparse takes so many times dense's model time."""
    story.now_s += 30.0
    seen = story.audits(count) + story.served(40)
    told = tuple(replace(o, value=ratio) if o.value_name == "audit.compute_ratio" else o for o in seen)
    return story.tick(told, after_s=0.0, traffic=story.fair_traffic())


def in_want_of_replicas() -> Story:
    """Waiting for a replica of sparse."""
    story = staged()
    assert "no ready replica" in story.tick(story.audits(1), health=sparse_health(replicas=0)).reason
    return story


def in_resume() -> Story:
    """Resumed by an operator in this very tick."""
    story = in_pause()
    assert "resumed by ann" in story.tick(commands=story.order("resume")).reason
    return story


def in_alarm() -> Story:
    """Paused by the sample-ratio alarm: waiting for an operator."""
    story = staged()
    assert story.tick(story.audits(1), traffic=bad_traffic()).state.by == "srm"
    return story


WAITING: list[Callable[[], Story]] = [
    in_hold,
    in_evidence,
    in_benefit,
    in_no_gain,
    in_want_of_replicas,
    in_resume,
    in_alarm,
    in_approval,
    in_freeze,
    in_bake,
    in_silence,
    in_pause,
    in_promotion,
    in_signal_trouble,
    in_edit,
]

# What breaks, and who answers for it in the state.
BREACHES: dict[str, tuple[Callable[[Story], Decision], str]] = {
    "harm": (lambda story: story.tick(story.served(80, failed=80), is_news=False), "errors"),
    "breaker": (lambda story: story.tick(health=sparse_health(20, 15), is_news=False), "breaker"),
    "silence": (lambda story: story.tick(after_s=301.0, is_news=False), "no_data"),
    "quality": (lambda story: story.tick(story.audits(60, excess=0.9), is_news=False), "quality"),
}
