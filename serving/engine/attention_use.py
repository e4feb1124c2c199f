"""How much of the attention a request used: a few numbers per layer, bounded in bytes. Plain Python."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsFloat


class Call(Protocol):
    """One attention call of one layer, as `sentei.kernels.hf.stats.LayerCall` tells of it."""

    @property
    def layer(self) -> int:
        """Which layer."""

    @property
    def q_tokens(self) -> int:
        """Query rows: 1 in a decode step."""

    @property
    def causal(self) -> int:
        """Blocks in sight of its query blocks: what it weighs."""

    @property
    def path(self) -> str:
        """`dense` or `sparse`."""

    @property
    def mean_kept(self) -> Any:
        """Kept share of the causal blocks: a number, or a value that is still on a GPU and adds like one."""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One layer's density over all of the prefill and all decode steps; None where it had none."""

    layer: int
    prefill_density: float | None
    decode_density: float | None


@dataclass(frozen=True, slots=True)
class AttentionUse:
    """What one request's attention kept; only full-attention layers are counted."""

    sparse_calls: int
    dense_calls: int
    layers: tuple[LayerUse, ...]

    def to_dict(self, max_bytes: int) -> dict[str, Any] | None:
        """Return it for JSON in at most `max_bytes`: without layers where needed, None if nothing fits."""
        whole: dict[str, Any] = {
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "prefill_density": _mean(use.prefill_density for use in self.layers),
            "decode_density": _mean(use.decode_density for use in self.layers),
            "layers": {str(use.layer): [use.prefill_density, use.decode_density] for use in self.layers},
        }
        for found in (whole, {**whole, "layers": None}):
            if len(to_json(found)) <= max_bytes:
                return found
        return None


@dataclass(slots=True)
class AttentionMeter:
    """Adds up a request's attention calls, pass by pass; its size depends on the number of layers alone.

    Sums of what is on a GPU stay there until they are read.
    """

    sparse_calls: int = 0
    dense_calls: int = 0
    _sums: dict[int, list[Any]] = field(default_factory=dict)  # per layer: blocks kept, blocks seen; twice

    def add(self, calls: Iterable[Call]) -> None:
        """Take in the calls of one forward pass."""
        for call in calls:
            if call.path == "sparse":
                self.sparse_calls += 1
            else:
                self.dense_calls += 1
            sums = self._sums.setdefault(call.layer, [0.0, 0.0, 0.0, 0.0])
            at = 2 if call.q_tokens == 1 else 0
            sums[at] = sums[at] + call.causal * call.mean_kept  # never in place: the call keeps its own
            sums[at + 1] += call.causal

    def read(self) -> AttentionUse:
        """Return what was added so far."""
        layers = tuple(
            LayerUse(layer, _ratio(sums[0], sums[1]), _ratio(sums[2], sums[3]))
            for layer, sums in sorted(self._sums.items())
        )
        return AttentionUse(self.sparse_calls, self.dense_calls, layers)


def to_json(found: dict[str, Any] | None) -> str:
    """Return the compact text that is stored; empty where there is nothing."""
    return "" if found is None else json.dumps(found, separators=(",", ":"))


def _ratio(total: SupportsFloat, count: float) -> float | None:
    return round(float(total) / count, 4) if count else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
