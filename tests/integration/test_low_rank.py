"""Low-rank weights beside attention projections: off by default, exact to remove, trainable under a mask."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import LOW_RANK_FILE, Adapter, load_adapter, new_adapter, save_adapter
from sentei.kernels.hf.low_rank import PROJECTIONS, LowRank, new_low_rank
from sentei.kernels.hf.masked import attend_masked
from sentei.kernels.hf.models import AdapterError, ModelError, text_decoder
from sentei.kernels.hf.retrofit import retrofit
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.reference import token_mask
from tests.fakes_models import make_gemma, make_ids, make_llama, make_qwen2, make_qwen3
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def make_adapter(model: Any) -> Adapter:
    """An untrained adapter with one bold rung and low-rank weights that change the output."""
    adapter = new_adapter(model, "tiny", rank=4)
    low_rank = stir(new_low_rank(model, rank=2, rung="bold"))
    return adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.5})).with_low_rank(low_rank)


def stir(low_rank: LowRank) -> LowRank:
    """Give every term a value, as training would."""
    generator = torch.Generator().manual_seed(1)
    for pair in low_rank.pairs.values():
        pair.up.normal_(generator=generator).mul_(0.1)
    return low_rank


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a pass without a cache."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("make", [make_llama, make_gemma, make_qwen2, make_qwen3])
def test_the_model_is_bit_identical_before_without_and_after(make: Any) -> None:
    """Off by default, at work when asked for, and gone without a trace on close."""
    model, ids = make(), make_ids(200)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run(model, ids)

    with retrofit(model, make_adapter(model)) as handle:
        off = run(model, ids)
        handle.set_low_rank(True)
        on = run(model, ids)
        handle.set_low_rank(False)
        off_again = run(model, ids)
        handle.set_low_rank(True)
    after = run(model, ids)

    assert torch.equal(off, expected)
    assert torch.equal(off_again, expected)
    assert torch.equal(after, expected)
    assert not torch.allclose(on, expected)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_an_error_inside_the_block_removes_the_weights() -> None:
    """The context manager takes them out also when the block raises."""
    model, ids = make_llama(), make_ids(100)
    expected = run(model, ids)

    with pytest.raises(KeyError), retrofit(model, make_adapter(model), "bold", low_rank=True):
        raise KeyError

    assert torch.equal(run(model, ids), expected)


def test_the_term_is_the_product_of_its_factors() -> None:
    """With the weights on, a projection gives W x + up (down x), as if it had been merged into W."""
    model, ids = make_llama(), make_ids(80)
    adapter = make_adapter(model)
    with retrofit(model, adapter, low_rank=True):
        found = run(model, ids)

    assert adapter.low_rank is not None
    for key, pair in adapter.low_rank.pairs.items():
        layer, name = key.split(".")
        module = getattr(text_decoder(model).layers[int(layer)].self_attn, name)  # type: ignore[index, union-attr]
        with torch.no_grad():
            module.weight += pair.up @ pair.down

    torch.testing.assert_close(found, run(model, ids), rtol=1e-4, atol=1e-5)


def test_new_weights_add_nothing_and_stand_beside_layers_that_can_be_thinned() -> None:
    """Training starts from the model as it is; sliding layers never see the mask and get no term."""
    model, ids = make_gemma(), make_ids(150)
    low_rank = new_low_rank(model, rank=2, rung="bold")
    adapter = make_adapter(model).with_low_rank(low_rank)
    expected = run(model, ids)

    with retrofit(model, adapter, low_rank=True):
        assert torch.equal(run(model, ids), expected)

    assert set(low_rank.pairs) == {f"1.{name}" for name in PROJECTIONS}


def test_they_survive_the_disk_and_vanish_with_a_new_distillation(tmp_path: Path) -> None:
    """Weights and manifest entry come back; an adapter saved without them leaves no stale file behind."""
    model = make_llama()
    adapter = make_adapter(model)
    assert adapter.low_rank is not None
    adapter = adapter.with_low_rank(adapter.low_rank.with_figures({"train_s": 1.5}))

    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path, model)
    save_adapter(new_adapter(model, "tiny"), tmp_path)

    assert loaded.low_rank is not None
    assert replace(loaded.manifest, files={}) == adapter.manifest
    assert loaded.low_rank.info == adapter.low_rank.info
    for key, pair in adapter.low_rank.pairs.items():
        assert torch.equal(pair.down, loaded.low_rank.pairs[key].down)
        assert torch.equal(pair.up, loaded.low_rank.pairs[key].up)
    assert not (tmp_path / LOW_RANK_FILE).exists()
    assert load_adapter(tmp_path, model).low_rank is None


def test_broken_or_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    """A NaN, a lost file, a model without them, a rank of nothing: each says what and the way out."""
    model = make_llama()
    adapter = make_adapter(model)
    assert adapter.low_rank is not None
    adapter.low_rank.pairs["1.v_proj"].up[0, 0] = float("nan")
    save_adapter(adapter, tmp_path)

    with pytest.raises(AdapterError, match=r"low_rank\.safetensors: 1\.v_proj\.up is missing, not"):
        load_adapter(tmp_path, model)
    (tmp_path / LOW_RANK_FILE).unlink()
    with pytest.raises(AdapterError, match=r"has no low_rank\.safetensors, which its manifest names"):
        load_adapter(tmp_path, model)
    with (
        pytest.raises(AdapterError, match="no low-rank weights; train them with: sentei distill --joint"),
        retrofit(model, new_adapter(model, "tiny"), low_rank=True),
    ):
        pass
    with pytest.raises(ModelError, match="rank is 0"):
        new_low_rank(model, rank=0, rung="bold")


def test_masked_attention_equals_the_fast_path_and_has_a_gradient() -> None:
    """On a ragged length with grouped heads the numbers agree, and only kept keys get a gradient."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 150, 16, requires_grad=True)
    k, v = (torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(2))
    blocks = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    mask = BlockMask.from_dense(blocks.expand(1, 4, 3, 3).clone(), q_len=150, kv_len=150)

    found = attend_masked(q, k, v, mask, scale=0.25)
    found[:, :, 128:].square().sum().backward()  # type: ignore[no-untyped-call]

    expected, _ = attend(q, k, v, mask, scale=0.25, backend="reference")
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    assert q.grad is not None
    assert k.grad is not None
    assert bool((k.grad[:, :, :64] != 0).any())
    assert bool((k.grad[:, :, 64:128] == 0).all())
    assert not bool(token_mask(mask.to_dense(), mask, None)[..., 10, 11:].any())


def test_only_the_low_rank_weights_learn_under_a_rung() -> None:
    """A backward pass through a thinned model reaches every term, and no weight of the model itself."""
    model, ids = make_llama(), make_ids(260)
    model.requires_grad_(False)
    adapter = make_adapter(model)
    assert adapter.low_rank is not None
    parameters = [tensor.requires_grad_(True) for tensor in adapter.low_rank.parameters()]

    with retrofit(model, adapter, "bold", low_rank=True) as handle:
        handle.set_differentiable(True)
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        density = handle.stats().density()

    assert density is not None
    assert density < 1.0
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in parameters)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_differentiable_pass_computes_what_is_served() -> None:
    """Training sees the numbers that the fast path gives for the same rung and weights."""
    model, ids = make_llama(), make_ids(260)
    adapter = make_adapter(model)
    with retrofit(model, replace(adapter), "bold", low_rank=True) as handle:
        served = run(model, ids)
        handle.set_differentiable(True)
        trained = run(model, ids)

    torch.testing.assert_close(trained, served, rtol=1e-3, atol=1e-4)
