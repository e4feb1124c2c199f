"""Tiny decoders on the card, with scorers of random weights and rungs that nobody calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.models import fingerprint
from sentei.pipeline.models import LoadedModel
from tests.card.pretend import put_on_card
from tests.fakes_models import make_gemma, make_llama
from tests.trial_ladders import uncalibrated_ladder

MAKERS: Mapping[str, Callable[[], Any]] = {"llama": make_llama, "gemma": make_gemma}
RUNGS = {"mild": 0.3, "bold": 0.6}
FORMS: Mapping[str, dict[str, Any]] = {
    "residual": {"form": "residual", "rank": 4, "pool_tokens": 16},
    "low_rank": {"form": "low_rank", "rank": 4, "pool_tokens": 1, "query_pool": 4},
}


def make_adapter(model: Any, form: str = "residual", shares: Mapping[str, float] = RUNGS) -> Adapter:
    """Scorers that have weights, and a rung per share; on the CPU."""
    adapter = new_adapter(model, "tiny", **FORMS[form])
    generator = torch.Generator().manual_seed(7)
    for scorer in adapter.scorers.values():
        for weight in (scorer.query_map, scorer.distance_bias):
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        scorer.requires_grad_(False)
    return adapter.with_ladder(uncalibrated_ladder(adapter, shares))


def on_card(adapter: Adapter) -> Adapter:
    """The same adapter, its scorers copied and moved, as loading it for a model on a GPU does."""
    copies = {
        index: put_on_card(scorer.with_query_pool(scorer.shape.query_pool, scorer.shape.query_reduce))
        for index, scorer in adapter.scorers.items()
    }
    return replace(adapter, scorers=copies)


def as_loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """What the offline steps take; the fingerprint reads the weights, as on loading."""
    return LoadedModel("tiny", model, tokenizer, fingerprint(model, "tiny"))


def adding_an_item(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but that it reads one value on the host, as a careless line would."""

    def careless(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        tensors[0].sum().item()
        return run(*args, **kwargs)

    return careless
