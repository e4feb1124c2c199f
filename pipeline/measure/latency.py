"""Prefill time, the variants taking turns in one run."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.prompt_pieces import run_in_pieces
from sentei.kernels.hf.retrofit import Base, Retrofit, retrofit
from sentei.kernels.placement import clock_of
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted

SDPA, FLEX_DENSE, BEST_DENSE = "sdpa", "flex_dense", "best_dense"
DENSE_BASES: Mapping[str, Base] = {FLEX_DENSE: "flex", BEST_DENSE: "best"}
DENSE_FORMS = (SDPA, *DENSE_BASES)


@dataclass(frozen=True, slots=True)
class Timing:
    """Prefill seconds of one variant over its runs."""

    median_s: float
    lowest_s: float
    highest_s: float
    runs: int


def time_prefills(
    loaded: LoadedModel,
    adapter: Adapter,
    text: torch.Tensor,
    *,
    runs: int,
    progress: Progress,
    dense: Sequence[str] = DENSE_FORMS,
    warm_up_tokens: int | None = None,
) -> dict[str, Timing]:
    """Time Transformers' sdpa, compiled dense Flex, our fastest dense, and every rung with its scorer.

    A first round, on `warm_up_tokens` of the text or on all of it, is not counted: compilation and caches.
    """
    variants = [*dense, *(rung.id for rung in adapter.ladder.rungs if not rung.is_dense)]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for i_run, variant in counted(list(product(range(runs + 1), variants)), "time prefill", progress):
        prompt = text if i_run else text[:warm_up_tokens]
        with variant_of(loaded, adapter, variant) as handle:
            spent = time_once(partial(prefill, loaded, prompt, handle), loaded.device)
        if i_run:
            seconds[variant].append(spent)
    return {variant: _summarise(seconds[variant]) for variant in variants}


@contextmanager
def variant_of(loaded: LoadedModel, adapter: Adapter, variant: str) -> Iterator[Retrofit | None]:
    """Put the model into the state that a variant's name stands for; None for Transformers' own."""
    if variant == SDPA:
        previous = loaded.model.config._attn_implementation
        loaded.model.set_attn_implementation("sdpa")
        try:
            yield None
        finally:
            loaded.model.set_attn_implementation(previous)
        return
    base = DENSE_BASES.get(variant, "best")
    rung = DENSE if variant in DENSE_BASES else variant
    with retrofit(loaded.model, adapter, rung, base=base) as handle:
        yield handle


@torch.no_grad()
def prefill(loaded: LoadedModel, text: torch.Tensor, handle: Retrofit | None) -> None:
    """Run a prompt as a server would: KV cache filled, logits of the last token only.

    In pieces where the engine would cut it so (`Retrofit.piece_tokens`), else in one pass.
    """
    ids = text[None].to(loaded.device)
    if handle is None:
        loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return
    handle.set_prompt_tokens(len(text))
    try:
        cache = DynamicCache(config=loaded.model.config)
        run_in_pieces(loaded.model, ids, cache, size=handle.piece_tokens)
    finally:
        handle.set_prompt_tokens(None)


def time_once(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that one call takes, to its end on the device."""
    now = clock_of(device)
    started = now()
    work()
    return now() - started


def _summarise(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))
