"""Where a model's time goes: the seconds of each part, beside what the machine's own peaks would allow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from sentei.kernels.bench.machine import Machine
from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.models import attention_modules, layer_window, text_decoder
from sentei.kernels.hf.parts import (
    FULL_ATTENTION,
    HEAD,
    MLP,
    PARTS,
    PROJECTIONS,
    WINDOW_ATTENTION,
    PartClock,
    clocked_modules,
)
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.kernels.placement import clock_of
from sentei.pipeline.measure.latency import BEST_DENSE, DENSE_BASES, prefill
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of one variant's forward pass by part, and the floor of the parts that are matrix products."""

    variant: str
    seconds: Mapping[str, float]
    floor_s: Mapping[str, float]
    density: float | None  # share of the causal blocks that full attention read; None where it read them all

    @property
    def total_s(self) -> float:
        """Seconds of the whole pass."""
        return sum(self.seconds.values())


def prefill_budgets(
    loaded: LoadedModel,
    adapter: Adapter,
    text: torch.Tensor,
    machine: Machine,
    *,
    runs: int,
    progress: Progress,
) -> list[Budget]:
    """Clock the parts of a prefill of text [T], for our own dense and every rung, taking turns."""
    variants = [BEST_DENSE, *(rung.id for rung in adapter.ladder.rungs if not rung.is_dense)]
    found: dict[str, list[tuple[Mapping[str, float], float | None]]] = {name: [] for name in variants}
    for i_run, variant in counted(list(product(range(runs + 1), variants)), "clock the parts", progress):
        rung = DENSE if variant in DENSE_BASES else variant
        with retrofit(loaded.model, adapter, rung, base="best") as handle:
            seconds = clock_parts(handle, partial(prefill, loaded, text, handle))
            if i_run:  # the first round warms up
                found[variant].append((seconds, handle.stats().density()))
    return [
        Budget(
            variant,
            {part: statistics.median(run.get(part, 0.0) for run, _ in runs_) for part in PARTS},
            prefill_floor(loaded, len(text), density=runs_[0][1], gflops=_peak(loaded, machine)),
            runs_[0][1],
        )
        for variant, runs_ in found.items()
    ]


def clock_parts(handle: Retrofit, work: Callable[[], None]) -> Mapping[str, float]:
    """Return the seconds that each part of a model under retrofit takes in one call of `work`."""
    clock = PartClock(clock_of(next(handle.model.parameters()).device))
    with handle.clocked(clock), clocked_modules(handle.model, clock):
        work()
    return dict(clock.seconds)


def prefill_floor(
    loaded: LoadedModel, tokens: int, *, density: float | None, gflops: float
) -> dict[str, float]:
    """Return the seconds that the matrix products of a prefill would take at `gflops` (1e9 FLOP a second).

    A product of [m, k] and [k, n] counts 2 m k n; attention counts 4 D for each pair of tokens that is read.
    """
    config = loaded.model.config.get_text_config()
    modules = list(attention_modules(loaded.model))
    per_pair = 4.0 * config.num_attention_heads * int(modules[0][1].head_dim)  # type: ignore[arg-type]
    causal = tokens * (tokens + 1) / 2
    full = window = projections = 0.0
    for index, module in modules:
        projections += _linear_flops(module, tokens)
        size = layer_window(config, index)
        if size is None:
            full += per_pair * causal * (1.0 if density is None else density)
        else:
            seen = min(size, tokens)
            window += per_pair * (seen * (seen + 1) / 2 + (tokens - seen) * seen)
    decoder: Any = text_decoder(loaded.model)
    layers = sum(_linear_flops(layer, tokens) for layer in decoder.layers)
    head = loaded.model.get_output_embeddings()
    flops = {
        FULL_ATTENTION: full,
        WINDOW_ATTENTION: window,
        PROJECTIONS: projections,
        MLP: layers - projections,
        HEAD: 0.0 if head is None else _linear_flops(head, 1),
    }
    return {part: value / (1e9 * gflops) for part, value in flops.items()}


def _linear_flops(module: nn.Module, tokens: int) -> float:
    return 2.0 * tokens * weight_count(module)


def weight_count(module: nn.Module) -> int:
    """Return how many weights a module's matrix products read."""
    return sum(inner.weight.numel() for inner in module.modules() if isinstance(inner, nn.Linear))


def _peak(loaded: LoadedModel, machine: Machine) -> float:
    is_bf16 = next(loaded.model.parameters()).dtype == torch.bfloat16
    return machine.bf16_gflops if is_bf16 else machine.gflops
