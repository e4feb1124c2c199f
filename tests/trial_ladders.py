"""Ladders that nobody calibrated, for tests that need a sparse rung."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung
from sentei.kernels.hf.versions import cache_argument


def uncalibrated_ladder(adapter: Adapter, shares: Mapping[str, float]) -> Ladder:
    """Return rungs with one mass-share threshold everywhere."""
    shapes = adapter.manifest.shapes
    rungs = [Rung(DENSE)]
    for rung_id, share in shares.items():
        thresholds = {index: ((share,),) * shape.kv_heads for index, shape in shapes.items()}
        rungs.append(Rung(rung_id, thresholds, bound_dropped_mass=1.0))
    return Ladder(tuple(rungs), (), max(shape.block_tokens for shape in shapes.values()))


def exact_adapter(model: Any, shares: Mapping[str, float]) -> Adapter:
    """Return an adapter whose scorers know the true attention, token by token; a rung per share."""
    adapter = new_adapter(
        model, "exact", form="low_rank", rank=model.config.get_text_config().head_dim, pool_tokens=1
    )
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, **cache_argument(cache), use_cache=True)
    for index, scorer in adapter.scorers.items():
        same = torch.eye(scorer.shape.head_dim)
        scorer.start_from(
            same.expand(scorer.shape.query_heads, -1, -1), same.expand(scorer.shape.kv_heads, -1, -1)
        )
        keys = cache.layers[index].keys[0].float()
        scorer.fit_steps(keys @ scorer.key_map[:, : scorer.shape.head_dim])
    return adapter.with_ladder(uncalibrated_ladder(adapter, shares))
