"""From which context length on a rung's decode steps take no longer than dense ones, on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, NEVER, Ladder
from sentei.kernels.hf.parts import PartClock
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.measure.decode import Steps, fill_cache, take_turn
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted

SHORTEST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class BreakEven:
    """What is timed: turns of decode steps, each with as many sequences as a batch says, one at least."""

    steps: Steps = field(default_factory=lambda: Steps(4, 5))
    batches: tuple[int, ...] = (1, 4)


def measure_decode_break_even(
    loaded: LoadedModel,
    adapter: Adapter,
    text: torch.Tensor,
    how: BreakEven,
    progress: Progress,
) -> Ladder:
    """Return the adapter's ladder with the break-even length of each rung's decode steps, by batch.

    Whole decode steps run in contexts from text [T], as long as it at most: past the length that a rung was
    verified at, it runs dense anyway. Of each step the seconds of attention count, scoring and selection too.
    A text below 1,024 tokens, or a model on an accelerator, changes nothing.
    """
    ladder = adapter.ladder
    lengths = decode_lengths(len(text))
    if not lengths or loaded.device.type != "cpu":
        return ladder
    times = _time_attention(loaded, adapter, [text[:tokens] for tokens in lengths], how, progress)
    dense, *rungs = ladder.rungs
    found = [
        replace(
            rung,
            decode_break_even_tokens={
                batch: shortest_that_pays(
                    {tokens: (found[DENSE], found[rung.id]) for tokens, found in by_length.items()}
                )
                for batch, by_length in times.items()
            },
        )
        for rung in rungs
    ]
    return replace(ladder, rungs=(dense, *found))


def decode_lengths(most_tokens: int) -> list[int]:
    """Return the context lengths to time: doubling from 1,024, and the longest itself."""
    lengths = []
    tokens = SHORTEST_TOKENS
    while tokens <= most_tokens:
        lengths.append(tokens)
        tokens *= 2
    if lengths and lengths[-1] < most_tokens:
        lengths.append(most_tokens)
    return lengths


def shortest_that_pays(seconds: Mapping[int, tuple[float, float]]) -> int:
    """Return the shortest length from which sparse takes no longer than dense at every longer one, or NEVER.

    `seconds` are those of dense and of sparse by length.
    """
    found = NEVER
    for tokens in sorted(seconds, reverse=True):
        dense, sparse = seconds[tokens]
        if sparse > dense:
            break
        found = tokens
    return found


def _time_attention(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: list[torch.Tensor],
    how: BreakEven,
    progress: Progress,
) -> dict[int, dict[int, dict[str, float]]]:
    """Return the median seconds of attention per turn, by batch, length and rung, which take turns.

    The longest text comes first: of a batch for which no rung paid there, shorter ones say nothing more.
    """
    free = [replace(rung, break_even_tokens=0, decode_break_even_tokens={}) for rung in adapter.ladder.rungs]
    always = adapter.with_ladder(replace(adapter.ladder, rungs=tuple(free)))
    times: dict[int, dict[int, dict[str, float]]] = {batch: {} for batch in how.batches}
    for text in counted(texts[::-1], "time decode steps", progress):
        done = len(text) - how.steps.steps - 1
        open_batches = [batch for batch, found in times.items() if all(map(_has_paid, found.values()))]
        if not open_batches:
            continue
        filled = fill_cache(loaded, text[:done])
        for batch in open_batches:
            many, first = deepcopy(filled), text[done].expand(batch, 1)
            many.batch_repeat_interleave(batch)
            times[batch][len(text)] = _time_turns(loaded, always, many, first, how.steps)
    return times


def _has_paid(seconds: Mapping[str, float]) -> bool:
    """Whether any rung took no longer than dense."""
    return any(spent <= seconds[DENSE] for rung_id, spent in seconds.items() if rung_id != DENSE)


def _time_turns(
    loaded: LoadedModel, adapter: Adapter, filled: Any, first: torch.Tensor, how: Steps
) -> dict[str, float]:
    """Return the median seconds of attention per turn, by rung, all of them on copies of one filled cache."""
    spent: dict[str, list[float]] = {}
    with retrofit(loaded.model, adapter, base="best") as handle:
        for _, rung in product(range(how.runs), adapter.ladder.rungs):
            handle.set_rung(rung.id)
            clock = PartClock()
            take_turn(handle, filled, first, how.steps, [handle.clocked(clock)])
            spent.setdefault(rung.id, []).append(sum(clock.seconds.values()))
    return {rung_id: statistics.median(found) for rung_id, found in spent.items()}
