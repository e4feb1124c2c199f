"""Train the pocket model on a CPU: recall, copying and text together, at growing lengths.

    python -m sentei.pipeline.pocket.train --out DIR

Everything follows from the seed. A checkpoint beside the result is resumed when the command is repeated.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from sentei.pipeline.pocket.batches import NUM_ROLES, Batch, BatchMaker
from sentei.pipeline.pocket.card import RunFacts, write_card
from sentei.pipeline.pocket.network import MAX_POSITIONS, make_model
from sentei.pipeline.pocket.vocabulary import save_tokenizer, train_tokenizer
from sentei.pipeline.text.corpus import load_corpus, split_documents

WARMUP_STEPS = 40
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.02
REPORT_STEPS = 20
SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Phase:
    """So many steps of one form; `density` is the share of notes and questions in the text."""

    steps: int
    batch: int
    tokens: int
    density: float
    copy_share: float


CURRICULUM = (
    Phase(steps=250, batch=16, tokens=256, density=0.5, copy_share=0.1),
    Phase(steps=200, batch=4, tokens=1024, density=0.3, copy_share=0.06),
    Phase(steps=120, batch=1, tokens=4096, density=0.15, copy_share=0.03),
    Phase(steps=20, batch=1, tokens=8192, density=0.1, copy_share=0.0),
)


def compute_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean loss on text, answer and repeat targets, [3]; an absent role gives zero."""
    logits = model(input_ids=batch.ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    roles = batch.roles[:, 1:].flatten()
    masks = [roles == role for role in range(NUM_ROLES)]
    return torch.stack([(losses * mask).sum() / mask.sum().clamp(min=1) for mask in masks])


def pick_lr(step: int, steps: int) -> float:
    """Warm up, hold, and fall along a cosine to a twentieth over the last 60% of the steps."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    done = max(0.0, (step / steps - 0.4) / 0.6)
    return PEAK_LR * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """One run: model, optimizer and place in the curriculum, saved together so that a stop costs little."""

    def __init__(self, model: Any, maker: BatchMaker, checkpoint: Path, seed: int) -> None:
        self._model = model
        self._maker = maker
        self._checkpoint = checkpoint
        self._seed = seed
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self._plan = [phase for phase in CURRICULUM for _ in range(phase.steps)]
        self.done_steps = 0
        self.spent_s = 0.0

    def run(self) -> None:
        """Take every step that is left, with progress on stderr."""
        if self._checkpoint.is_file():
            self._resume()
        start, saved, before = time.monotonic(), time.monotonic(), self.spent_s
        sums = torch.zeros(NUM_ROLES)
        for step in range(self.done_steps, len(self._plan)):
            sums += self._take_step(step)
            self.done_steps = step + 1
            self.spent_s = before + time.monotonic() - start
            if self.done_steps % REPORT_STEPS == 0:
                self._report(sums / REPORT_STEPS)
                sums.zero_()
            if time.monotonic() - saved > SAVE_EVERY_S or self.done_steps == len(self._plan):
                self._save()
                saved = time.monotonic()

    def _take_step(self, step: int) -> torch.Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = pick_lr(step, len(self._plan))
        losses = compute_losses(self._model, self._make_batch(self._plan[step], step))
        torch.autograd.backward(losses.sum())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    def _make_batch(self, phase: Phase, step: int) -> Batch:
        # Seeded by the step, so that a resumed run sees the batches that an unbroken one would.
        self._maker.reseed(self._seed * 1_000_003 + step)
        return self._maker.make_recalls(phase.batch, phase.tokens, phase.density, phase.copy_share)

    def _report(self, losses: torch.Tensor) -> None:
        costs = [step_cost(phase) for phase in self._plan]
        left_s = self.spent_s * sum(costs[self.done_steps :]) / sum(costs[: self.done_steps])
        print(
            f"step {self.done_steps}/{len(self._plan)}, {self._plan[self.done_steps - 1].tokens} tokens: "
            f"text {losses[0]:.3f}, answers {losses[1]:.3f}, "
            f"repeats {losses[2]:.3f}; {self.spent_s:.0f} s, about {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def _save(self) -> None:
        tensors = {f"model.{name}": t for name, t in self._model.state_dict().items()}
        for i, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
        metadata = {"done_steps": str(self.done_steps), "spent_s": str(self.spent_s), "seed": str(self._seed)}
        part = self._checkpoint.with_suffix(".part")
        save_file({k: t.detach().clone() for k, t in tensors.items()}, part, metadata=metadata)
        part.replace(self._checkpoint)

    def _resume(self) -> None:
        with safe_open(self._checkpoint, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata["seed"] != str(self._seed):
            raise ValueError(
                f"{self._checkpoint} was made with seed {metadata['seed']}, not {self._seed}; "
                "delete it or give the same seed"
            )
        self._model.load_state_dict({k[6:]: t for k, t in tensors.items() if k.startswith("model.")})
        state = self._optimizer.state_dict()
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state["state"].setdefault(int(i), {})[name] = tensor
        self._optimizer.load_state_dict(state)
        self.done_steps, self.spent_s = int(metadata["done_steps"]), float(metadata["spent_s"])


def step_cost(phase: Phase) -> float:
    """Return a step's relative cost: linear layers grow with the tokens, attention with their square."""
    return phase.batch * phase.tokens * (1.0 + phase.tokens / 1500.0)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bfloat16 copy and the tokenizer; the weights appear last and at once."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        half.save_pretrained(name)
        save_tokenizer(tokenizer, Path(name))
        for path in sorted(Path(name).iterdir(), key=lambda p: p.suffix == ".safetensors"):
            path.replace(folder / path.name)


def train_pocket(out: Path, *, seed: int) -> None:
    """Train from the first step (or the checkpoint's), save the model, measure it and write its card."""
    torch.manual_seed(seed)
    corpus = load_corpus()
    train, held_out = split_documents(corpus)
    tokenizer = train_tokenizer(train, max_positions=MAX_POSITIONS)
    maker = BatchMaker(tokenizer, train, seed)
    model = make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, maker, out / "checkpoint.safetensors.tmp", seed)
    trainer.run()
    save_model(model, tokenizer, out)
    facts = RunFacts(
        seed=seed,
        corpus_digest=corpus.digest,
        parameters=sum(p.numel() for p in model.parameters()),
        text_tokens=maker.num_text_tokens,
        seen_tokens=sum(p.steps * p.batch * p.tokens for p in CURRICULUM),
        train_s=trainer.spent_s,
        phases=tuple(f"{p.steps} steps of {p.batch} × {p.tokens}" for p in CURRICULUM),
    )
    write_card(out, facts, held_out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="sentei.pipeline.pocket.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, tokenizer and card")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    given = parser.parse_args(arguments)
    train_pocket(given.out, seed=given.seed)


if __name__ == "__main__":
    main()
