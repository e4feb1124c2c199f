"""The retrofit on real Transformers models (tiny, random): mechanics only."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.ladder import Ladder
from sentei.kernels.hf.models import (
    AdapterError,
    ModelError,
    attention_modules,
    layer_window,
    thinnable_layers,
)
from sentei.kernels.hf.retrofit import attach, retrofit
from sentei.kernels.hf.versions import cache_argument
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.network import ScorerError
from tests.fakes_models import (
    make_gemma,
    make_ids,
    make_llama,
    make_mistral,
    make_qwen2,
    make_qwen3,
)
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.timeout(600),  # compiling on a cold, busy machine
]

MAKERS = [make_llama, make_gemma, make_qwen2, make_qwen3, make_mistral]
# Around borders of blocks of 64 tokens and of the break-even length of 128.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200]


def make_adapter(model: Any, break_even_tokens: int = 0, query_block: int = 64) -> Adapter:
    """An untrained adapter with rungs from keeping everything to keeping almost nothing."""
    adapter = new_adapter(model, "tiny", rank=4)
    ladder = uncalibrated_ladder(adapter, {"all": 1e-30, "medium": 0.1, "bold": 0.5})
    rungs = tuple(replace(rung, break_even_tokens=break_even_tokens) for rung in ladder.rungs)
    return adapter.with_ladder(Ladder(rungs, ladder.bin_edges_tokens, query_block))


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits of a pass without a cache."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **kwargs).logits
    return logits


@torch.no_grad()
def run_stepwise(model: Any, ids: torch.Tensor, num_prefill: int, cache: Any = None) -> torch.Tensor:
    """Logits of a prefill followed by steps of one token."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [model(input_ids=ids[:, :num_prefill], **cache_argument(cache), use_cache=True).logits]
    for i in range(num_prefill, ids.shape[1]):
        parts.append(model(input_ids=ids[:, i : i + 1], **cache_argument(cache), use_cache=True).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_rung_dense_is_bit_identical_to_the_untouched_model(make: Callable[[], Any], length: int) -> None:
    """On base sdpa, rung 0 gives the very bits of the untouched model, at every length."""
    model, ids = make(), make_ids(length)
    expected = run(model, ids)

    with retrofit(model, make_adapter(model), "dense"):
        found = run(model, ids)

    assert torch.equal(found, expected)


def test_rung_dense_is_bit_identical_with_left_padding_and_in_decode() -> None:
    """Rung 0 leaves also padded batches and cached steps exactly as they were."""
    model, ids = make_gemma(), make_ids(70, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded, stepped = run(model, ids, attention_mask=mask), run_stepwise(model, ids, 66)

    with retrofit(model, make_adapter(model), "dense"):
        assert torch.equal(run(model, ids, attention_mask=mask), padded)
        assert torch.equal(run_stepwise(model, ids, 66), stepped)


@pytest.mark.parametrize("make", MAKERS)
def test_a_rung_that_keeps_everything_equals_dense_and_did_run_sparse(make: Callable[[], Any]) -> None:
    """Selecting all blocks is dense within tolerance, and the statistics prove that the sparse path ran."""
    model, ids = make(), make_ids(200)
    expected = run(model, ids)

    with retrofit(model, make_adapter(model), "all") as handle:
        found = run(model, ids)
        stats = handle.stats()

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert stats.num_sparse == len(thinnable_layers(model))
    assert stats.density() == 1.0


def test_a_bold_rung_drops_blocks_and_says_so() -> None:
    """A high threshold lowers the density and changes the output, without NaN."""
    model, ids = make_llama(), make_ids(400)
    expected = run(model, ids)

    with retrofit(model, make_adapter(model), "bold") as handle:
        found = run(model, ids)
        density = handle.stats().density()

    assert density is not None
    assert density < 0.7
    assert not torch.equal(found, expected)
    assert torch.isfinite(found).all()


@torch.no_grad()
def run_everything(model: Any) -> dict[str, torch.Tensor]:
    """One pass, a padded batch, cached steps, a crop, a reorder, and generation with and without cache."""
    ids = make_ids(200, batch=2)
    padding = torch.ones_like(ids)
    padding[1, 170:] = 0
    found = {"one pass": run(model, ids), "padded": run(model, ids, attention_mask=padding)[:, :170]}
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # or sliding layers refuse to be cropped
    found["cached"] = run_stepwise(model, ids[:, :140], 130, cache)
    cache.crop(-40)  # 100 tokens are left
    found["cropped"] = run_stepwise(model, ids[:, 100:110], 1, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    found["reordered"] = run_stepwise(model, ids[:, 110:115].flip(0), 1, cache)
    for use_cache in (True, False):
        prompt = {"input_ids": ids[:, :150], "attention_mask": torch.ones(2, 150), "pad_token_id": 0}
        answer = model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        found[f"generated, cache {use_cache}"] = answer
    return found


@pytest.mark.parametrize("query_block", [16, 64])
@pytest.mark.parametrize("make", MAKERS)
def test_every_family_equals_the_same_mask_applied_densely(make: Callable[[], Any], query_block: int) -> None:
    """With blocks truly dropped, the kernels give what plain SDPA gives under the same mask, in every use."""
    model = make()
    for _, module in attention_modules(model):  # random weights attend evenly; now rows differ in their needs
        module.scaling *= 4 if hasattr(module, "q_norm") else 300
    with retrofit(model, make_adapter(model, query_block=query_block), "medium", base="best") as handle:
        sparse = run_everything(model)
        density = handle.stats().density()
        handle.set_differentiable(True)  # SDPA under the mask, spelled out token by token
        masked = run_everything(model)

    assert density is not None
    assert 0.5 < density < 0.95
    for name, found in sparse.items():
        torch.testing.assert_close(
            found, masked[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("length", "path"), [(127, "dense"), (128, "sparse")])
def test_below_break_even_the_dense_path_runs_and_says_so(length: int, path: str) -> None:
    """The break-even length is the first at which attention is thinned."""
    model, ids = make_llama(), make_ids(length)

    with retrofit(model, make_adapter(model, break_even_tokens=128), "bold") as handle:
        run(model, ids)
        paths = {call.path for call in handle.stats().calls}

    assert paths == {path}


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@pytest.mark.parametrize("num_prefill", [1, 64, 130])
def test_prefill_then_steps_equals_one_pass_when_everything_is_kept(
    make: Callable[[], Any], num_prefill: int
) -> None:
    """Decode and prefill are one selection: with all blocks kept both give the same logits."""
    model, ids = make(), make_ids(140)

    with retrofit(model, make_adapter(model), "all") as handle:
        once = run(model, ids)
        handle.reset_stats()
        stepped = run_stepwise(model, ids, num_prefill)
        has_run_sparse = handle.stats().has_run_sparse

    torch.testing.assert_close(stepped, once, rtol=1e-3, atol=1e-4)
    assert has_run_sparse


@torch.no_grad()
def test_what_is_kept_does_not_depend_on_how_a_prompt_was_cut() -> None:
    """In one piece or in pieces that end at query blocks, above and below the break-even: the same logits."""
    model, ids = make_llama(), make_ids(400)
    cache = DynamicCache(config=model.config)
    with retrofit(model, make_adapter(model, break_even_tokens=256, query_block=16), "bold") as handle:
        whole = run(model, ids)
        assert handle.stats().has_run_sparse
        pieces = [
            model(input_ids=ids[:, a:b], **cache_argument(cache), use_cache=True).logits
            for a, b in ((0, 48), (48, 160), (160, 400))
        ]

    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("break_even", [300, 386])
def test_one_row_keeps_the_same_as_a_piece_or_at_the_end_of_a_prompt(break_even: int) -> None:
    """A last block of one row, cut off or not, has the break-even of a decode step."""
    model, ids = make_llama(), make_ids(385)
    adapter = make_adapter(model, break_even_tokens=128, query_block=16)
    rungs = tuple(replace(rung, decode_break_even_tokens={1: break_even}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))
    cache = DynamicCache(config=model.config)
    with retrofit(model, adapter, "bold") as handle:
        whole = run(model, ids)
        pieces = [
            model(input_ids=ids[:, a:b], **cache_argument(cache), use_cache=True).logits
            for a, b in ((0, 48), (48, 384), (384, 385))
        ]
        last = [call.path for call in handle.stats().calls][-1]

    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert last == ("sparse" if break_even <= 385 else "dense")


@torch.no_grad()
def test_a_step_below_the_decode_break_even_runs_dense_and_says_so() -> None:
    """Prompts are thinned from one length on, steps from another: the position alone decides."""
    model, ids = make_llama(), make_ids(140)
    adapter = make_adapter(model, break_even_tokens=64)
    rungs = tuple(replace(rung, decode_break_even_tokens={1: 136}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))
    with retrofit(model, adapter, "all") as handle:
        found = run_stepwise(model, ids, 130)
        calls = [(call.q_tokens, call.path) for call in handle.stats().calls if call.layer == 0]

    steps = ["dense"] * 5 + ["sparse"] * 5  # contexts of 131 to 140 tokens
    assert calls == [(130, "sparse"), *((1, path) for path in steps)]
    torch.testing.assert_close(found, run(model, ids), rtol=1e-3, atol=1e-4)


def test_decoding_across_the_break_even_length_equals_dense_when_everything_is_kept() -> None:
    """The side cache follows while the dense path still runs, so switching over loses nothing."""
    model, ids = make_llama(), make_ids(140)
    expected = run(model, ids)

    with retrofit(model, make_adapter(model, break_even_tokens=128), "all") as handle:
        found = run_stepwise(model, ids, 120)
        stats = handle.stats()

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert stats.num_sparse > 0
    assert any(call.path == "dense" for call in stats.calls)


def test_several_caches_alive_at_once_do_not_mix() -> None:
    """Two requests that take turns decode as each would alone."""
    model = make_llama()
    first, second = make_ids(150, seed=1), make_ids(170, seed=2)

    with retrofit(model, make_adapter(model), "bold"):
        alone = [run_stepwise(model, ids, 140)[:, 140:] for ids in (first, second[:, :150])]
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        with torch.no_grad():
            for ids, cache in zip((first, second), caches, strict=True):
                model(input_ids=ids[:, :140], **cache_argument(cache), use_cache=True)
            turns: list[list[torch.Tensor]] = [[], []]
            for i in range(140, 150):
                for which, ids in enumerate((first, second)):
                    step = model(input_ids=ids[:, i : i + 1], **cache_argument(caches[which]), use_cache=True)
                    turns[which].append(step.logits)

    for expected, parts in zip(alone, turns, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_a_cache_that_is_over_is_freed() -> None:
    """A handle keeps nothing of a request that its owner has let go."""
    model, ids = make_llama(), make_ids(160)

    with retrofit(model, make_adapter(model), "bold"), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, **cache_argument(cache), use_cache=True)
        kept = ref(cache.layers[-1].keys)
        del cache
        gc.collect()

        assert kept() is None


def test_a_cropped_cache_is_noticed() -> None:
    """After a crop the selection is that of the text that is left, not of what was cut off."""
    model, ids, other = make_llama(), make_ids(160), make_ids(160, seed=5)
    cache = DynamicCache(config=model.config)

    with retrofit(model, make_adapter(model), "bold"), torch.no_grad():
        joined = torch.cat([ids[:, :100], other[:, :60]], dim=1)
        model(input_ids=joined, **cache_argument(cache), use_cache=True)
        cache.crop(-60)
        found = model(input_ids=ids[:, 100:], **cache_argument(cache), use_cache=True).logits[:, -1]

    torch.testing.assert_close(found, run_last_chunk(model, ids), rtol=1e-3, atol=1e-3)


def run_last_chunk(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token when the last 60 tokens come as one chunk."""
    cache = DynamicCache(config=model.config)
    with retrofit(model, make_adapter(model), "bold"), torch.no_grad():
        model(input_ids=ids[:, :100], **cache_argument(cache), use_cache=True)
        logits: torch.Tensor = model(input_ids=ids[:, 100:], **cache_argument(cache), use_cache=True).logits
    return logits[:, -1]


def test_rungs_can_be_switched_between_two_passes() -> None:
    """A long-lived handle follows set_rung, back to the dense bits included."""
    model, ids = make_llama(), make_ids(300)
    expected = run(model, ids)
    handle = attach(model, make_adapter(model))

    handle.set_rung("bold")
    thinned = run(model, ids)
    handle.set_rung("dense")
    dense = run(model, ids)
    handle.close()
    handle.close()

    assert not torch.equal(thinned, expected)
    assert torch.equal(dense, expected)
    assert torch.equal(run(model, ids), expected)


def test_the_model_is_restored_after_an_error() -> None:
    """Leaving the block by an exception gives the model its own attention back, hooks and names included."""
    model, ids = make_llama(), make_ids(80)
    expected, before = run(model, ids), model.config._attn_implementation

    with pytest.raises(KeyError), retrofit(model, make_adapter(model), "bold"):
        raise KeyError("something else broke")

    assert model.config._attn_implementation == before
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(run(model, ids), expected)


def test_base_best_equals_sdpa_within_tolerance_for_sliding_layers_too() -> None:
    """The strongest dense baseline computes what Transformers computes."""
    model, ids = make_gemma(), make_ids(150)
    expected = run(model, ids)

    with retrofit(model, None, base="best"):
        once = run(model, ids)
        stepped = run_stepwise(model, ids, 140)

    torch.testing.assert_close(once, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stepped, expected, rtol=1e-3, atol=1e-4)


def test_right_padding_leaves_the_real_tokens_alone() -> None:
    """A right-padded row gives the same logits as alone."""
    model, ids = make_llama(), make_ids(200)
    padded = torch.cat([ids, torch.zeros(1, 30, dtype=torch.long)], dim=1)
    mask = (torch.arange(230) < 200).long()[None]

    with retrofit(model, make_adapter(model), "all"):
        found = run(model, padded, attention_mask=mask)[:, :200]
        expected = run(model, ids)

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_left_padding_and_fixed_buffers_are_refused_on_sparse_rungs() -> None:
    """What would silently move block borders is an error that says what to do."""
    model, ids = make_llama(), make_ids(80, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    static = StaticCache(config=model.config, max_cache_len=128)

    with retrofit(model, make_adapter(model), "bold"):
        with pytest.raises(ModelError, match="left padding"):
            run(model, ids, attention_mask=mask)
        with pytest.raises(ModelError, match="DynamicCache"), torch.no_grad():
            model(input_ids=ids[:1], **cache_argument(static), use_cache=True)
        with pytest.raises(ModelError, match="positions"):
            run(model, ids, position_ids=torch.arange(7, 87)[None].expand(2, -1))


def test_the_planted_fault_raises_nothing_and_changes_the_output_only_past_its_length() -> None:
    """It is silent: finite numbers, the same density to a hair, wrong blocks past the length."""
    model, ids = make_llama(), make_ids(400)
    adapter = make_adapter(model)

    with retrofit(model, adapter, "medium") as handle:
        healthy = run(model, ids)
        handle.set_fault(Fault(past_tokens=256))
        faulty = run(model, ids)

    assert torch.isfinite(faulty).all()
    assert torch.equal(faulty[:, :256], healthy[:, :256])
    assert not torch.equal(faulty[:, 256:], healthy[:, 256:])


def test_nan_in_a_scorer_is_an_error() -> None:
    """A scorer that went wrong never chooses blocks."""
    model, ids = make_llama(), make_ids(300)
    adapter = make_adapter(model)
    with torch.no_grad():
        adapter.scorers[1].log_gain[0] = float("nan")

    with retrofit(model, adapter, "bold"), pytest.raises(ScorerError, match="NaN"):
        run(model, ids)


def test_an_unsupported_family_is_refused_by_name() -> None:
    """The message names the model type and what is supported."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))

    with pytest.raises(ModelError, match=r"'gpt2'.*Llama, Qwen2, Qwen3, Mistral, Gemma 3"):
        thinnable_layers(model)


def test_a_model_of_sliding_layers_only_is_refused() -> None:
    """Without full attention there is nothing to thin."""
    with pytest.raises(ModelError, match="sliding window of 16 tokens"):
        thinnable_layers(make_mistral(sliding_window=16))


def test_only_full_attention_layers_are_thinned() -> None:
    """Gemma's sliding layers are left alone."""
    model = make_gemma()

    layers = thinnable_layers(model)

    assert [layer.index for layer in layers] == [1]
    assert [layer_window(model.config, i) for i in range(3)] == [32, None, 32]


def test_unknown_rungs_and_bases_are_refused_by_name() -> None:
    """The message names what there is."""
    model = make_llama()

    with pytest.raises(AdapterError, match=r"'wild'.*dense, all, medium, bold"):
        attach(model, make_adapter(model), rung="wild")
    with pytest.raises(ModelError, match="base is 'eager'"):
        attach(model, None, base="eager")  # type: ignore[arg-type]
    assert model.config._attn_implementation == "sdpa"
