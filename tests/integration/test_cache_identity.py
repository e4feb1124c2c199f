"""The side cache under caches that change their rows: its choices are those of one made from scratch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.models import attention_modules
from sentei.kernels.hf.retrofit import retrofit
from sentei.kernels.ops.block_mask import BLOCK_MIN
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def make_sharp(make: Callable[[], Any]) -> Any:
    """A random model whose rows attend to few keys, so that a stale choice shows in the logits."""
    model = make()
    for _, module in attention_modules(model):
        module.q_proj.weight.data *= 8  # type: ignore[union-attr, operator]
        module.k_proj.weight.data *= 8  # type: ignore[union-attr, operator]
    return model


def make_exact(model: Any) -> Adapter:
    """Scorers that know the true attention of small blocks; one rung that drops much."""
    head_dim = model.config.head_dim
    adapter = new_adapter(
        model, "exact", form="low_rank", rank=head_dim, pool_tokens=1, block_tokens=BLOCK_MIN
    )
    for scorer in adapter.scorers.values():
        same = torch.eye(scorer.shape.head_dim)
        scorer.start_from(
            same.expand(scorer.shape.query_heads, -1, -1), same.expand(scorer.shape.kv_heads, -1, -1)
        )
    return adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.2}))


def rows_that_end_alike() -> torch.Tensor:
    """Two texts of 150 tokens whose last 20 are equal: in the first layer, so are their last keys."""
    ids = make_ids(150, batch=2)
    ids[1, -20:] = ids[0, -20:]
    return ids


def swap_by_reordering(cache: Any) -> None:
    """As beam search does it."""
    cache.reorder_cache(torch.tensor([1, 0]))


def swap_by_selection(cache: Any) -> None:
    """As a server does it that drops and keeps rows."""
    cache.batch_select_indices(torch.tensor([1, 0]))


def swap_in_place(cache: Any) -> None:
    """Tensors stay what they are; what they hold does not."""
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(0))
        layer.values.copy_(layer.values.flip(0))


@pytest.mark.parametrize("swap", [swap_by_reordering, swap_by_selection, swap_in_place])
@pytest.mark.parametrize("make", [make_llama, make_gemma])
@torch.no_grad()
def test_swapped_rows_that_end_alike_are_noticed(
    make: Callable[[], Any], swap: Callable[[Any], None]
) -> None:
    """After a swap of two rows that end alike the next step is that of a cache filled in that order."""
    model, ids = make_sharp(make), rows_that_end_alike()
    step = ids[:, :1]
    cache, scratch = (DynamicCache(config=model.config) for _ in range(2))

    with retrofit(model, make_exact(model), "bold"):
        model(input_ids=ids, cache=cache, use_cache=True)
        swap(cache)
        found = model(input_ids=step, cache=cache, use_cache=True).logits
        model(input_ids=ids.flip(0), cache=scratch, use_cache=True)
        expected = model(input_ids=step, cache=scratch, use_cache=True).logits

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@torch.no_grad()
def test_beam_search_is_that_of_a_side_cache_made_from_scratch(make: Callable[[], Any]) -> None:
    """Beams swap rows at each step; tokens and scores are those of pooled keys made anew at each step."""
    model = make_sharp(make)
    prompt = make_ids(80)
    search = {
        "num_beams": 4,
        "max_new_tokens": 48,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    with retrofit(model, make_exact(model), "bold") as handle:
        kept = model.generate(prompt, attention_mask=torch.ones_like(prompt), **search)
        hook = model.register_forward_pre_hook(lambda *_: handle._pooled.clear())
        scratch = model.generate(prompt, attention_mask=torch.ones_like(prompt), **search)
        hook.remove()
        density = handle.stats().density()

    assert density is not None
    assert density < 0.9
    assert torch.equal(kept.sequences, scratch.sequences)
    for found, expected in zip(kept.scores, scratch.scores, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_only_grows_is_never_pooled_twice(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding keeps its pooled keys: each token is encoded once in each layer."""
    from sentei.kernels.scorer.pooled_cache import PooledCache

    model, ids, encoded = make_sharp(make_llama), make_ids(120), []
    plain = PooledCache._encode

    def count(self: PooledCache, k: torch.Tensor, first: int, table: Any) -> torch.Tensor:
        encoded.append(k.shape[2])
        return plain(self, k, first, table)

    monkeypatch.setattr(PooledCache, "_encode", count)
    cache = DynamicCache(config=model.config)
    with retrofit(model, make_exact(model), "bold"), mode():
        model(input_ids=ids[:, :100], cache=cache, use_cache=True)
        for i in range(100, 120):
            model(input_ids=ids[:, i : i + 1], cache=cache, use_cache=True)

    assert sum(encoded) == 120 * 2
