"""Measure the pocket model and write its card: held-out loss, recall by length and depth."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from sentei.pipeline.tasks import MAKERS
from sentei.pipeline.tasks.prompt import RecallTask, TaskName
from sentei.pipeline.text.corpus import Document, encode_text, token_windows

LENGTHS = (1024, 2048, 4096, 8192)
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
TASKS_PER_CELL = 8
CELL_SEED = 90_000
LOSS_WINDOWS, LOSS_TOKENS = 24, 2048


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the training run knows and the card repeats."""

    seed: int
    corpus_digest: str
    parameters: int
    text_tokens: int
    seen_tokens: int
    train_s: float
    phases: tuple[str, ...]


def answer_greedily(model: Any, tokenizer: Any, task: RecallTask) -> bool:
    """Say whether greedy decoding gives the answer; one forward pass over prompt and answer decides it."""
    prompt, answer = encode_text(tokenizer, task.prompt), encode_text(tokenizer, f" {task.answer}")
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([prompt + answer]), use_cache=False, logits_to_keep=len(answer) + 1
        ).logits
    return bool(logits[0, :-1].argmax(-1).tolist() == answer)


def measure_recall(
    model: Any, tokenizer: Any, name: TaskName, *, tokens: int, depths: Sequence[float], num: int
) -> list[float]:
    """Return the share of right answers at each depth, over `num` held-out tasks each."""
    shares = []
    for i_depth, depth in enumerate(depths):
        seeds = range(CELL_SEED + i_depth * num, CELL_SEED + (i_depth + 1) * num)
        tasks = [MAKERS[name](tokenizer, prompt_tokens=tokens, depth=depth, seed=s) for s in seeds]
        shares.append(sum(answer_greedily(model, tokenizer, task) for task in tasks) / num)
    return shares


def measure_loss(model: Any, tokenizer: Any, documents: Sequence[Document]) -> tuple[float, float]:
    """Return (the model's loss, the loss of token frequencies alone) in nats per token on held-out text."""
    windows = token_windows(tokenizer, documents, LOSS_TOKENS, LOSS_WINDOWS, seed=0)
    with torch.inference_mode():
        losses = [
            F.cross_entropy(model(input_ids=w[None], use_cache=False).logits[0, :-1].float(), w[1:]).item()
            for w in windows
        ]
    counts = Counter(windows.flatten().tolist())
    total = windows.numel()
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    return sum(losses) / len(losses), unigram


def write_card(folder: Path, facts: RunFacts, held_out: Sequence[Document]) -> None:
    """Measure what was saved in the folder and write README.md beside it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss, unigram = measure_loss(model, tokenizer, held_out)
    rows = []
    names: tuple[TaskName, ...] = ("passkey", "key_value", "copy")
    for name in names:
        for tokens in LENGTHS:
            num = TASKS_PER_CELL if tokens < 8192 else TASKS_PER_CELL // 2
            shares = measure_recall(model, tokenizer, name, tokens=tokens, depths=DEPTHS, num=num)
            cells = " | ".join(f"{100 * share:.0f}%" for share in (*shares, sum(shares) / len(shares)))
            rows.append(f"| {name} | {tokens} | {num * len(DEPTHS)} | {cells} |")
            print(rows[-1], flush=True)
    card = CARD.format(
        facts=facts,
        million=facts.parameters / 1e6,
        minutes=facts.train_s / 60,
        seen=facts.seen_tokens / 1e6,
        text=facts.text_tokens / 1e6,
        phases="; ".join(facts.phases),
        loss=loss,
        perplexity=math.exp(loss),
        unigram=unigram,
        unigram_perplexity=math.exp(unigram),
        loss_tokens=LOSS_WINDOWS * LOSS_TOKENS,
        depths=" | ".join(f"depth {depth}" for depth in DEPTHS),
        rule="---|" * (len(DEPTHS) + 4),
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


CARD = """\
# The pocket model

A small Llama ({million:.1f}M parameters: 4 layers of 192, 4 query heads and 2 key heads of 64, 2048 byte-level BPE
pieces, 16384 positions) that recalls far text. It exists to show in seconds, on a CPU, what sparse attention keeps
or loses. It is no assistant: it continues text as Python source would go on, and a chat is its messages joined.

## Data and training

- Text: Python's standard library without its tests, sources and help topics, the training share of
  `split_documents` ({text:.1f}M tokens; corpus digest `{facts.corpus_digest}`). `tarfile.py` and others are held out.
- Tasks: notes and questions of `pipeline/tasks/` inside that text, many to a sequence; random streams that repeat.
- Start: not all random. One head of the first layer starts as a look at the token before, two heads of the second as
  a search for their own token among those (`network.py` says why); training then changes every weight.
- Curriculum: {phases}; {seen:.1f}M tokens in all. Seed {facts.seed}. AdamW in float32, stored as bfloat16.
- Time: {minutes:.1f} minutes on two AVX2 cores shared with other work.

Reproduce: `python -m sentei.pipeline.pocket.train --out DIR --seed {facts.seed}` (same library versions and corpus).

## Measured on held-out text (dense attention, greedy, float32 from the stored weights)

Loss {loss:.3f} nats a token, perplexity {perplexity:.1f}, over {loss_tokens} held-out tokens in windows of 2048;
token frequencies alone give {unigram:.3f} ({unigram_perplexity:.0f}).

Share of right answers by prompt length and by the depth of the note (0 = start, 1 = right before the question):

| task | prompt tokens | tasks | {depths} | all |
|{rule}
{rows}
"""  # noqa: E501 - prose of the card
