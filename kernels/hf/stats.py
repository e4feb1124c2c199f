"""What a retrofit did: which attention calls were thinned, and how much they kept.

What a call kept stays on the device of its mask until somebody asks: reading it off a GPU in each layer of a
decode step would stop the step there.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

CALLS_KEPT = 4096


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One attention call of one layer.

    `causal` blocks are in sight of its query blocks, of one head and sequence, and say what the call weighs;
    `kept` are the shares of them that each KV group read, [Hkv] in fp64.
    """

    layer: int
    q_tokens: int
    causal: int
    path: Literal["dense", "sparse"]
    kept: torch.Tensor | tuple[float, ...]

    @property
    def density_by_group(self) -> tuple[float, ...]:
        """Kept share of the causal blocks, by KV group; read off the device."""
        return tuple(self.kept.tolist()) if isinstance(self.kept, torch.Tensor) else self.kept

    @property
    def density(self) -> float:
        """Kept share of the causal blocks, over all KV groups; read off the device."""
        return sum(self.density_by_group) / len(self.density_by_group)

    @property
    def mean_kept(self) -> torch.Tensor | float:
        """The density as it is, where it is: a tensor without dimensions, or a number."""
        if isinstance(self.kept, torch.Tensor):
            return self.kept.mean()
        return self.density


def read_calls(calls: Iterable[LayerCall]) -> list[LayerCall]:
    """Return the calls with plain numbers; those of one device are read in one go."""
    found = list(calls)
    waiting = [call.kept for call in found if isinstance(call.kept, torch.Tensor)]
    numbers = iter(torch.cat(waiting).tolist() if waiting else ())
    return [
        replace(call, kept=tuple(next(numbers) for _ in range(len(call.kept))))
        if isinstance(call.kept, torch.Tensor)
        else call
        for call in found
    ]


@dataclass(slots=True)
class RetrofitStats:
    """Counts over all calls since the last reset, and the latest calls one by one."""

    num_sparse: int = 0
    calls: deque[LayerCall] = field(default_factory=lambda: deque(maxlen=CALLS_KEPT))

    @property
    def has_run_sparse(self) -> bool:
        """Whether the sparse path ran at all: a proof of activity."""
        return self.num_sparse > 0

    def add(self, call: LayerCall) -> None:
        """Take in one call."""
        self.calls.append(call)
        if call.path == "sparse":
            self.num_sparse += 1

    def read(self) -> list[LayerCall]:
        """Return the latest calls with plain numbers, and keep these: nothing is read off a device twice."""
        calls = read_calls(self.calls)
        self.calls.clear()
        self.calls.extend(calls)
        return calls

    def density(self, *, least_tokens: int = 1) -> float | None:
        """Share read of what the latest calls saw, dense layers included; None if every call was dense.

        Calls of fewer query tokens do not count: with 2 it is the density of prompts without decode steps.
        """
        if not self.has_run_sparse:
            return None
        calls = [call for call in self.read() if call.q_tokens >= least_tokens]
        if not calls:
            return None
        return sum(call.density * call.causal for call in calls) / sum(call.causal for call in calls)

    def density_by_group(self) -> dict[int, tuple[float, ...]]:
        """The same of each layer, KV group by KV group."""
        by_layer: dict[int, list[LayerCall]] = {}
        for call in self.read():
            by_layer.setdefault(call.layer, []).append(call)
        return {layer: _density_by_group(calls) for layer, calls in by_layer.items()}


def _density_by_group(calls: list[LayerCall]) -> tuple[float, ...]:
    total = sum(call.causal for call in calls)
    kept = zip(*(call.density_by_group for call in calls), strict=True)
    weights = [call.causal / total for call in calls]
    return tuple(sum(x * w for x, w in zip(group, weights, strict=True)) for group in kept)
