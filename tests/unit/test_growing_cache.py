"""A KV cache that grows in place holds what Transformers' own would, whatever is done to it between steps."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sentei.kernels.hf.growing_cache import GrowingLayer, give_room

Change = Callable[[Any], None]


def make_states(seed: int, tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new keys and values as a model gives them: rows of heads, seen as heads of rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, 3, size) for size in (8, 4))
    keys, values = (torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes)
    return keys, values


def assert_same(layer: DynamicLayer, expected: DynamicLayer) -> None:
    """Both hold the same, and say so."""
    assert layer.get_seq_length() == expected.get_seq_length()
    assert torch.equal(layer.keys, expected.keys)
    assert torch.equal(layer.values, expected.values)


def reorder(layer: Any) -> None:
    """Swap the two sequences, as a beam search does."""
    layer.reorder_cache(torch.tensor([1, 0]))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """As whoever serves runs a model."""
    with torch.no_grad():
        yield


CHANGES: dict[str, Change] = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-5),
    "reorder": reorder,
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_a_dynamic_layer_holds(change: str) -> None:
    """Before a change, after it, and past the room that there was."""
    layer, expected = GrowingLayer(), DynamicLayer()
    for seed, tokens in enumerate((300, 1, 1, 40, 1)):
        for one in (layer, expected):
            one.update(*make_states(seed, tokens))
        assert_same(layer, expected)
    for one in (layer, expected):
        CHANGES[change](one)
    batch = 2 if change == "reset" else expected.keys.shape[0]
    for seed in range(600):
        for one in (layer, expected):
            one.update(*make_states(seed, 1, batch))
    assert_same(layer, expected)


def test_a_step_copies_nothing_but_its_own_keys() -> None:
    """Keys and values stay where they are while there is room."""
    layer = GrowingLayer()
    layer.update(*make_states(0, 1000))
    places = set()
    for seed in range(200):
        keys, values = layer.update(*make_states(seed, 1))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1


def test_what_a_step_returned_stays_as_it_was() -> None:
    """Rows that a replay recorded are read after later steps; a crop and other steps may come between."""
    layer = GrowingLayer()
    layer.update(*make_states(0, 64))
    seen, _ = layer.update(*make_states(1, 8))
    copied = seen.clone()
    layer.crop(-8)
    layer.update(*make_states(2, 8))
    assert torch.equal(seen, copied)


def test_a_copy_goes_its_own_way() -> None:
    """A deep copy shares no room: what one takes in, the other does not see."""
    layer, expected = GrowingLayer(), DynamicLayer()
    for one in (layer, expected):
        one.update(*make_states(0, 64))
        one.update(*make_states(1, 1))
    other = deepcopy(layer)
    other.update(*make_states(2, 1))
    for one in (layer, expected):
        one.update(*make_states(3, 1))
    assert_same(layer, expected)
    assert not torch.equal(layer.keys, other.keys)


def test_what_inference_mode_made_goes_on_outside_it() -> None:
    """Tensors of inference mode may not be written to outside it: the step makes room of its own."""
    layer, expected = GrowingLayer(), DynamicLayer()
    for one in (layer, expected):
        with torch.inference_mode():
            one.update(*make_states(0, 64))
            one.update(*make_states(1, 1))
        with torch.no_grad():
            one.update(*make_states(2, 1))
    assert_same(layer, expected)


@torch.enable_grad()
def test_gradients_reach_every_step() -> None:
    """A backward pass finds what each step saw, also where only the queries have a gradient."""
    layer, query = GrowingLayer(), torch.ones(2, 3, 1, 8, requires_grad=True)
    total = torch.zeros(())
    for seed in range(3):
        keys, values = make_states(seed, 4)
        if seed == 1:
            keys.requires_grad_()
            watched = keys
        seen, _ = layer.update(keys, values)
        total = total + (query * seen).sum()

    total.backward()

    assert torch.equal(watched.grad, torch.full_like(watched, 2.0))
    assert query.grad is not None


def test_another_batch_is_refused_before_anything_is_written() -> None:
    """As joining does: rows of one sequence are not written into all of them."""
    layer = GrowingLayer()
    layer.update(*make_states(0, 64))
    before = layer.keys.clone()

    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*make_states(1, 1, batch=1))

    assert torch.equal(layer.keys, before)


def test_other_precisions_are_promoted() -> None:
    """Keys in fp32 behind keys in bf16 are not rounded."""
    layer, expected = GrowingLayer(), DynamicLayer()
    for one in (layer, expected):
        one.update(*(states.bfloat16() for states in make_states(0, 64)))
        one.update(*make_states(1, 1))
    assert layer.keys.dtype == torch.float32
    assert_same(layer, expected)


def test_only_full_attention_of_a_plain_cache_gets_room() -> None:
    """Windows, other caches and layers that are not there yet stay as they are."""
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["sliding_attention", "full_attention"]
    config.sliding_window = 16

    class Other(DynamicCache):
        """Somebody's own."""

    plain, other = DynamicCache(config=config), Other(config=config)
    for cache in (plain, other):
        for index in range(3):  # the third is not there
            give_room(cache, index)
    assert [type(layer) for layer in plain.layers] == [DynamicSlidingWindowLayer, GrowingLayer]
    assert [type(layer) for layer in other.layers] == [DynamicSlidingWindowLayer, DynamicLayer]


def test_a_prompt_whose_length_is_known_moves_once() -> None:
    """Room for all of it is made with its first piece."""
    layer = GrowingLayer.over(DynamicLayer(), 4000)
    places = {layer.update(*make_states(seed, 1000))[0].data_ptr() for seed in range(4)}
    assert len(places) == 1
