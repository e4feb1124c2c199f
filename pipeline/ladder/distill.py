"""Distill: teach each layer's scorer where its frozen attention goes, and stop before it overfits."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter, save_adapter
from sentei.kernels.scorer.network import BlockScorer, Form
from sentei.pipeline.ladder.learn import Course, learn
from sentei.pipeline.measure.capture import LayerRecord, Records, Sampling, capture
from sentei.pipeline.measure.needs import row_shares
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, silent
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
    progress: Progress = silent,
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
            adapter.manifest.shapes,
            Sampling(options.blocks_per_window, options.seed),
            label=label,
            progress=progress,
        )
        for documents, num, label in (
            (parts.train, options.num_windows, "capture training text"),
            (parts.early_stop, options.num_held_out, "capture held-out text"),
        )
    ]
    figures: dict[str, float] = {}
    trained = _train_all(dict(adapter.scorers), records[0], records[1], options, progress)
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
    options: DistillOptions,
    progress: Progress,
) -> dict[int, tuple[float, float]]:
    """Train the layers side by side, one core each: their tensors are too small to share between cores."""
    num_threads = torch.get_num_threads()
    results: dict[int, tuple[float, float]] = {}

    def train_one(index: int) -> tuple[int, tuple[float, float]]:
        torch.set_num_threads(1)
        return index, train_scorer(scorers[index], train[index], held_out[index], options)

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
    options: DistillOptions,
) -> tuple[float, float]:
    """Train in place; keep the weights of the best held-out KL; return the KL before and after."""
    if not scorer.shape.is_residual:
        _start_low_rank(scorer, train)
    course = Course(
        learning_rate=options.learning_rate,
        weight_decay=0.01,
        max_epochs=options.max_epochs,
        patience=options.patience,
        seed=options.seed,
        worthwhile=WORTHWHILE,
    )
    return learn(list(scorer.parameters()), partial(divergence, scorer), train, held_out, course)


def _start_low_rank(scorer: BlockScorer, train: Sequence[LayerRecord]) -> None:
    step = -(-len(train) // START_RECORDS)
    queries = torch.cat([record.q[0].float().flatten(1, 2) for record in train[::step]], dim=1)
    scorer.start_from(queries, torch.cat([record.pooled[0] for record in train[::step]], dim=1))


def divergence(scorer: BlockScorer, record: LayerRecord) -> torch.Tensor:
    """KL from each row's true block mass to the estimate, in nats, averaged over rows and heads."""
    shares, forced = row_shares(scorer, record)
    is_open = record.is_open[None, None, :, None, :]
    true = record.mass.float() * is_open
    true_forced = (1 - true.sum(dim=-1)).clamp_min(TINY)
    gaps = true.clamp_min(TINY).log() - shares.masked_fill(~is_open, 0.0)
    far = torch.where(true > TINY, true * gaps, 0.0).sum(dim=-1)
    return (far + true_forced * (true_forced.log() - forced)).mean()
