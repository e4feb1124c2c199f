"""What is true in a simulated world, and the sessions that it sends.

A session has one value per metric, as in the real store. Its own rate is drawn from a Beta distribution, so
its requests agree with each other; what is fed is the session's mean over its requests (F11). Metrics are
drawn independently of each other, which makes an any-of false alarm most likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from sentei.policies.evidence.base import Bools, Floats, Ints
from sentei.policies.simulation.plan import Gate, Plan

NOISE = 0.01  # mean of the dense-versus-dense floor, on the scale of the evidence
CONTROL_EVENTS = 0.02  # how often dense has an event that two arms are compared on


@dataclass(frozen=True, slots=True)
class Effect:
    """One guardrail stands at `factor` times its bound: from a session on, in a slice, from a rung on."""

    guardrail: str
    factor: float
    slice_id: str | None = None  # None: in every slice
    begins_at: int = 0  # sessions of the slice before it begins
    grows_over: int = 0  # sessions over which it grows to the factor: drift instead of a jump
    from_rung: int = 0  # at this rung and bolder ones


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world by its differences from a healthy one."""

    name: str
    about: str
    effects: tuple[Effect, ...] = ()
    level: float = 0.3  # everything else stands at this part of its bound
    excess: float = 0.0  # and every paired value at this part of its bound over the noise floor
    concentration: float = 20.0  # of a session's own rate; correlation inside a session is 1 / (1 + this)
    requests: int = 0  # of a session; 0: so many that its mean is its rate
    missing: float = 0.0  # share of chosen audits that are never scored
    silence: tuple[float, float] | None = None  # from, to in hours: nothing arrives
    tilt: float = 0.0  # log odds by which sessions miss their share
    sessions: int | None = None  # default: of the study
    compares: bool = True  # whether the threshold rules run beside


@dataclass(frozen=True, slots=True)
class Batch:
    """The sessions of one tick in all rollouts; arrays are [rollouts, slices] or [..., units]."""

    sessions: Ints  # by slice
    share: Floats  # that was intended
    candidates: Ints
    audits: Ints
    sparse_audits: Ints  # the first of the audits
    values: dict[str, Floats] = field(default_factory=dict)  # by metric, on the scale of the evidence
    floors: dict[str, Floats] = field(default_factory=dict)
    missing: Bools | None = None
    hits: dict[tuple[str, float | None], Bools] = field(default_factory=dict)  # of sparse sessions
    events: dict[str, tuple[Bools, Ints]] = field(default_factory=dict)  # by guardrail: arms in order, number


class World:
    """Draws the sessions of a scenario; every number comes from the generator that it is given."""

    def __init__(self, plan: Plan, scenario: Scenario, mix: Floats, rng: np.random.Generator) -> None:
        self._plan, self._scenario, self._mix, self._rng = plan, scenario, mix, rng
        self.seen = np.zeros(len(plan.slice_ids), dtype=np.int64)  # sessions by slice
        self._due = np.zeros(len(plan.slice_ids))
        gates = (*plan.gates, *plan.benefits)
        self._check(gates)
        self._audited = {gate.value: gate for gate in reversed(gates) if gate.is_audited}
        self._served = {(g.value, g.over_s): g for g in reversed(gates) if g.family == "operational"}
        self._arms = tuple(gate for gate in gates if gate.kind == "arms")

    def _check(self, gates: tuple[Gate, ...]) -> None:
        known = {gate.id for gate in gates if gate.kind != "ratio"}
        for effect in self._scenario.effects:
            if effect.guardrail not in known:
                raise ValueError(f'no guardrail "{effect.guardrail}"; there are: {", ".join(sorted(known))}')
            if effect.slice_id is not None and effect.slice_id not in self._plan.slice_ids:
                raise ValueError(
                    f'no routed slice "{effect.slice_id}"; there are: {", ".join(self._plan.slice_ids)}'
                )

    def factors(self, gate: Gate) -> Floats:
        """How many times its bound the truth is now, [slices, rungs]; the last effect on a cell counts."""
        healthy = self._scenario.excess if gate.floor_cap is not None else self._scenario.level
        if gate.kind == "arms":
            healthy = 1 / gate.bound  # both arms alike
        found = np.full((len(self._plan.slice_ids), self._plan.num_rungs), healthy)
        for effect in self._scenario.effects:
            if effect.guardrail != gate.id:
                continue
            for place, slice_id in enumerate(self._plan.slice_ids):
                age = self.seen[place] - effect.begins_at
                if effect.slice_id not in (None, slice_id) or age < 0:
                    continue
                grown = 1.0 if effect.grows_over == 0 else min(1.0, age / effect.grows_over)
                found[place, effect.from_rung :] = healthy + (effect.factor - healthy) * grown
        return found

    def arrive(self, expected: float, *, is_silent: bool) -> Ints:
        """How many sessions each slice gets in this tick; they come evenly, by the mix."""
        if is_silent:
            return np.zeros(len(self.seen), dtype=np.int64)
        self._due += expected * self._mix
        arrived = np.floor(self._due + 1e-9).astype(np.int64)
        self._due -= arrived
        return arrived

    def draw(self, sessions: Ints, shares: tuple[Floats, Floats, Floats], rung: Ints) -> Batch:
        """The sessions of one tick, with the shares (see Fleet) and the rung of every rollout and slice."""
        share, odds_dense, odds_sparse = shares
        rng, shape = self._rng, share.shape
        wide = np.broadcast_to(sessions, shape)
        real = share if self._scenario.tilt == 0 else _tilted(share, self._scenario.tilt)
        candidates = rng.binomial(wide, real)
        sparse_audits = rng.binomial(candidates, odds_sparse)
        audits = sparse_audits + rng.binomial(wide - candidates, odds_dense)
        batch = Batch(sessions, share, candidates, audits, sparse_audits)
        width = int(audits.max(initial=0))
        if width:
            for value in self._audited:
                self._draw_audits(batch, value, rung, width)
        missing = rng.random((*shape, width)) < self._scenario.missing if self._scenario.missing else None
        for key in self._served:
            batch.hits[key] = self._draw_hits(key, candidates, rung)
        for gate in self._arms:
            batch.events[gate.id] = self._draw_arms(gate, batch)
        self.seen += sessions
        return batch if missing is None else _with_missing(batch, missing)

    def _draw_audits(self, batch: Batch, value: str, rung: Ints, width: int) -> None:
        noise = self._noise(value)
        if noise:
            batch.floors[value] = self._rng.random((*rung.shape, width)) * 2 * noise
        batch.values[value] = self._sessions(self._means(value), rung, width)

    def truth(self, gate: Gate) -> Floats:
        """How many times its bound the truth is now, [slices, rungs], whichever guardrail set the metric."""
        if gate.is_audited:
            mean = self._means(gate.value)
            return (mean - self._noise(gate.value) * (gate.floor_cap is not None)) / gate.own_bound
        key = (gate.value, gate.over_s)
        if gate.kind == "arms":
            return self._rates(key) / (self._control_rate(key) * gate.bound)
        return self._rates(key) / gate.bound

    def _means(self, value: str) -> Floats:
        owner = self._owner(self._audited[value])
        noise = self._noise(value) if owner.floor_cap is not None else 0.0
        return np.asarray(np.clip(self.factors(owner) * owner.own_bound + noise, 1e-6, 1 - 1e-6))

    def _noise(self, value: str) -> float:
        """The mean floor of a metric that has one and is compared with it."""
        caps = [g.floor_cap for g in self._plan.gates if g.value == value and g.floor_cap is not None]
        return min(NOISE, min(caps) / 2) if caps else 0.0

    def _owner(self, first: Gate) -> Gate:
        """The guardrail whose truth sets the metric: one with an effect, else the first that watches it."""
        touched = {effect.guardrail for effect in self._scenario.effects}
        gates = [g for g in (*self._plan.gates, *self._plan.benefits) if g.value == first.value]
        return next((g for g in gates if g.id in touched and g.over_s == first.over_s), first)

    def _rates(self, key: tuple[str, float | None]) -> Floats:
        """How often a sparse session has the event, [slices, rungs]."""
        owner = self._owner(self._served[key])
        base = self._control_rate(key) if owner.kind == "arms" else 1.0
        return np.asarray(np.clip(self.factors(owner) * owner.bound * base, 0.0, 1.0))

    def _control_rate(self, key: tuple[str, float | None]) -> float:
        """How often a dense session has it: as often as a healthy sparse one."""
        owner = self._owner(self._served[key])
        return CONTROL_EVENTS if owner.kind == "arms" else self._scenario.level * owner.bound

    def _sessions(self, means: Floats, rung: Ints, width: int) -> Floats:
        """One value per session: the mean over its requests, each all wrong or all right."""
        c, rng = self._scenario.concentration, self._rng
        found = np.empty((*rung.shape, width))
        for place in range(rung.shape[1]):
            mean = means[place]
            if (mean == mean[0]).all():  # numbers instead of arrays: three times as fast
                found[:, place] = rng.beta(mean[0] * c, (1 - mean[0]) * c, (rung.shape[0], width))
            else:
                own = mean[rung[:, place]][:, None]
                found[:, place] = rng.beta(own * c, (1 - own) * c, (rung.shape[0], width))
        if self._scenario.requests:
            found = rng.binomial(self._scenario.requests, found) / self._scenario.requests
        return found

    def _draw_hits(self, key: tuple[str, float | None], candidates: Ints, rung: Ints) -> Bools:
        rates = self._rates(key)[np.arange(rung.shape[1])[None, :], rung]
        width = int(candidates.max(initial=0))
        return np.asarray(self._rng.random((*rung.shape, width)) < rates[..., None])

    def _draw_arms(self, gate: Gate, batch: Batch) -> tuple[Bools, Ints]:
        """The events of both arms in a random order, and how many there are."""
        key = (gate.value, gate.over_s)
        hits = batch.hits[key]
        own = (hits & (np.arange(hits.shape[-1]) < batch.candidates[..., None])).sum(axis=-1)
        others = self._rng.binomial(batch.sessions - batch.candidates, self._control_rate(key))
        total, left = own + others, own.astype(np.float64)
        width = int(total.max(initial=0))
        order = np.zeros((*own.shape, width), dtype=np.bool_)
        for place in range(width):
            rest = np.maximum(total - place, 1)
            order[..., place] = self._rng.random(own.shape) < left / rest
            left -= order[..., place]
        return order, total


def _tilted(share: Floats, tilt: float) -> Floats:
    return np.asarray(share * math.exp(tilt) / (1 + share * math.expm1(tilt)))


def _with_missing(batch: Batch, missing: Bools) -> Batch:
    return Batch(
        batch.sessions, batch.share, batch.candidates, batch.audits, batch.sparse_audits,
        batch.values, batch.floors, missing, batch.hits, batch.events,
    )  # fmt: skip
