"""Which versions of Transformers the retrofit accepts, and how each is handed a KV cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.models import ModelError
from sentei.kernels.hf.versions import cache_argument, check_transformers


@pytest.mark.parametrize("version", ["5.15.9", "5.25.0", "6.0.0", "4.57.1"])
def test_a_version_that_was_not_verified_is_refused_by_name(version: str) -> None:
    """The message names the version found and the range that is verified."""
    with pytest.raises(ModelError, match=rf"transformers {version} is installed.*5\.16 to 5\.24"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.16.1", "5.19.0", "5.24.0.dev0"])
def test_both_ends_are_accepted(version: str) -> None:
    """The range is closed: what vLLM takes, and the newest that was tried."""
    check_transformers(version)


def test_a_model_sees_its_past_through_the_argument() -> None:
    """Fed in two pieces with the cache a model says what it says in one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(20)[None]
    cache = DynamicCache(config=config)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0, -1]
        model(input_ids=ids[:, :15], **cache_argument(cache), use_cache=True)
        found = model(input_ids=ids[:, 15:], **cache_argument(cache), use_cache=True).logits[0, -1]

    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
