"""A1 to A3, tries (A5) and health: whole rollouts from streams of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from tests.independent import streams
from tests.independent.counting import Count, Progress, Row, count
from tests.independent.product import IS_NOW, load_policy
from tests.independent.streams import (
    BOUND,
    FEW,
    HEALTHY,
    NO_BAKE,
    POLICY,
    Request,
    World,
    fell,
    play,
    promoted,
)

LONG_TOKENS = 24_576
AT_MOST_5, AT_MOST_10 = "at most 5%", "at most 10%"
MOST_UNITS = 400


def rows() -> tuple[Row, ...]:
    """All that a stream can show."""
    turning = partial(_after_shadow, 2.0), partial(_after_shadow, 1.5)
    return (
        Row(
            "A1",
            "growing conversations, all harm beyond 24k tokens, twice the bound on average: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.conversations, _long_only, 8.0, promoted)),
            100,
            key="promoted",
        ),
        Row(
            "A1",
            "(a share, not a fault) audited requests beyond 24k tokens",
            "as of all",
            _audited_beyond,
            1,
            key="audited",
        ),
        Row(
            "A2",
            "60 returning users at twice the bound: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.regulars, lambda *_: 2 * BOUND, 12.0, promoted)),
            100,
            key="promoted",
        ),
        Row(
            "A2",
            "150 returning users, four times the bound once promoted: not back within 100 units",
            AT_MOST_5,
            _of(_watch),
            60,
            key="watch",
        ),
        Row(
            "A3",
            "healthy in shadow, twice the bound from then on, no bake: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.strangers, turning[0], 8.0, promoted, policy=NO_BAKE)),
            100,
            key="regime",
        ),
        Row(
            "A3",
            "healthy in shadow, 1.5 times the bound from then on, no bake: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.strangers, turning[1], 8.0, promoted, policy=NO_BAKE)),
            100,
            key="regime15",
        ),
        Row(
            "A3",
            "harm only in what sparse served, twice the bound, last stage 10%: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.strangers, _served_only, 8.0, promoted, policy=FEW)),
            100,
            key="served",
        ),
        Row(
            "A3",
            "at the bound everywhere: promoted",
            AT_MOST_5,
            _of(lambda: World(streams.strangers, lambda *_: BOUND, 8.0, promoted)),
            100,
            key="bound",
        ),
        Row(
            "A5",
            "ten tries at the bound, answers disagree wholly or not at all: promoted in one",
            AT_MOST_5,
            _of(_ten_tries),
            60,
            key="tries",
        ),
        Row(
            "A5",
            "`no_harm` with the least `min_units` that is accepted, twice the bound: promoted",
            AT_MOST_5,
            _no_harm,
            60,
            key="no_harm",
        ),
        Row(
            "H",
            "half the bound, persistence, day and night, 24 h: rolled back",
            AT_MOST_10,
            _of(lambda: World(streams.moody, lambda *_: HEALTHY, 24.0, fell, is_followed=True)),
            80,
            key="moody",
        ),
        Row(
            "H",
            "half the bound, 60 returning users, 24 h: rolled back",
            AT_MOST_10,
            _of(lambda: World(streams.regulars, lambda *_: HEALTHY, 24.0, fell, is_followed=True)),
            80,
            key="returning",
        ),
        Row(
            "H",
            "half the bound, strangers: not promoted within 8 h",
            AT_MOST_10,
            _of(lambda: World(streams.strangers, lambda *_: HEALTHY, 8.0, lambda state: not promoted(state))),
            40,
            key="arrives",
        ),
    )


def _of(make: Callable[[], World]) -> Callable[[int, Progress], Count]:
    """Count the rollouts of a world that end as they must not."""

    def measure(trials: int, progress: Progress) -> Count:
        world = make()
        return count(trials, progress, lambda seed: world.is_wrong(play(world, seed)))

    return measure


@lru_cache
def _share_beyond() -> float:
    """The share of the requests of growing conversations that are longer than 24k tokens."""
    found = [r for tick in streams.conversations(np.random.default_rng(1), 4.0) for r in tick]
    return float(np.mean([item.tokens >= LONG_TOKENS for item in found]))


def _long_only(request: Request, _arm: str, _state: Any) -> float:
    return 2 * BOUND / _share_beyond() if request.tokens >= LONG_TOKENS else 1e-4


def _served_only(_request: Request, arm: str, _state: Any) -> float:
    return 2 * BOUND if arm == "sparse" else HEALTHY / 4


def _after_shadow(factor: float, _request: Request, _arm: str, state: Any) -> float:
    return HEALTHY / 2 if state.stage_id == "shadow" else factor * BOUND


def _watch() -> World:
    def rate(_request: Request, _arm: str, state: Any) -> float:
        return 4 * BOUND if state.outcome == "promoted" else HEALTHY / 2

    def many(rng: np.random.Generator, hours: float) -> Iterator[list[Request]]:
        return streams.regulars(rng, hours, 150)

    return World(many, rate, 30.0, lambda state: not fell(state), is_followed=True)


def _ten_tries() -> World:
    return World(streams.strangers, lambda *_: BOUND, 2.0, promoted, policy=FEW, is_whole=True, tries=10)


def _no_harm(trials: int, progress: Progress) -> Count:
    """What the loader lets through at all, and what then comes of harm at twice the bound."""
    text = POLICY.replace("need: all_safe", "need: no_harm")
    least = next(n for n in range(1, MOST_UNITS) if _loads(text.replace("min_units: 100", f"min_units: {n}")))
    policy = text.replace("min_units: 100", f"min_units: {least}")
    world = World(streams.strangers, lambda *_: 2 * BOUND, 8.0, promoted, policy=policy)
    found = count(trials, progress, lambda seed: world.is_wrong(play(world, seed)))
    return replace(found, note=f"least accepted {least}")


def _loads(text: str) -> bool:
    try:
        load_policy(text, "independent.yaml")
    except ValueError:
        return False
    return True


def _audited_beyond(_trials: int, progress: Progress) -> Count:
    """The product's own draw over growing conversations; before, the rule was the first of a session."""
    requests = [r for tick in streams.conversations(np.random.default_rng(2), 3.0) for r in tick]
    if IS_NOW:
        from sentei.serving.ingress.draw import AuditDraws

        draws = AuditDraws()
        audited = [item for item in requests if draws.draw(item.user, 0.02)]
    else:
        audited = list({item.user: item for item in reversed(requests)}.values())[::50]
    progress(1, 1)
    share = float(np.mean([item.tokens >= LONG_TOKENS for item in requests]))
    return Count(
        sum(item.tokens >= LONG_TOKENS for item in audited), len(audited), f"of all requests {share:.1%}"
    )
