"""Distill: teach each layer's scorer where its frozen attention goes, and stop before it overfits."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter, save_adapter
from sentei.kernels.hf.models import rotary_table
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, Form
from sentei.pipeline.measure.capture import LayerRecord, Records, capture, row_shares
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

TINY = 1e-9
START_RECORDS = 8  # texts that a low-rank start is computed from; second moments need no more
WORTHWHILE = 0.99  # an epoch that gains less than 1% of the held-out KL counts as no gain


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """How much to learn from, and for how long."""

    window_tokens: int = 4096
    num_windows: int = 24
    num_held_out: int = 4
    blocks_per_window: int = 12
    rank: int = 64
    pool_tokens: int = 16
    block_tokens: int = 64
    form: Form = "residual"
    # Swept 1e-3 to 2e-2 on Gemma 3 270M, 12 windows of 4096: held-out KL 0.159, 0.136 (5e-3); 1e-2 as good.
    learning_rate: float = 1e-2
    max_epochs: int = 10
    patience: int = 2
    seed: int = 0


# Single tokens, and a step small enough not to leave the good start (docs/adr/0010).
LOW_RANK = DistillOptions(form="low_rank", rank=64, pool_tokens=1, learning_rate=5e-4)


def distill(
    loaded: LoadedModel,
    corpus: Corpus,
    out_dir: Path,
    options: DistillOptions | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> Adapter:
    """Train one scorer per full-attention layer on frozen activations; save the adapter and return it."""
    options = options if options is not None else DistillOptions()
    started = time.monotonic()
    window = min(options.window_tokens, loaded.max_tokens)
    parts = split_text(corpus)
    adapter = new_adapter(
        loaded.model,
        loaded.name,
        rank=options.rank,
        pool_tokens=options.pool_tokens,
        block_tokens=options.block_tokens,
        form=options.form,
        seed=options.seed,
    )
    records = [
        capture(
            loaded,
            make_texts(loaded, documents, window_tokens=window, num=num, seed=options.seed),
            dict(adapter.manifest.shapes),
            blocks_per_text=options.blocks_per_window,
            seed=options.seed,
            progress=progress,
            label=label,
        )
        for documents, num, label in (
            (parts.train, options.num_windows, "capture training text"),
            (parts.early_stop, options.num_held_out, "capture held-out text"),
        )
    ]
    table = rotary_table(loaded.model, window)
    figures: dict[str, float] = {}
    trained = _train_all(dict(adapter.scorers), records[0], records[1], table, options, progress)
    for index, (before, after) in trained.items():
        figures |= {f"layer_{index}_kl_untrained": before, f"layer_{index}_kl_held_out": after}
    figures["distill_s"] = time.monotonic() - started
    manifest = replace(
        adapter.manifest,
        tokenizer_sha256=loaded.tokenizer_sha256,
        corpus_sha256=corpus.digest,
        figures=figures,
    )
    return save_adapter(replace(adapter, manifest=manifest), out_dir)


def _train_all(
    scorers: Mapping[int, BlockScorer],
    train: Records,
    held_out: Records,
    table: RotaryTable,
    options: DistillOptions,
    progress: Progress,
) -> dict[int, tuple[float, float]]:
    """Train the layers side by side, one core each: their tensors are too small to share between cores."""
    num_threads = torch.get_num_threads()
    results: dict[int, tuple[float, float]] = {}

    def train_one(index: int) -> tuple[int, tuple[float, float]]:
        torch.set_num_threads(1)
        return index, train_scorer(scorers[index], train[index], held_out[index], table, options)

    progress("train scorers", 0, len(scorers))
    try:
        with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
            for index, figures in pool.map(train_one, scorers):
                results[index] = figures
                progress("train scorers", len(results), len(scorers))
    finally:
        torch.set_num_threads(num_threads)
    return results


def train_scorer(
    scorer: BlockScorer,
    train: Sequence[LayerRecord],
    held_out: Sequence[LayerRecord],
    table: RotaryTable,
    options: DistillOptions,
) -> tuple[float, float]:
    """Train in place; keep the weights of the best held-out KL; return the KL before and after."""
    if not scorer.shape.is_residual:
        _start_low_rank(scorer, train)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=options.learning_rate, weight_decay=0.01)
    num_steps = max(1, options.max_epochs * len(train))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
    )
    generator = torch.Generator().manual_seed(options.seed)
    before = best = mean_divergence(scorer, held_out, table)
    best_state = copy.deepcopy(scorer.state_dict())
    epochs_since_best = 0
    scorer.train()
    for _ in range(options.max_epochs):
        for i in torch.randperm(len(train), generator=generator).tolist():
            optimizer.zero_grad()
            divergence(scorer, train[i], table).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        current = mean_divergence(scorer, held_out, table)
        epochs_since_best = 0 if current < best * WORTHWHILE else epochs_since_best + 1
        if current < best:
            best, best_state = current, copy.deepcopy(scorer.state_dict())
        if epochs_since_best >= options.patience:
            break
    scorer.load_state_dict(best_state)
    scorer.eval()
    return before, best


def _start_low_rank(scorer: BlockScorer, train: Sequence[LayerRecord]) -> None:
    step = -(-len(train) // START_RECORDS)
    queries = torch.cat([record.q[0].float().flatten(1, 2) for record in train[::step]], dim=1)
    scorer.start_from(queries, torch.cat([record.pooled[0] for record in train[::step]], dim=1))


def divergence(scorer: BlockScorer, record: LayerRecord, table: RotaryTable) -> torch.Tensor:
    """KL from each row's true block mass to the estimate, in nats, averaged over rows and heads."""
    shares, forced = row_shares(scorer, record, table)
    is_open = record.is_open[None, None, :, None, :]
    true = record.mass.float() * is_open
    true_forced = (1 - true.sum(dim=-1)).clamp_min(TINY)
    gaps = true.clamp_min(TINY).log() - shares.masked_fill(~is_open, 0.0)
    far = torch.where(true > TINY, true * gaps, 0.0).sum(dim=-1)
    return (far + true_forced * (true_forced.log() - forced)).mean()


@torch.no_grad()
def mean_divergence(scorer: BlockScorer, records: Sequence[LayerRecord], table: RotaryTable) -> float:
    """Mean KL over records."""
    return sum(float(divergence(scorer, record, table)) for record in records) / len(records)
