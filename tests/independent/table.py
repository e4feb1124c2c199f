"""How often is harm promoted, and health rolled back? The table of docs/statistics.md, by one command.

    python -m tests.independent.table [--rollouts 100] [--only NAME]

Conversations of users are drawn here, request by request, from nothing of `policies/simulation`; who is
audited, and what is a unit, is done here a second time. Only `decide` is the product's. Intervals are
Clopper and Pearson's, 95 %.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import beta

from sentei.policies.engine import RolloutState, decide, initial_state, routing
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Observation, Signals, SliceLengths, SliceTraffic

BOUND, HEALTHY = 0.05, 0.025
PERIOD_S, TICK_S = 600.0, 60.0
WATCHED_UNITS = 100  # after promotion; then a rollout is left alone
START_S = 4 * 86_400.0
SLICE = (4096, 131_072)
BORDER = math.sqrt(SLICE[0] * SLICE[1])
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
  audit: {{select: {{fraction: 20%, period: 10m}}}}
  guardrails:
    detector_arl: 100000
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: {BOUND}, floor_cap: 5%}},
         test: betting_paired, action: rollback}}
  breaker: {{variant: {{window: 60s, min_requests: 1000, failure_share: 50%}}}}
  data: {{max_age: 10m, no_data: {{grace: 1h, after: 6h}}, monitor_lease: 120s}}
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

    about: str
    promise: str
    requests: Callable[[np.random.Generator, float], Iterator[list[Request]]]  # one list a tick
    rate: Callable[[Request, str, RolloutState], float]  # by request, who served it, and the state
    hours: float
    is_wrong: Callable[[RolloutState], bool]
    rollouts: int | None = None
    policy: str = POLICY
    is_followed: bool = False  # after promotion, too


@dataclass
class Draw:
    """Audits of one rollout: one request in every K of a session and arm, at a place drawn beforehand."""

    rng: np.random.Generator
    counts: dict[tuple[str, str, float], list[int]] = field(default_factory=dict)

    def has(self, user: str, arm: str, probability: float) -> bool:
        """Whether the next request is audited."""
        if probability <= 0:
            return False
        window = math.ceil(1 / probability)
        place = self.counts.setdefault((user, arm, probability), [0, 0])
        if place[0] % window == 0:
            is_one = self.rng.random() < probability * window
            place[1] = int(self.rng.integers(window)) if is_one else -1
        chosen = place[0] % window == place[1]
        place[0] += 1
        return chosen


class Rollout:
    """One rollout in a world."""

    def __init__(self, policy: Policy, world: World, seed: int) -> None:
        self._policy, self._world = policy, world
        self._rng = np.random.default_rng((seed, 77))
        self._draw = Draw(self._rng)
        self._seen: set[tuple[object, ...]] = set()
        self._spots: dict[str, float] = {}
        self._seq = 0
        self.state = initial_state(policy, f"r{seed}", START_S)
        self.audits = 0
        self.since_promotion = 0

    def run(self) -> RolloutState:
        """To the end of the world, or to the fall."""
        now_s = START_S
        for requests in self._world.requests(self._rng, self._world.hours):
            now_s += TICK_S
            self._tick(requests, now_s)
            is_over = self.state.phase == "promoted" and not self._world.is_followed
            if is_over or self.state.phase == "rolled_back" or self.since_promotion >= self._watched():
                break
        return self.state

    def _watched(self) -> float:
        """How many units after promotion are enough to know; of a healthy world there are never enough."""
        return math.inf if self._world.is_wrong is _fell else WATCHED_UNITS

    def _tick(self, requests: list[Request], now_s: float) -> None:
        route = routing(self._policy, self.state).routes[1]
        units: list[Observation] = []
        arrivals, candidates, upper = 0, 0, 0
        for request in requests:
            spot = self._spots.setdefault(request.user, float(self._rng.random()))
            arm = "sparse" if spot < route.share else "dense"
            half = "upper" if request.tokens >= BORDER else "lower"
            upper += half == "upper"
            if ("new", request.user) not in self._seen:
                self._seen.add(("new", request.user))
                arrivals, candidates = arrivals + 1, candidates + (arm == "sparse")
            odds = route.audit_share_sparse if arm == "sparse" else route.audit_share
            if self._draw.has(request.user, arm, odds):
                self.audits += 1
                units += self._unit(request, arm, half, now_s)
        self._seq += 1
        signals = Signals(
            observations=tuple(units),
            traffic=(SliceTraffic("long", route.share, candidates, arrivals),),
            lengths=(SliceLengths("long", len(requests), upper),),
            cursor=self._seq,
            newest_data_at_s=now_s if requests else None,
        )
        if self.state.phase == "promoted":
            self.since_promotion += len(units)
        self.state = decide(self._policy, self.state, signals, now_s).state

    def _unit(self, request: Request, arm: str, half: str, now_s: float) -> Iterator[Observation]:
        since_s = self.state.stage_entered_s if self.state.phase != "promoted" else self.state.ended_s
        key = (request.user, arm, half, since_s, (now_s - (since_s or 0.0)) // PERIOD_S)
        if key in self._seen:
            return
        self._seen.add(key)
        self._seq += 1
        mean = min(max(self._world.rate(request, arm, self.state) * request.tendency, 1e-4), 1 - 1e-4)
        value = self._rng.beta(10 * mean, 10 * (1 - mean))
        place = ("long", "mild", request.user, arm, now_s)
        base = Observation(self._seq, "audit.token_disagreement", *place, value=float(value), floor=0.0)
        yield replace(base, share=routing(self._policy, self.state).routes[1].share, half=half)


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


def share_beyond(tokens: int) -> float:
    """The share of the requests of growing conversations that are longer."""
    found = [r for tick in conversations(np.random.default_rng(1), 4.0) for r in tick]
    return float(np.mean([item.tokens >= tokens for item in found]))


def _promoted(state: RolloutState) -> bool:
    return state.outcome == "promoted"


def _fell(state: RolloutState) -> bool:
    return state.outcome == "rolled_back"


def _after_shadow(factor: float) -> Callable[[Request, str, RolloutState], float]:
    return lambda _r, _arm, state: HEALTHY / 2 if state.stage_id == "shadow" else factor * BOUND


def worlds() -> dict[str, World]:
    """Every line of the table."""
    beyond = share_beyond(24_576)
    at_most = "at most 5 %"
    return {
        "growing": World(
            "A1 growing conversations, all harm beyond 24k tokens, twice the bound on average: promoted",
            at_most, conversations,
            lambda r, _arm, _state: 2 * BOUND / beyond if r.tokens >= 24_576 else 1e-4, 8.0, _promoted,
        ),
        "returning": World(
            "A2 60 returning users at twice the bound: promoted",
            at_most, regulars, lambda *_: 2 * BOUND, 12.0, _promoted,
        ),
        "watch": World(
            "A2 150 returning users, four times the bound once promoted: not rolled back within 100 units",
            at_most, lambda rng, hours: regulars(rng, hours, 150),
            lambda _r, _arm, state: 4 * BOUND if state.outcome == "promoted" else HEALTHY / 2, 30.0,
            lambda state: not _fell(state), 40, is_followed=True,
        ),
        "regime": World(
            "A3 healthy in shadow, twice the bound from then on, no bake: promoted",
            at_most, strangers, _after_shadow(2.0), 8.0, _promoted, policy=NO_BAKE,
        ),
        "regime15": World(
            "A3 healthy in shadow, 1.5 times the bound from then on, no bake: promoted",
            at_most, strangers, _after_shadow(1.5), 8.0, _promoted, policy=NO_BAKE,
        ),
        "served": World(
            "A3 harm only in what sparse served, twice the bound, last stage 10 %: promoted",
            at_most, strangers,
            lambda _r, arm, _state: 2 * BOUND if arm == "sparse" else HEALTHY / 4, 8.0, _promoted, policy=FEW,
        ),
        "bound": World(
            "at the bound everywhere: promoted", at_most, strangers, lambda *_: BOUND, 8.0, _promoted
        ),
        "healthy": World(
            "half the bound with persistence and day and night, 24 h: rolled back",
            "at most 10 %", moody, lambda *_: HEALTHY, 24.0, _fell, 80, is_followed=True,
        ),
        "healthy-returning": World(
            "half the bound, 60 returning users, 24 h: rolled back",
            "at most 10 %", regulars, lambda *_: HEALTHY, 24.0, _fell, 80, is_followed=True,
        ),
        "arrives": World(
            "half the bound, strangers: not promoted within 8 h",
            "at most 10 %", strangers, lambda *_: HEALTHY, 8.0, lambda state: not _promoted(state), 40,
        ),
    }  # fmt: skip


def exact(hits: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's interval."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, trials - hits + 1))
    return low, 1.0 if hits == trials else float(beta.ppf(0.975, hits + 1, trials - hits))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print("| what | wrong | exact 95 % | asked |\n|---|---|---|---|", flush=True)
    for name, world in worlds().items():
        if options.only and name not in options.only.split(","):
            continue
        num, begin = min(options.rollouts, world.rollouts or options.rollouts), time.monotonic()
        ends = [Rollout(load_policy(world.policy), world, seed).run() for seed in range(num)]
        hits = sum(world.is_wrong(state) for state in ends)
        low, high = exact(hits, num)
        took = f"<!-- {name} {time.monotonic() - begin:.0f} s -->"
        print(
            f"| {world.about} | {hits} of {num} | {low:.1%} to {high:.1%} | {world.promise} | {took}",
            flush=True,
        )


if __name__ == "__main__":
    main()
