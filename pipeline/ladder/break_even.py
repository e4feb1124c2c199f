"""From which context length on a rung's decode steps take no longer than dense ones, on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, NEVER, Ladder
from sentei.kernels.hf.parts import PartClock
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.measure.decode import Steps, fill_cache, take_turn
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted

SHORTEST_TOKENS = 1024


def measure_decode_break_even(
    loaded: LoadedModel,
    adapter: Adapter,
    text: torch.Tensor,
    how: Steps,
    progress: Progress,
) -> Ladder:
    """Return the adapter's ladder with the break-even length of each rung's decode steps.

    Whole decode steps of one sequence run in contexts from text [T], as long as it at most: past the length
    that a rung was verified at, it runs dense anyway. Of each step the seconds of attention count, with
    scoring and selection. A text below 1,024 tokens, or a model on an accelerator, changes nothing.
    """
    ladder = adapter.ladder
    lengths = decode_lengths(len(text))
    if not lengths or next(loaded.model.parameters()).device.type != "cpu":
        return ladder
    times = _time_attention(loaded, adapter, [text[:tokens] for tokens in lengths], how, progress)
    dense, *rungs = ladder.rungs
    found = [
        replace(
            rung,
            decode_break_even_tokens=shortest_that_pays(
                {tokens: (times[tokens, DENSE], times[tokens, rung.id]) for tokens in lengths}
            ),
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
    how: Steps,
    progress: Progress,
) -> dict[tuple[int, str], float]:
    """Return the median seconds of attention per turn, by length and rung, which take turns."""
    free = [
        replace(rung, break_even_tokens=0, decode_break_even_tokens=None) for rung in adapter.ladder.rungs
    ]
    spent: dict[tuple[int, str], list[float]] = {}
    always = adapter.with_ladder(replace(adapter.ladder, rungs=tuple(free)))
    for text in counted(texts, "time decode steps", progress):
        done = len(text) - how.steps - 1
        filled, first = fill_cache(loaded, text[:done]), text[done][None, None]
        with retrofit(loaded.model, always, base="best") as handle:
            for _, rung in product(range(how.runs), free):
                handle.set_rung(rung.id)
                clock = PartClock()
                take_turn(handle, filled, first, how.steps, [handle.clocked(clock)])
                spent.setdefault((len(text), rung.id), []).append(sum(clock.seconds.values()))
    return {key: statistics.median(found) for key, found in spent.items()}
