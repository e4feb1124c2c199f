"""Rollouts in the middle of their lives: where each begins, and any world that follows."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache

from hypothesis import strategies as st

from sentei.policies.engine import Decision, RolloutState
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Command, Observation, Signals, SliceTraffic
from tests.stories_engine import at_ratio
from tests.strategies_policy import (
    DENSE_GONE,
    Story,
    make_policy,
    monday,
    rerun,
    signal_lists,
    sparse_health,
    without_approval,
)

STEP_S = 10.0
CLEAN_AUDITS = 24  # enough to prove every quality guardrail of TWO_SLICES safe
SHIFT = 1_000_000  # numbers of what follows are above all that came before


@lru_cache
def policy() -> Policy:
    """TWO_SLICES without its human gate, loaded once."""
    return make_policy(without_approval)


def _at(stage_id: str) -> Story:
    story = Story(policy())
    story.run_to(stage_id)
    return story


def _promoted() -> Story:
    story = _at("full")
    story.good_tick()
    assert story.state.outcome == "promoted"
    return story


def _paused() -> Story:
    story = _at("half-medium")
    story.tick(commands=story.order("pause"))
    return story


def _held() -> Story:
    story = _at("half-medium")
    at_ratio(story, 1.6)
    assert story.state.outcome == "held"
    return story


def _one_slice_left() -> Story:
    story = _at("half-medium")
    story.tick(story.audits(40, excess=0.9, slices=("mid",), value_name="audit.kl"))
    assert story.state.slice_state("mid").is_dense
    return story


def _sheltered() -> Story:
    story = _at("half-medium")
    story.tick(commands=story.order("abort"), health=DENSE_GONE)
    return story


def _rolled_back() -> Story:
    story = _at("half-medium")
    story.tick(commands=story.order("abort"))
    return story


BEGINNINGS: dict[str, Callable[[], Story]] = {
    "shadow": lambda: Story(policy()),
    "half": lambda: _at("half"),
    "half-medium": lambda: _at("half-medium"),
    "full": lambda: _at("full"),
    "promoted": _promoted,
    "paused": _paused,
    "held": _held,
    "one slice left": _one_slice_left,
    "sheltered": _sheltered,
    "rolled back": _rolled_back,
}


@lru_cache
def _begun(name: str) -> Story:
    return BEGINNINGS[name]()


def begun(name: str) -> Story:
    """A rollout at that place, built once and copied."""
    return copy(_begun(name))


@dataclass(frozen=True, repr=False)
class Told:
    """A rollout at some place, and what happens to it next, tick by tick."""

    begins: str
    state: RolloutState
    now_s: float
    ticks: list[Signals]

    def rerun(self) -> list[tuple[RolloutState, Decision]]:
        """Decide tick after tick; each state with the decision that followed it."""
        return rerun(policy(), self.ticks, STEP_S, state=self.state, begin_s=self.now_s)

    def __repr__(self) -> str:
        sizes = [len(signals.observations) for signals in self.ticks]
        return f"Told(from {self.begins!r}, {sizes} observations a tick)"

    def time_of(self, index: int) -> float:
        """When a tick happens."""
        return self.now_s + STEP_S * (index + 1)


def clean_signals(now_s: float, cursor: int) -> Signals:
    """Good news of every kind, at every rung: whatever stage this is, it may end."""
    seen, seq = [], cursor
    for index in range(CLEAN_AUDITS):
        for slice_id in ("mid", "long"):
            for rung_id in ("mild", "medium"):
                at = (slice_id, rung_id, f"c{seq}", "sparse", now_s)
                seen += [
                    Observation(seq + 1, "audit.kl", *at, value=0.01, floor=0.01),
                    Observation(seq + 2, "audit.token_disagreement", *at, value=0.01, floor=0.01),
                    Observation(seq + 3, "audit.compute_ratio", *at, value=0.5),
                ]
                seq += 3
            seen.append(
                Observation(seq + 1, "serve.failed", slice_id, "mild", f"c{index}", "sparse", now_s, 0.0)
            )
            seq += 1
    traffic = tuple(SliceTraffic(slice_id, 0.5, 10, 20) for slice_id in ("mid", "long"))
    return Signals(
        tuple(seen), health=sparse_health(50, 0), traffic=traffic, cursor=seq, newest_data_at_s=now_s
    )


def harmful_signals(now_s: float, cursor: int, value_name: str, slices: tuple[str, ...]) -> Signals:
    """Proof of harm: many sessions that are as bad as can be, at every rung of some slices."""
    seen = []
    for index in range(CLEAN_AUDITS):
        for slice_id in slices:
            for rung_id in ("mild", "medium"):
                seq = cursor + len(seen) + 1
                at = (slice_id, rung_id, f"h{index}", "sparse", now_s)
                seen.append(Observation(seq, value_name, *at, value=1.0, floor=0.0))
    return Signals(tuple(seen), cursor=cursor + len(seen), newest_data_at_s=now_s)


HARMS = st.tuples(
    st.sampled_from(["audit.kl", "audit.token_disagreement"]),
    st.sampled_from([("mid",), ("long",), ("mid", "long")]),
)


@st.composite
def stories(draw: st.DrawFn, *, begins: tuple[str, ...] = tuple(BEGINNINGS), is_calm: bool = False) -> Told:
    """A rollout anywhere, then any world; a calm one has no bulk of news and never loses dense."""
    name = draw(st.sampled_from(begins))
    story, ticks = begun(name), []
    wild = draw(signal_lists(max_ticks=10, can_lose_dense=not is_calm))
    late_s = story.now_s - monday()
    for index, signals in enumerate(wild):
        cursor = SHIFT * (index + 1)
        kind = "wild" if is_calm else draw(st.sampled_from(["wild", "wild", "clean", "harmful"]))
        commands = _later(signals, story.state.command_seq)
        now_s = story.now_s + STEP_S * (index + 1)
        if kind == "clean":
            ticks.append(replace(clean_signals(now_s, cursor), commands=commands))
            continue
        if kind == "harmful":
            harmful = harmful_signals(now_s, cursor, *draw(HARMS))
            ticks.append(replace(harmful, commands=commands, health=signals.health))
            continue
        newest = signals.newest_data_at_s
        ticks.append(
            replace(
                signals,
                observations=tuple(
                    replace(o, seq=cursor + o.seq, at_s=o.at_s + late_s + STEP_S * index)
                    for o in signals.observations
                ),
                drift=tuple(replace(item, window_id=cursor + item.window_id) for item in signals.drift),
                commands=commands,
                cursor=cursor + signals.cursor,
                newest_data_at_s=None if newest is None else newest + late_s,
            )
        )
    return Told(name, story.state, story.now_s, ticks)


def _later(signals: Signals, command_seq: int) -> tuple[Command, ...]:
    return tuple(replace(item, seq=item.seq + command_seq) for item in signals.commands)
