"""The sessions of one simulated rollout as the signals of a real tick, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sentei.policies.engine import Decision, RolloutState, decide, initial_state
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Command, DriftSignal, Observation, Signals, SliceTraffic, VariantHealth
from sentei.policies.simulation.plan import Plan
from sentei.policies.simulation.study import MONDAY_S
from sentei.policies.simulation.world import Batch


@dataclass
class Twin:
    """A real rollout that is fed what row `row` of a simulation is fed."""

    policy: Policy
    plan: Plan
    row: int

    def __post_init__(self) -> None:
        self.state: RolloutState = initial_state(self.policy, f"r{self.row}", MONDAY_S)
        self._seq = 0
        self._ticks = 0
        self._window: list[tuple[float, int, int]] = []

    def tick(self, batch: Batch, rung: np.ndarray, is_live: np.ndarray, now_s: float) -> Decision:
        """Decide on one tick's sessions."""
        self._ticks += 1
        seen: list[Observation] = []
        for place, slice_id in enumerate(self.plan.slice_ids):
            if is_live[self.row, place]:
                rung_id = self.policy.rung_ids[int(rung[self.row, place])]
                for item in self._of_slice(batch, place, slice_id, rung_id, now_s):
                    seen.append(item)
        self._seq += 1
        live = is_live[self.row]
        candidates = np.where(live, batch.candidates[self.row], 0)
        signals = Signals(
            observations=tuple(seen),
            health=self._health(batch, candidates, live, now_s),
            drift=tuple(
                DriftSignal(item.id, "clear", 0.0, 0.1, 100, self._ticks) for item in self.policy.spec.signals
            ),
            traffic=tuple(
                SliceTraffic(
                    slice_id,
                    float(batch.share[self.row, place]) if live[place] else 0.0,
                    int(candidates[place]),
                    int(batch.sessions[place]),
                )
                for place, slice_id in enumerate(self.plan.slice_ids)
            ),
            commands=(Command(self.state.command_seq + 1, "approve", self._approver()),),
            cursor=self._seq,
            newest_data_at_s=now_s if batch.sessions.sum() else None,
        )
        decision = decide(self.policy, self.state, signals, now_s)
        self.state = decision.state
        return decision

    def _approver(self) -> str:
        gate = self.policy.stage(self.state.stage_id).approval
        return "ops" if gate is None or "anyone" in gate.by else gate.by[0]

    def _of_slice(
        self, batch: Batch, place: int, slice_id: str, rung_id: str, now_s: float
    ) -> Iterator[Observation]:
        def make(name: str, variant: str, value: float, **more: object) -> Observation:
            self._seq += 1
            where = (slice_id, rung_id, f"s{self._seq}", variant, now_s)
            return Observation(self._seq, name, *where, value=value, **more)  # type: ignore[arg-type]

        at = (self.row, place)
        scales = {gate.value: gate.scale for gate in (*self.plan.gates, *self.plan.benefits)}
        for unit in range(int(batch.audits[at])):
            variant = "sparse" if unit < batch.sparse_audits[at] else "dense"
            for name, values in batch.values.items():
                floor = batch.floors[name][(*at, unit)] * scales[name] if name in batch.floors else None
                yield make(
                    name,
                    variant,
                    float(values[(*at, unit)]) * scales[name],
                    floor=None if floor is None else float(floor),
                    missing=batch.missing is not None and bool(batch.missing[(*at, unit)]),
                )
        for name in {gate.value for gate in self.plan.gates if gate.family == "operational"}:
            yield from self._served(batch, at, name, make)  # type: ignore[arg-type]

    def _served(self, batch: Batch, at: tuple[int, int], name: str, make: object) -> Iterator[Observation]:
        keys = [key for key in batch.hits if key[0] == name]
        assert len(keys) == 1, "two guardrails on one time at different limits have no common session"
        key = keys[0]
        hits = batch.hits[key][at][: int(batch.candidates[at])]
        event, none = (1.0, 0.0) if key[1] is None else (key[1] * 2000, key[1] * 500)
        gate = next((g for g in self.plan.gates if g.kind == "arms" and (g.value, g.over_s) == key), None)
        if gate is None:
            for hit in hits:
                yield make(name, "sparse", event if hit else none)  # type: ignore[operator]
            return
        order, total = batch.events[gate.id]
        waiting = [bool(hit) for hit in hits]
        for is_candidate in order[at][: int(total[at])]:
            if not is_candidate:
                yield make(name, "dense", event)  # type: ignore[operator]
                continue
            while waiting and not waiting[0]:
                waiting.pop(0)
                yield make(name, "sparse", none)  # type: ignore[operator]
            waiting.pop(0)
            yield make(name, "sparse", event)  # type: ignore[operator]
        for _ in waiting:
            yield make(name, "sparse", none)  # type: ignore[operator]
        num_dense = int(batch.sessions[at[1]] - batch.candidates[at])
        num_quiet = num_dense - int((~order[at][: int(total[at])]).sum())
        for _ in range(num_quiet):
            yield make(name, "dense", none)  # type: ignore[operator]

    def _health(
        self, batch: Batch, candidates: np.ndarray, live: np.ndarray, now_s: float
    ) -> tuple[VariantHealth, ...]:
        window_s = self.plan.breaker_window_s
        failures = 0
        if ("serve.failed", None) in batch.hits:
            hits = batch.hits[("serve.failed", None)][self.row]
            failures = sum(
                int(hits[place, : candidates[place]].sum()) for place in range(len(live)) if live[place]
            )
        self._window = [item for item in self._window if item[0] > now_s - window_s]
        self._window.append((now_s, int(candidates.sum()), failures))
        requests, bad = (sum(item[index] for item in self._window) for index in (1, 2))
        return (
            VariantHealth("dense", window_s, 100, 0, 1),
            VariantHealth("sparse", window_s, requests, bad, 1),
        )
