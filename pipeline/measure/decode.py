"""Decode steps on a filled KV cache: dense and every rung take turns, whole models or attention alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import DynamicCache

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
from sentei.kernels.hf.prompt_pieces import run_in_pieces
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.kernels.hf.versions import cache_argument
from sentei.kernels.placement import clock_of
from sentei.pipeline.measure.budget import Budget, weight_count
from sentei.pipeline.measure.latency import BEST_DENSE
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted


@dataclass(frozen=True, slots=True)
class Steps:
    """How many steps a turn times, after one that warms up, and how many turns each variant has."""

    steps: int = 64
    runs: int = 3


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Tokens per second of one variant over its turns, all sequences of the batch together."""

    median_tokens_per_s: float
    lowest_tokens_per_s: float
    highest_tokens_per_s: float
    step_ms: float  # median over turns of a turn's mean
    runs: int
    density: float | None  # share of the blocks that attention read; None where every step was dense


@torch.no_grad()
def fill_cache(loaded: LoadedModel, text: torch.Tensor, batch: int = 1) -> Any:
    """Return the KV cache of a prompt [T], the same for each of `batch` sequences; prefilled dense."""
    with retrofit(loaded.model, None, DENSE, base="best") as handle:
        cache = DynamicCache(config=loaded.model.config)
        run_in_pieces(loaded.model, text[None].to(loaded.device), cache, size=handle.piece_tokens)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


@torch.no_grad()
def take_turn(
    handle: Retrofit,
    filled: Any,
    first: torch.Tensor,
    steps: int,
    clocks: Sequence[AbstractContextManager[None]] = (),
) -> float:
    """Return the seconds of `steps` greedy steps on a copy of a filled cache, from tokens `first` [B, 1] on.

    One step before them rebuilds what belongs to a cache, and is not counted; `clocks` run after it.
    """
    now = clock_of(next(handle.model.parameters()).device)
    cache, ids = deepcopy(filled), first

    def step() -> None:
        nonlocal ids
        out = handle.model(input_ids=ids, **cache_argument(cache), use_cache=True)
        ids = out.logits[:, -1:].argmax(dim=-1)

    step()
    handle.reset_stats()
    with ExitStack() as stack:
        for clock in clocks:
            stack.enter_context(clock)
        started = now()
        for _ in range(steps):
            step()
        return now() - started


def time_decodes(
    loaded: LoadedModel, adapter: Adapter, text: torch.Tensor, how: Steps, *, batch: int, progress: Progress
) -> dict[str, DecodeTiming]:
    """Time our own dense and every rung in contexts that end with text [T], taking turns.

    Where T is a multiple of the block and a turn has as many steps, one of them closes a block: its packing
    counts as often as it would in a long answer.
    """
    filled, first = _fill(loaded, text, how.steps, batch)
    seconds: dict[str, list[float]] = {}
    density: dict[str, float | None] = {}
    with retrofit(loaded.model, adapter, DENSE, base="best") as handle:
        turns = list(product(range(how.runs), handle.ladder.rungs))
        for _, rung in counted(turns, "time decode steps", progress):
            handle.set_rung(rung.id)
            name = BEST_DENSE if rung.is_dense else rung.id
            seconds.setdefault(name, []).append(take_turn(handle, filled, first, how.steps))
            density[name] = handle.stats().density()
    return {name: _summarise(found, how.steps, batch, density[name]) for name, found in seconds.items()}


def decode_budgets(
    loaded: LoadedModel,
    adapter: Adapter,
    text: torch.Tensor,
    machine: Machine,
    how: Steps,
    *,
    batch: int,
    progress: Progress,
) -> list[Budget]:
    """Clock the parts of a decode step, for our own dense and every rung, taking turns: means per step."""
    filled, first = _fill(loaded, text, how.steps, batch)
    found: dict[str, list[Mapping[str, float]]] = {}
    density: dict[str, float | None] = {}
    with retrofit(loaded.model, adapter, DENSE, base="best") as handle:
        turns = list(product(range(how.runs), handle.ladder.rungs))
        for _, rung in counted(turns, "clock the parts of decode steps", progress):
            handle.set_rung(rung.id)
            clock = PartClock(clock_of(loaded.device))
            clocks = (handle.clocked(clock), clocked_modules(handle.model, clock))
            take_turn(handle, filled, first, how.steps, clocks)
            name = BEST_DENSE if rung.is_dense else rung.id
            found.setdefault(name, []).append(dict(clock.seconds))
            density[name] = handle.stats().density()
    return [
        Budget(
            name,
            {part: statistics.median(run.get(part, 0.0) for run in runs) / how.steps for part in PARTS},
            decode_floor(
                loaded, len(text), batch=batch, density=density[name], gbytes_per_s=machine.gbytes_per_s
            ),
            density[name],
        )
        for name, runs in found.items()
    ]


def decode_floor(
    loaded: LoadedModel, tokens: int, *, batch: int, density: float | None, gbytes_per_s: float
) -> dict[str, float]:
    """Return the seconds that a step takes to read weights, keys and values once (1e9 bytes a second).

    Each weight is read once for the batch, keys and values once for each sequence.
    """
    config = loaded.model.config.get_text_config()
    width = next(loaded.model.parameters()).element_size()
    full = window = projections = 0.0
    for index, module in attention_modules(loaded.model):
        projections += weight_count(module)
        per_token = 2.0 * batch * config.num_key_value_heads * int(module.head_dim)  # type: ignore[arg-type]
        size = layer_window(config, index)
        if size is None:
            full += per_token * tokens * (1.0 if density is None else density)
        else:
            window += per_token * min(size, tokens)
    decoder: Any = text_decoder(loaded.model)
    head: Any = loaded.model.get_output_embeddings()
    numbers = {
        FULL_ATTENTION: full,
        WINDOW_ATTENTION: window,
        PROJECTIONS: projections,
        MLP: sum(weight_count(layer) for layer in decoder.layers) - projections,
        HEAD: 0.0 if head is None else weight_count(head),
    }
    return {part: count * width / (1e9 * gbytes_per_s) for part, count in numbers.items()}


def _fill(loaded: LoadedModel, text: torch.Tensor, steps: int, batch: int) -> tuple[Any, torch.Tensor]:
    """Return a cache that the steps of a turn, the first included, grow to the length of the text."""
    if steps + 1 >= len(text):
        raise ValueError(f"a turn of {steps} steps and one before needs more than {len(text)} tokens")
    done = len(text) - steps - 1
    return fill_cache(loaded, text[:done], batch), text[done].expand(batch, 1).to(loaded.device)


def _summarise(seconds: Sequence[float], steps: int, batch: int, density: float | None) -> DecodeTiming:
    rates = [batch * steps / spent for spent in seconds]
    return DecodeTiming(
        statistics.median(rates),
        min(rates),
        max(rates),
        1e3 * statistics.median(seconds) / steps,
        len(rates),
        density,
    )
