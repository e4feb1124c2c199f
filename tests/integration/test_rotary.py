"""Every type of rotary embedding under the retrofit: what the model does afterwards is what it always did."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.models import rotary_table, text_decoder
from sentei.kernels.hf.retrofit import retrofit
from sentei.kernels.hf.rotary import RotaryReader
from tests.fakes_models import SIZES, make_ids
from tests.trial_ladders import uncalibrated_ladder

TRAINED_TOKENS = 96
HALF = 4  # half of the head's dimensions
SHARED = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": TRAINED_TOKENS}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_theta": 10_000.0},
    "linear": {"rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10_000.0, "factor": 4.0},
    "yarn": SHARED,
    "llama3": {**SHARED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**SHARED, "short_factor": [1.0] * HALF, "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
# Longer than the model was trained for, longer still, short, and longer again: each switch of a dynamic type.
# The first is a long one, because a short one takes a dynamic type back to its start.
PASSES = (128, 300, 64, 200)


def make_llama(kind: str) -> Any:
    """A small Llama that was trained for 96 tokens, with one type of rotary embedding."""
    torch.manual_seed(0)
    positions = TRAINED_TOKENS if kind == "dynamic" else 2048
    sizes = {**SIZES, "max_position_embeddings": positions}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": kind, **ROPES[kind]})).eval()


def make_gemma(kind: str) -> Any:
    """The same for Gemma 3, which has one rotary embedding for each type of layer."""
    torch.manual_seed(0)
    positions = TRAINED_TOKENS if kind == "dynamic" else 2048
    config = Gemma3TextConfig(
        **{**SIZES, "max_position_embeddings": positions},
        head_dim=2 * HALF,
        query_pre_attn_scalar=8,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": kind, **ROPES[kind]},
        },
    )
    return Gemma3ForCausalLM(config).eval()


def make_adapter(model: Any) -> Adapter:
    """An untrained adapter with one bold rung."""
    adapter = new_adapter(model, "tiny", rank=4)
    return adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.5}))


@torch.no_grad()
def run(model: Any, length: int) -> torch.Tensor:
    """Logits of a pass without a cache."""
    logits: torch.Tensor = model(input_ids=make_ids(length), use_cache=False).logits
    return logits


MAKERS = pytest.mark.parametrize("make", [make_llama, make_gemma])
KINDS = pytest.mark.parametrize("kind", list(ROPES))


@MAKERS
@KINDS
@pytest.mark.parametrize("sparse_tokens", [64, 200])
def test_after_sparse_passes_dense_and_the_closed_model_are_bit_identical(
    make: Callable[[str], Any], kind: str, sparse_tokens: int
) -> None:
    """Rung 0 and a closed model give the bits of a twin that saw the same texts and was never retrofitted."""
    model, twin = make(kind), make(kind)

    with retrofit(model, make_adapter(model), "bold") as handle:
        run(model, sparse_tokens)
        run(twin, sparse_tokens)
        handle.set_rung("dense")
        dense = [run(model, length) for length in PASSES]
    closed = [run(model, length) for length in PASSES]

    for found, expected in zip([*dense, *closed], [run(twin, length) for length in PASSES * 2], strict=True):
        assert torch.equal(found, expected)


@MAKERS
@KINDS
def test_the_table_is_what_the_model_rotates_with(make: Callable[[str], Any], kind: str) -> None:
    """Before and after every switch, the reader's cosines and sines are those of the model's own call."""
    model = make(kind)
    rotary, reader = text_decoder(model).rotary_emb, RotaryReader(model)
    extra = {"layer_type": "full_attention"} if make is make_gemma else {}

    for length in PASSES:
        cos, sin = rotary(torch.empty(0), torch.arange(length)[None], **extra)
        for first, last in ((0, length), (length // 2, length), (length - 1, length)):
            found = reader.between(first, last).rows(first, last)

            assert torch.equal(found[0], cos[0, first:last])
            assert torch.equal(found[1], sin[0, first:last])


@KINDS
def test_a_table_for_a_text_of_that_length_leaves_the_model_alone(kind: str) -> None:
    """Offline steps get the frequencies of a text as long as theirs, before the model has seen one."""
    model, twin = make_llama(kind), make_llama(kind)

    table = rotary_table(model, 200)

    cos, sin = text_decoder(twin).rotary_emb(torch.empty(0), torch.arange(200)[None])
    assert torch.equal(table.cos, cos[0])
    assert torch.equal(table.sin, sin[0])
    assert torch.equal(run(model, 64), run(make_llama(kind), 64))


def test_requests_that_take_turns_find_the_tables_of_their_steps() -> None:
    """And no table of all positions is kept: at 32,768 it is larger than the keys."""
    reader = RotaryReader(make_llama("linear"))
    places = (100, 5_000, 20_000)
    made = [reader.between(at, at + 1) for at in places]

    assert all(reader.between(at + 1, at + 2) is table for at, table in zip(places, made, strict=True))
    assert sum(len(table.cos) for table in made) < 1_000
