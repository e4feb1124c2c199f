"""vLLM in this process, for tests that compare tokens: requests in, ids out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sentei.serving.engine.request import EngineRequest, Sampling
from sentei.serving.engine.runner import ModelRunner
from sentei.serving.vllm.asked import Asked
from sentei.serving.vllm.engine import WORKER_DESK
from sentei.serving.vllm.options import SCHEDULERS, EngineOptions
from tests.vllm.conftest import VOCAB, Tiny

NUM_TOKENS = 20
LEAST_LEAD = 1e-5  # nats of the best token over the next; fp32 sums differ by a tenth of it


@dataclass(frozen=True)
class Answer:
    """One request's ids, and how many prompt tokens came from the prefix cache."""

    ids: tuple[int, ...]
    num_cached: int


class Offline:
    """A vLLM engine with the plugin, without a process of its own."""

    def __init__(self, tiny: Tiny, name: str, *, adapter: Path | None = None, **arguments: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options = EngineOptions(name, str(adapter or tiny.folder / "adapter"))
        given: dict[str, Any] = {
            "dtype": "float32", "max_model_len": 1536, "enforce_eager": True, "block_size": 64,
            "max_num_seqs": 16, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20,
            "scheduler_cls": SCHEDULERS[0], "async_scheduling": False, "skip_tokenizer_init": True,
            "worker_extension_cls": WORKER_DESK, "additional_config": options.to_additional_config(),
            "max_logprobs": 20, "disable_log_stats": False,
        }  # fmt: skip
        self.llm = LLM(model=str(tiny.folder), **(given | arguments))

    def answer(
        self, prompts: Sequence[Sequence[int]], asked: Sequence[Asked], num_tokens: int = NUM_TOKENS
    ) -> list[Answer]:
        """Run all requests at once."""
        params = [_params(wish, num_tokens) for wish in asked]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False
        )
        return [Answer(tuple(o.outputs[0].token_ids), o.num_cached_tokens) for o in outputs]

    def answer_while_some_leave(
        self,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Asked],
        leaving: dict[int, int],
        num_tokens: int = NUM_TOKENS,
    ) -> dict[int, tuple[int, ...]]:
        """Run all at once; `leaving` says after which step one is aborted. Answers of those that stay."""
        engine = self.llm.llm_engine
        for i, (ids, wish) in enumerate(zip(prompts, asked, strict=True)):
            engine.add_request(str(i), {"prompt_token_ids": list(ids)}, _params(wish, num_tokens))
        found, step = {}, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id)] = tuple(output.outputs[0].token_ids)
            step += 1
            engine.abort_request([str(i) for i, after in leaving.items() if after == step])
        return found

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def num_preemptions(self) -> int:
        """How often a request had to make room for another."""
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def close(self) -> None:
        """Let go of the engine."""
        self.llm.llm_engine.engine_core.shutdown()


def _params(wish: Asked, num_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
        extra_args=wish.to_extra_args(),
    )  # fmt: skip


def make_prompts(lengths: Sequence[int], vocab: int = VOCAB) -> list[tuple[int, ...]]:
    """Random tokens of one seed."""
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()) for n in lengths]


def answer_builtin(
    tiny: Tiny, prompt: Sequence[int], rung: str, num_tokens: int = NUM_TOKENS
) -> tuple[int, ...]:
    """What the built-in engine says: the reference. No token of it may hang on rounding."""
    from sentei.kernels.hf.retrofit import retrofit

    with retrofit(tiny.model, tiny.adapter) as handle:
        runner = ModelRunner(tiny.model, handle)
        request = EngineRequest("r", tuple(prompt), num_tokens, rung, Sampling(num_top_logprobs=2))
        found = [runner.prefill(request)[0]]
        while len(found) < num_tokens:
            found.append(runner.decode("r")[0])
    leads = [token.top[0][1] - token.top[1][1] for token in found]
    assert min(leads) > LEAST_LEAD, f"two best tokens at step {leads.index(min(leads))}: choose another seed"
    return tuple(token.token_id for token in found)
