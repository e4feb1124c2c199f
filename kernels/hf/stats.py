"""What a retrofit did: which attention calls were thinned, and how much they kept."""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

CALLS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One attention call of one layer."""

    layer: int
    q_tokens: int
    path: Literal["dense", "sparse"]
    density_by_group: tuple[float, ...]

    @property
    def density(self) -> float:
        """Kept share of the causal blocks, over all KV groups."""
        return sum(self.density_by_group) / len(self.density_by_group)


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
        return sum(call.density for call in self.calls) / len(self.calls)

    def density_by_group(self) -> dict[int, tuple[float, ...]]:
        """Mean density of the latest calls of each layer, KV group by KV group."""
        by_layer: dict[int, list[tuple[float, ...]]] = {}
        for call in self.calls:
            by_layer.setdefault(call.layer, []).append(call.density_by_group)
        return {
            layer: tuple(sum(group) / len(group) for group in zip(*densities, strict=True))
            for layer, densities in by_layer.items()
        }
