"""Recall tasks on a live model: does a rung still find what lies far back?"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.capture import Progress
from sentei.pipeline.corpus import Document
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.tasks import MAKERS, RecallTask, is_correct

TASK_NAMES = ("passkey", "key_value")


def make_tasks(
    loaded: LoadedModel, documents: Sequence[Document], *, prompt_tokens: int, num: int, seed: int
) -> list[RecallTask]:
    """Return `num` tasks of each kind, their notes spread over the prompt's depth."""
    return [
        MAKERS[name](
            loaded.tokenizer,
            prompt_tokens=prompt_tokens,
            depth=(i + 0.5) / num,
            seed=seed + i,
            documents=documents,
        )
        for name in TASK_NAMES
        for i in range(num)
    ]


def recall_by_rung(
    loaded: LoadedModel, adapter: Adapter, tasks: Sequence[RecallTask], progress: Progress
) -> dict[str, dict[str, float]]:
    """Return, per rung and task, the share of right answers (greedy, prefill and decode both on the rung)."""
    results: dict[str, dict[str, float]] = {}
    total = len(adapter.ladder.rungs) * len(tasks)
    with retrofit(loaded.model, adapter, DENSE, base="flex") as handle:
        for rung in adapter.ladder.rungs:
            handle.set_rung(rung.id)
            right: dict[str, list[bool]] = {}
            for i, task in enumerate(tasks):
                progress("recall tasks", len(results) * len(tasks) + i, total)
                answer = answer_greedily(loaded, task)
                right.setdefault(task.name, []).append(is_correct(task, answer))
            results[rung.id] = {name: sum(values) / len(values) for name, values in right.items()}
    progress("recall tasks", total, total)
    return results


@torch.no_grad()
def answer_greedily(loaded: LoadedModel, task: RecallTask) -> str:
    """Continue the prompt by as many tokens as the answer takes, plus one to see it end."""
    ids = torch.tensor(loaded.tokenizer(task.prompt, verbose=False)["input_ids"])[None]
    cache = DynamicCache(config=loaded.model.config)
    answer: list[int] = []
    for _ in range(task.answer_tokens + 1):
        output = loaded.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())
        answer.append(token)
        ids = torch.tensor([[token]])
    text: str = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    return text
