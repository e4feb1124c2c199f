"""The clock of a model's parts: each counts its own seconds, and nothing is lost between them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.parts import (
    FULL_ATTENTION,
    HEAD,
    MLP,
    NORMS,
    PARTS,
    PROJECTIONS,
    REST,
    PartClock,
    clocked_modules,
)
from sentei.kernels.hf.retrofit import retrofit


def test_a_part_inside_another_is_taken_off_it() -> None:
    """Seconds inside are the inner part's alone; both together are all that passed."""
    clock = PartClock(iter((0.0, 2.0, 7.0, 8.0)).__next__)
    with clock.part("outer"), clock.part("inner"):
        pass

    assert dict(clock.seconds) == {"outer": 3.0, "inner": 5.0}


def test_an_error_closes_its_part() -> None:
    """What comes after it is not counted as a part of it."""
    clock = PartClock(iter((0.0, 1.0, 5.0, 7.0)).__next__)
    with pytest.raises(ValueError, match="broken"), clock.part("inner"):
        raise ValueError("broken")
    with clock.part("next"):
        pass

    assert dict(clock.seconds) == {"inner": 1.0, "next": 2.0}


def test_every_module_of_a_model_has_a_part_and_its_hooks_go_again() -> None:
    """Attention, projections, MLP, norms and head are seen; the model keeps no hook."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    clock = PartClock()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with (
        torch.no_grad(),
        retrofit(model, None, base="best") as handle,
        handle.clocked(clock),
        clocked_modules(model, clock),
    ):
        model(input_ids=torch.arange(64)[None])

    assert set(clock.seconds) <= set(PARTS)
    assert {FULL_ATTENTION, PROJECTIONS, MLP, NORMS, HEAD, REST} <= set(clock.seconds)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
