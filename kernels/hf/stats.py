"""What a retrofit did: which attention calls were thinned, and how much they kept.

What a call kept stays on the device of its mask until somebody asks: reading it off a GPU in each layer of a
decode step would stop the step there.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

CALLS_KEPT = 4096


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One attention call of one layer; `kept` of the causal blocks by each KV group, shares [Hkv] in fp64."""

    layer: int
    q_tokens: int
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
        LayerCall(call.layer, call.q_tokens, call.path, tuple(next(numbers) for _ in range(len(call.kept))))
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

    def density(self) -> float | None:
        """Mean density of the latest calls, dense layers included; None if every call was dense."""
        if not self.has_run_sparse:
            return None
        return sum(call.density for call in read_calls(self.calls)) / len(self.calls)

    def density_by_group(self) -> dict[int, tuple[float, ...]]:
        """Mean density of the latest calls of each layer, KV group by KV group."""
        by_layer: dict[int, list[tuple[float, ...]]] = {}
        for call in read_calls(self.calls):
            by_layer.setdefault(call.layer, []).append(call.density_by_group)
        return {
            layer: tuple(sum(group) / len(group) for group in zip(*densities, strict=True))
            for layer, densities in by_layer.items()
        }
