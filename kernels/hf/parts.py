"""Seconds of a forward pass by part: what attention itself, scoring, projections and the rest take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import nn

from sentei.kernels.hf.models import attention_modules, text_decoder

FULL_ATTENTION, WINDOW_ATTENTION = "full attention", "window attention"
FEATURES, SCORING, SELECTION = "features", "scoring", "selection"
PROJECTIONS, MLP, NORMS, EMBEDDING, HEAD = "projections", "MLP", "norms", "embedding", "head"
ROTARY, REST = "rotary, cache, layout", "rest"
PARTS = (
    FULL_ATTENTION,
    WINDOW_ATTENTION,
    FEATURES,
    SCORING,
    SELECTION,
    PROJECTIONS,
    MLP,
    NORMS,
    ROTARY,
    EMBEDDING,
    HEAD,
    REST,
)


class PartClock:
    """Adds up each part's own seconds: what runs inside another part is taken off that one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """Each part's own seconds so far."""
        return MappingProxyType(self._seconds)

    def enter(self, part: str) -> None:
        """Begin a part, inside the one that runs."""
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._open.append(part)
        self._since = now

    def leave(self) -> None:
        """End the part that runs, and go on with the one around it."""
        now = self._now()
        self._seconds[self._open.pop()] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the length of a `with` block as a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


@contextmanager
def clocked_modules(model: nn.Module, clock: PartClock) -> Iterator[None]:
    """Let the clock run in a model's modules for the length of a `with` block; what is left is `rest`."""
    hooks: list[Any] = []

    def enter(part: str) -> Any:
        return lambda *_: clock.enter(part)

    for module, part in _parts_of(model).items():
        hooks.append(module.register_forward_pre_hook(enter(part)))
        hooks.append(module.register_forward_hook(lambda *_: clock.leave()))
    try:
        with clock.part(REST):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the part that each clocked module belongs to; modules inside one another nest."""
    parts: dict[nn.Module, str] = {}
    decoder: Any = text_decoder(model)
    attention = {module for _, module in attention_modules(model)}
    for module in decoder.modules():
        if "Norm" in type(module).__name__:
            parts[module] = NORMS
        elif module in attention:
            parts[module] = ROTARY  # what is left of it once projections, norms and attention are taken off
            parts |= {child: PROJECTIONS for child in module.modules() if isinstance(child, nn.Linear)}
        elif isinstance(module, nn.Embedding):
            parts[module] = EMBEDDING
    for layer in decoder.layers:
        for child in layer.children():
            if child not in parts and any(isinstance(inner, nn.Linear) for inner in child.modules()):
                parts[child] = MLP
    parts[decoder.rotary_emb] = ROTARY
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return parts | ({head: HEAD} if head is not None else {})
