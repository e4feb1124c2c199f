"""One scenario over many rollouts, and who was wrong how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.special import betaincinv

from sentei.policies.evidence.base import Bools, Floats
from sentei.policies.schema.policy import Policy
from sentei.policies.simulation.fleet import PROMOTED, ROLLED_BACK, STAGE_MAX, Fall, Fleet
from sentei.policies.simulation.naive import RULES, NaiveFleet
from sentei.policies.simulation.plan import Plan, make_plan
from sentei.policies.simulation.world import Batch, Scenario, World

MONDAY_S = 4 * 86_400.0 + 8 * 3600.0  # a Monday at 08:00 UTC: freeze windows are where they are in real life
NEVER = -1


@dataclass(frozen=True, slots=True)
class Traffic:
    """What arrives: sessions of all routed slices together, and how they fall on the slices."""

    sessions_per_hour: float = 600.0
    sessions: int = 9000
    mix: tuple[float, ...] = ()  # by routed slice; empty: evenly

    def shares(self, plan: Plan) -> Floats:
        """The mix as shares that sum to 1."""
        given = np.array(self.mix or (1.0,) * len(plan.slice_ids), dtype=np.float64)
        if len(given) != len(plan.slice_ids) or not (given >= 0).all() or given.sum() <= 0:
            raise ValueError(
                f"the mix needs one number of at least 0 for each of {', '.join(plan.slice_ids)}"
            )
        return np.asarray(given / given.sum())


@dataclass(slots=True)
class Tally:
    """What happened to each rollout of a scenario; NEVER where it did not happen."""

    rollouts: int = 0
    outcome: list[int] = field(default_factory=list)  # phase at the end
    false_alarm: list[bool] = field(default_factory=list)  # something within its bounds was acted upon
    false_pass: list[bool] = field(default_factory=list)  # promoted with something at or over its bound
    is_watch: list[bool] = field(default_factory=list)  # of the false alarms: by the detector alone
    timed_out: list[bool] = field(default_factory=list)
    caught_units: list[int] = field(default_factory=list)  # of the harmed guardrail, until the right act
    caught_sessions: list[int] = field(default_factory=list)  # of the harmed slice
    promoted_at: list[int] = field(default_factory=list)  # sessions of all slices
    exposed: int = 0  # sessions that sparse served where harm was (anywhere, if there was none)
    could_be: int = 0  # sessions there
    naive: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)  # see NaiveFleet.counts
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Take the rollouts of another part of the same scenario in."""
        self.rollouts += other.rollouts
        for name in ("outcome", "false_alarm", "false_pass", "is_watch", "timed_out"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("caught_units", "caught_sessions", "promoted_at"):
            getattr(self, name).extend(getattr(other, name))
        self.exposed += other.exposed
        self.could_be += other.could_be
        for rule, counts in other.naive.items():
            a, b, c, d = self.naive.get(rule, (0, 0, 0, 0))
            self.naive[rule] = (a + counts[0], b + counts[1], c + counts[2], d + counts[3])


def run_scenario(
    policy: Policy,
    scenario: Scenario,
    traffic: Traffic,
    *,
    rollouts: int,
    seed: np.random.SeedSequence,
    approves: bool = True,
    on_tick: Callable[[int, int], None] | None = None,
) -> Tally:
    """Simulate one scenario; the same seed gives the same tally."""
    study = Study(policy, scenario, traffic, rollouts=rollouts, seed=seed, approves=approves)
    for _ in study.play():
        if on_tick is not None:
            on_tick(study.num_sessions, study.horizon)
    return study.tally()


class Study:
    """One scenario on its way; `play` yields each tick's batch after it was decided on."""

    def __init__(
        self,
        policy: Policy,
        scenario: Scenario,
        traffic: Traffic,
        *,
        rollouts: int,
        seed: np.random.SeedSequence,
        approves: bool = True,
    ) -> None:
        self.plan = plan = make_plan(policy)
        self.scenario, self.num_rollouts = scenario, rollouts
        self.horizon = scenario.sessions or traffic.sessions
        self.num_sessions = 0
        self.per_tick = traffic.sessions_per_hour * plan.tick_s / 3600
        mix = traffic.shares(plan)
        self.world = World(plan, scenario, mix, np.random.default_rng(seed))
        self.fleet = Fleet(plan, rollouts, int(self.horizon + self.per_tick + 2), approves=approves)
        self.now_s = 0.0
        self.rivals: list[NaiveFleet] = []
        if scenario.compares:
            per_slice = self.per_tick * float(mix.min())
            self.rivals = [NaiveFleet(rule, plan, rollouts, per_slice) for rule in RULES]
        self._ledger = _Ledger(self)

    def play(self) -> Iterator[Batch]:
        """Tick after tick, until the sessions are used up or nothing can happen any more."""
        self.now_s = MONDAY_S
        self.fleet.entered_s[...] = self.fleet.news_s = MONDAY_S
        while self.num_sessions < self.horizon and not self._is_over():
            self.now_s += self.plan.tick_s
            sessions = self.world.arrive(self.per_tick, is_silent=self._is_silent())
            shares = self.fleet.shares()
            self._ledger.before()
            batch = self.world.draw(sessions, shares, self.fleet.rung)
            self._ledger.drawn(batch)
            self.fleet.tick(batch, self.now_s)
            self.num_sessions += int(sessions.sum())
            for rival in self.rivals:
                rival.tick(batch, is_harm=self._ledger.is_harm, is_at_bound=self._ledger.is_at_bound)
            self._ledger.after()
            yield batch

    def _is_silent(self) -> bool:
        silence = self.scenario.silence
        hours = (self.now_s - MONDAY_S) / 3600
        return silence is not None and silence[0] <= hours < silence[1]

    def _is_over(self) -> bool:
        is_done = bool((self.fleet.phase == ROLLED_BACK).all())
        return is_done and all(bool((rival.outcome != 0).all()) for rival in self.rivals)

    def tally(self) -> Tally:
        """What happened."""
        return self._ledger.tally()


class _Ledger:
    """Keeps, beside the rollouts, what was true when something was done."""

    def __init__(self, study: Study) -> None:
        self._study, num = study, study.num_rollouts
        shape = (num, len(study.plan.slice_ids))
        gates = study.plan.gates
        self._false_alarm, self._false_pass, self._watch, self._late = (
            np.zeros(num, dtype=np.bool_) for _ in range(4)
        )
        self._units, self._sessions, self._promoted_at = (np.full(num, NEVER) for _ in range(3))
        harmed = {effect.guardrail for effect in study.scenario.effects if effect.factor > 1}
        self._harmed = [index for index, gate in enumerate(gates) if gate.id in harmed]
        self._since_units = np.zeros((len(gates), *shape), dtype=np.int64)
        self._since_sessions = np.zeros((len(gates), shape[1]), dtype=np.int64)
        self._truth = np.zeros((len(gates), shape[1], study.plan.num_rungs))
        self._phase = study.fleet.phase.copy()
        self._live = study.fleet.is_live
        self._rung = study.fleet.rung
        self._exposed = self._could_be = 0

    @property
    def is_harm(self) -> bool:
        """Whether anything is over its bound now."""
        return bool((self._truth > 1 + 1e-9).any())

    @property
    def is_at_bound(self) -> bool:
        """Whether anything is at or over its bound now."""
        return bool((self._truth >= 1 - 1e-9).any())

    def before(self) -> None:
        """What is true while this tick's sessions run."""
        study = self._study
        for index, gate in enumerate(study.plan.gates):
            if gate.kind != "ratio":
                self._truth[index] = study.world.truth(gate)
        self._phase, self._live, self._rung = study.fleet.phase.copy(), study.fleet.is_live, study.fleet.rung

    def drawn(self, batch: Batch) -> None:
        """Count units and exposure, before anybody decides."""
        is_harm = self._truth.max(axis=2) > 1 + 1e-9  # at some rung, [guardrails, slices]
        has_harm = bool(self._harmed)
        exposed_to = self._harm_now().any(axis=0) if has_harm else np.ones_like(self._live)
        where = is_harm.any(axis=0) if has_harm else np.ones(self._live.shape[1], dtype=np.bool_)
        self._exposed += int((batch.candidates * self._live * exposed_to)[:, where].sum())
        self._could_be += int(batch.sessions[where].sum()) * self._study.num_rollouts
        for index in self._harmed:
            gate = self._study.plan.gates[index]
            units = batch.audits if gate.is_audited else batch.candidates
            self._since_units[index] += units * is_harm[index]
            self._since_sessions[index] += batch.sessions * is_harm[index]

    def _harm_now(self, level: float = 1 + 1e-9) -> Bools:
        """Where the truth is over the bound at the rung in use, [guardrails, rollouts, slices]."""
        cols = np.arange(self._rung.shape[1])[None, :]
        return np.asarray(self._truth[:, cols, self._rung] >= level)

    def after(self) -> None:
        """Who acted, and whether that was right."""
        fleet, harm = self._study.fleet, self._harm_now()
        for fall in fleet.falls:
            self._note_fall(fall, harm)
        promoted = (fleet.phase == PROMOTED) & (self._phase != PROMOTED)
        if promoted.any():
            wrong = (self._harm_now(1 - 1e-9) & ~fleet.is_dense).any(axis=(0, 2))
            self._false_pass |= promoted & wrong
            self._promoted_at[promoted] = self._study.num_sessions

    def _note_fall(self, fall: Fall, harm: Bools) -> None:
        rows = fall.rows
        if fall.by == STAGE_MAX:
            self._late[rows] = True
            return
        if fall.by < 0:
            self._false_alarm[rows] |= not self._harmed
            return
        gate = self._study.plan.gates[fall.by]
        if gate.kind == "ratio":
            self._false_alarm[rows] |= self._study.scenario.tilt == 0
            return
        own = harm[fall.by, rows]
        right = np.where(fall.place < 0, own.any(axis=1), own[np.arange(len(rows)), fall.place])
        self._false_alarm[rows] |= ~right
        self._watch[rows] |= ~right & fall.is_watch
        place = np.where(fall.place < 0, own.argmax(axis=1), fall.place)
        first = right & (self._units[rows] == NEVER)
        self._units[rows[first]] = self._since_units[fall.by, rows[first], place[first]]
        self._sessions[rows[first]] = self._since_sessions[fall.by, place[first]]

    def tally(self) -> Tally:
        """The lists behind the figures."""
        study = self._study
        return Tally(
            rollouts=study.num_rollouts,
            outcome=study.fleet.phase.tolist(),
            false_alarm=self._false_alarm.tolist(),
            false_pass=self._false_pass.tolist(),
            is_watch=self._watch.tolist(),
            timed_out=self._late.tolist(),
            caught_units=self._units.tolist(),
            caught_sessions=self._sessions.tolist(),
            promoted_at=self._promoted_at.tolist(),
            exposed=self._exposed,
            could_be=self._could_be,
            naive={rival.rule.name: rival.counts() for rival in study.rivals},
        )


def exact_interval(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a proportion: it holds it with at least that level."""
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - tail))
    return low, high


def median_of(caught: list[int]) -> int | None:
    """The median over all rollouts, where one that was never caught counts as later than any."""
    ordered = sorted(np.inf if value == NEVER else value for value in caught)
    middle = ordered[(len(ordered) - 1) // 2] if ordered else np.inf
    return None if np.isinf(middle) else int(middle)
