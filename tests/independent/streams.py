"""Conversations of users, request by request, and rollouts that audit them; only `decide` is the product's.

Who is audited, and what is a unit, is done here a second time, by the rules of the version under judgement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.independent.product import IS_NOW, engine, load_policy, signals, tell

BOUND, HEALTHY = 0.05, 0.025
PERIOD_S, TICK_S = 600.0, 60.0
WATCHED_UNITS = 100  # after promotion; then a rollout is left alone
START_S = 4 * 86_400.0
SLICE = (4096, 131_072)
BORDER = math.sqrt(SLICE[0] * SLICE[1])
PERIOD = ", period: 10m" if IS_NOW else ""
POLICY = f"""
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {{name: independent}}
spec:
  ladder: [{{id: mild}}]
  slices:
    buckets:
      - {{id: short, range: [0, {SLICE[0]}], pin: control}}
      - {{id: long, range: [{SLICE[0]}, {SLICE[1]}]}}
  assignment: {{salt: independent}}
  stages:
    - {{id: shadow, share: 0, rung: mild}}
    - {{id: c10, share: 10%, rung: mild}}
    - {{id: c50, share: 50%, rung: mild}}
    - {{id: full, share: 95%, rung: mild, bake: 10m}}
  advance: {{need: all_safe, min_units: 100}}
  audit: {{select: {{fraction: 20%{PERIOD}}}}}
  guardrails:
    detector_arl: 100000
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: {BOUND}, floor_cap: 5%}},
         test: betting_paired, action: rollback}}
  breaker: {{variant: {{window: 60s, min_requests: 1000, failure_share: 50%}}}}
  data: {{max_age: 10m, no_data: {{grace: 1h, after: 6h}}, monitor_lease: 120s}}
  rollback: {{retry: {{max: 10, cool_off: 0s}}}}
  schedule: {{check_every: 60s}}
"""
NO_BAKE = POLICY.replace(", bake: 10m", "")
FEW = "\n".join(line for line in NO_BAKE.splitlines() if "id: c50" not in line and "id: full" not in line)


@dataclass(frozen=True, slots=True)
class Request:
    """One request of one user, before anybody serves it."""

    user: str
    tokens: int
    at_s: float
    tendency: float  # of its session: 1 on average


@dataclass(frozen=True, slots=True)
class World:
    """Who comes, and how often sparse disagrees with dense on a request."""

    requests: Callable[[np.random.Generator, float], Iterator[list[Request]]]  # one list a tick
    rate: Callable[[Request, str, Any], float]  # by request, who served it, and the state
    hours: float
    is_wrong: Callable[[Any], bool]
    policy: str = POLICY
    is_followed: bool = False  # after promotion, too
    is_whole: bool = False  # an answer disagrees wholly or not at all
    tries: int = 1  # of `hours` each; one that was not promoted is aborted


@dataclass
class Draw:
    """Audits of one rollout: one request in every K of a session and arm, at a place drawn beforehand.

    Before it was the first request of a session, where the session's own lot said so.
    """

    rng: np.random.Generator
    counts: dict[tuple[str, str, float], list[int]] = field(default_factory=dict)
    lots: dict[str, float] = field(default_factory=dict)

    def has(self, user: str, arm: str, probability: float) -> bool:
        """Whether the next request is audited."""
        if not IS_NOW:
            is_first = user not in self.lots
            return self.lots.setdefault(user, float(self.rng.random())) < probability and is_first
        if probability <= 0:
            return False
        window = math.ceil(1 / probability)
        place = self.counts.setdefault((user, arm, probability), [0, 0])
        if place[0] % window == 0:
            is_one = self.rng.random() < probability * window
            place[1] = int(self.rng.integers(window)) if is_one else -1
        is_drawn = place[0] % window == place[1]
        place[0] += 1
        return is_drawn


class Rollout:
    """One rollout in a world."""

    def __init__(self, policy: Any, world: World, seed: int) -> None:
        self._policy, self._world = policy, world
        self._rng = np.random.default_rng((seed, 77))
        self._draw = Draw(self._rng)
        self._seen: set[tuple[object, ...]] = set()
        self._spots: dict[str, float] = {}
        self._seq = 0
        self._now_s = START_S
        self.state = engine.initial_state(policy, f"r{seed}", START_S)
        self.since_promotion = 0

    def run(self) -> Any:
        """To the end of the world, or to the fall; then perhaps again."""
        for number in range(self._world.tries):
            if number:
                self._order("abort")
                self._order("retry")
                self._draw, self._seen = Draw(self._rng), set()
            self._run_once()
            if self.state.outcome == "promoted":
                break
        return self.state

    def _run_once(self) -> None:
        for requests in self._world.requests(self._rng, self._world.hours):
            self._now_s += TICK_S
            self._tick(requests, self._now_s)
            is_over = self.state.phase == "promoted" and not self._world.is_followed
            if is_over or self.state.phase == "rolled_back" or self.since_promotion >= self._watched():
                return

    def _order(self, kind: str) -> None:
        self._seq += 1
        order = signals.Command(seq=self._seq, kind=kind, by="ann")
        told = tell(signals.Signals, commands=(order,), cursor=self._seq, newest_data_at_s=self._now_s)
        self.state = engine.decide(self._policy, self.state, told, self._now_s).state

    def _watched(self) -> float:
        """How many units after promotion are enough to know; of a healthy world there are never enough."""
        return math.inf if self._world.is_wrong is fell else WATCHED_UNITS

    def _tick(self, requests: list[Request], now_s: float) -> None:
        route = engine.routing(self._policy, self.state).routes[1]
        units: list[Any] = []
        arrivals, candidates, upper = 0, 0, 0
        for request in requests:
            spot = self._spots.setdefault(request.user, float(self._rng.random()))
            arm = "sparse" if spot < route.share else "dense"
            half = "upper" if request.tokens >= BORDER else "lower"
            upper += half == "upper"
            if ("new", request.user) not in self._seen:
                self._seen.add(("new", request.user))
                arrivals, candidates = arrivals + 1, candidates + (arm == "sparse")
            odds = getattr(route, "audit_share_sparse", route.audit_share)
            if self._draw.has(request.user, arm, odds if arm == "sparse" else route.audit_share):
                units += self._unit(request, arm, half, now_s)
        self._seq += 1
        kinds = signals
        lengths = (kinds.SliceLengths("long", len(requests), upper),) if IS_NOW else ()
        told = tell(
            kinds.Signals,
            observations=tuple(units),
            traffic=(kinds.SliceTraffic("long", route.share, candidates, arrivals),),
            lengths=lengths,
            cursor=self._seq,
            newest_data_at_s=now_s if requests else None,
        )
        if self.state.phase == "promoted":
            self.since_promotion += len(units)
        self.state = engine.decide(self._policy, self.state, told, now_s).state

    def _key(self, request: Request, arm: str, half: str, now_s: float) -> tuple[object, ...]:
        if not IS_NOW:
            return (request.user,)
        since_s = self.state.stage_entered_s if self.state.phase != "promoted" else self.state.ended_s
        return (request.user, arm, half, since_s, (now_s - (since_s or 0.0)) // PERIOD_S)

    def _unit(self, request: Request, arm: str, half: str, now_s: float) -> Iterator[Any]:
        key = self._key(request, arm, half, now_s)
        if key in self._seen:
            return
        self._seen.add(key)
        self._seq += 1
        mean = min(max(self._world.rate(request, arm, self.state) * request.tendency, 1e-4), 1 - 1e-4)
        is_hit = float(self._rng.random() < mean)
        value = is_hit if self._world.is_whole else float(self._rng.beta(10 * mean, 10 * (1 - mean)))
        yield tell(
            signals.Observation,
            seq=self._seq,
            value_name="audit.token_disagreement",
            slice_id="long",
            rung_id="mild",
            session_id=request.user,
            variant=arm,
            at_s=now_s,
            value=value,
            floor=0.0,
            share=engine.routing(self._policy, self.state).routes[1].share,
            half=half,
        )


def conversations(rng: np.random.Generator, hours: float, per_tick: float = 20.0) -> Iterator[list[Request]]:
    """Growing conversations: each begins short, and each minute has a turn of some 1,500 tokens more."""
    live: list[list[float]] = []
    number = 0
    for tick in range(int(hours * 3600 / TICK_S)):
        for _ in range(rng.poisson(per_tick)):
            live.append([number, 4096 + rng.exponential(1500), rng.integers(5, 60), tendency(rng)])
            number += 1
        now_s = START_S + tick * TICK_S
        yield [Request(f"c{int(n)}", int(t), now_s, own) for n, t, _, own in live if t < SLICE[1]]
        live = [[n, t + rng.exponential(1500), left - 1, own] for n, t, left, own in live if left > 1]


def regulars(rng: np.random.Generator, hours: float, users: int = 60) -> Iterator[list[Request]]:
    """The same users, who come back all day; each has a rate of its own."""
    own = np.array([tendency(rng) for _ in range(users)])
    own /= own.mean()  # of these very users the mean is what the world says
    for tick in range(int(hours * 3600 / TICK_S)):
        now_s = START_S + tick * TICK_S
        who = np.flatnonzero(rng.random(users) < 0.3)
        yield [Request(f"u{i}", int(length(rng)), now_s, float(own[i])) for i in who]


def strangers(rng: np.random.Generator, hours: float, per_tick: float = 20.0) -> Iterator[list[Request]]:
    """Sessions of a few requests within one tick, that never come back."""
    number = 0
    for tick in range(int(hours * 3600 / TICK_S)):
        now_s, found = START_S + tick * TICK_S, []
        for _ in range(rng.poisson(per_tick)):
            own = tendency(rng)
            found += [Request(f"s{number}", int(length(rng)), now_s, own) for _ in range(1 + rng.poisson(1))]
            number += 1
        yield found


def moody(rng: np.random.Generator, hours: float) -> Iterator[list[Request]]:
    """Strangers whose tendency wanders from hour to hour (an AR(1) of 0.9 a tick) and with day and night."""
    mood = 0.0
    for tick, found in enumerate(strangers(rng, hours, per_tick=8.0)):
        mood = 0.9 * mood + rng.normal(0, 0.13)
        day = 1 + 0.5 * math.sin(2 * math.pi * tick * TICK_S / 86_400)
        yield [replace(item, tendency=item.tendency * day * math.exp(mood - 0.0445)) for item in found]


def tendency(rng: np.random.Generator) -> float:
    """A session's own factor: 1 on average, 0.3 to 2.2 nine times in ten."""
    return float(rng.gamma(3.0, 1 / 3.0))


def length(rng: np.random.Generator) -> float:
    """Prompt tokens, log-uniform over the slice."""
    return float(math.exp(rng.uniform(math.log(SLICE[0]), math.log(SLICE[1]))))


def promoted(state: Any) -> bool:
    """Whether it was promoted."""
    return bool(state.outcome == "promoted")


def fell(state: Any) -> bool:
    """Whether it was rolled back."""
    return bool(state.outcome == "rolled_back")


def play(world: World, seed: int) -> Any:
    """One rollout of a world, to its end."""
    return Rollout(load_policy(world.policy, "independent.yaml"), world, seed).run()
