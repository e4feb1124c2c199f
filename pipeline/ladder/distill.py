"""Distill: teach each layer's scorer where its frozen attention goes, and stop before it overfits."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter, save_adapter
from sentei.kernels.hf.models import thinnable_layers
from sentei.kernels.scorer.network import BlockScorer, Form, ScorerShape
from sentei.kernels.scorer.rows import ROW_CHOICES
from sentei.kernels.scorer.selection import pick_query_block
from sentei.pipeline.ladder.learn import Course, learn, mean_divergence
from sentei.pipeline.measure.capture import Sampling, capture
from sentei.pipeline.measure.needs import AtDensity, Scored, at_density, pooled_shares, score_records
from sentei.pipeline.measure.records import LayerRecord, LayerRecords
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, silent
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

TINY = 1e-9
# Texts that a low-rank start is computed from, and keys of all of them: second moments need no more.
START_RECORDS, START_KEYS = 8, 65_536
TENTH = 0.1  # of a layer's open blocks: what scores are judged at
WORTHWHILE = 0.99  # an epoch that gains less than 1% of the held-out KL counts as no gain


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """How much to learn from, and for how long."""

    window_tokens: int = 4096
    num_windows: int = 12
    num_held_out: int = 3
    blocks_per_window: int = 12
    rank: int | None = None  # None: half of a head, at most 32
    pool_tokens: int = 1
    query_pool: int = 4
    block_tokens: int = 64
    form: Form = "low_rank"
    # A step small enough not to leave the good start (docs/adr/0010).
    learning_rate: float = 1e-3
    max_epochs: int = 4
    # Share of the need found at a tenth of the blocks that a cheaper score of a layer may cost.
    lost_need: float = 0.01
    # Share of a layer's needles that it may miss beyond those that the best score misses there.
    lost_needles: float = 0.01
    patience: int = 2
    seed: int = 0

    def rank_for(self, head_dim: int) -> int:
        """Return the learned dimensions for heads of a size."""
        return self.rank if self.rank is not None else min(32, head_dim // 2)


# Means of 4 tokens beside the untrained score. Step swept 1e-3 to 2e-2 on Gemma 3 270M, 12 windows of 4096:
# held-out KL 0.159, 0.136 (5e-3); 1e-2 as good.
RESIDUAL = DistillOptions(
    form="residual", rank=64, pool_tokens=4, query_pool=1, num_windows=15, learning_rate=1e-2, max_epochs=6
)
LARGE_HEAD = 128  # above it, few dimensions lose the needles that means of 4 tokens find (docs/adr/0010)


def usual_options(model: torch.nn.Module, form: Form | None = None) -> DistillOptions:
    """Return what is distilled unless asked otherwise: by the form, or else by the size of heads."""
    if form is None:
        form = "residual" if thinnable_layers(model)[0].head_dim > LARGE_HEAD else "low_rank"
    return RESIDUAL if form == "residual" else DistillOptions()


@dataclass(frozen=True, slots=True)
class ChosenScorer:
    """What a layer is scored by, and what it and the best untrained score found on the same held-out text."""

    scorer: BlockScorer
    kl_untrained: float
    kl_held_out: float
    found: AtDensity
    found_untrained: AtDensity

    @property
    def is_untrained(self) -> bool:
        """Whether nothing learned beat the untrained score, which then is the layer's own."""
        return self.scorer.shape.is_residual and not bool(self.scorer.query_map.any())

    def figures(self) -> dict[str, float]:
        """Return what the manifest keeps of a layer."""
        return {
            "kl_untrained": self.kl_untrained,
            "kl_held_out": self.kl_held_out,
            "rank": float(self.scorer.shape.rank),
            "query_pool": float(self.scorer.shape.query_pool),
            "chooses_rows": float(self.scorer.shape.chooses_rows),
            "need_found_at_tenth": self.found.need_found,
            "need_found_at_tenth_untrained": self.found_untrained.need_found,
            "dropped_mass_at_tenth": 1 - self.found.mass_recall_mean,
            "dropped_mass_at_tenth_untrained": 1 - self.found_untrained.mass_recall_mean,
            "needles_missed_at_tenth": self.found.needles_missed,
            "needles_missed_at_tenth_untrained": self.found_untrained.needles_missed,
        }


def distill(
    loaded: LoadedModel,
    corpus: Corpus,
    out_dir: Path,
    options: DistillOptions | None = None,
    progress: Progress = silent,
) -> Adapter:
    """Train one scorer per full-attention layer on frozen activations; save the adapter and return it."""
    options = options if options is not None else usual_options(loaded.model)
    started = time.monotonic()
    window = min(options.window_tokens, loaded.max_tokens)
    parts = split_text(corpus)
    adapter = new_adapter(
        loaded.model,
        loaded.name,
        rank=options.rank_for(thinnable_layers(loaded.model)[0].head_dim),
        query_pool=options.query_pool,
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
    chosen = _train_all(dict(adapter.scorers), records[0], records[1], options, progress)
    scorers = {index: layer.scorer for index, layer in chosen.items()}
    for index, layer in chosen.items():
        figures |= {f"layer_{index}_{name}": value for name, value in layer.figures().items()}
    figures["layers_untrained"] = float(sum(layer.is_untrained for layer in chosen.values()))
    figures["distill_s"] = time.monotonic() - started
    manifest = replace(
        adapter.manifest,
        shapes={index: scorer.shape for index, scorer in scorers.items()},
        tokenizer_sha256=loaded.tokenizer_sha256,
        corpus_sha256=corpus.digest,
        figures=figures,
    )
    return save_adapter(replace(adapter, scorers=scorers, manifest=manifest), out_dir)


def _train_all(
    scorers: Mapping[int, BlockScorer],
    train: LayerRecords,
    held_out: LayerRecords,
    options: DistillOptions,
    progress: Progress,
) -> dict[int, ChosenScorer]:
    """Train the layers side by side, one core each: their tensors are too small to share between cores."""
    num_threads = torch.get_num_threads()
    results: dict[int, ChosenScorer] = {}

    def train_one(index: int) -> tuple[int, ChosenScorer]:
        torch.set_num_threads(1)
        return index, choose_scorer(scorers[index], train[index], held_out[index], options)

    progress("train scorers", 0, len(scorers))
    try:
        with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
            for index, chosen in pool.map(train_one, scorers):
                results[index] = chosen
                progress("train scorers", len(results), len(scorers))
    finally:
        torch.set_num_threads(num_threads)
    return results


def choose_scorer(
    scorer: BlockScorer,
    train: Sequence[LayerRecord],
    held_out: Sequence[LayerRecord],
    options: DistillOptions,
) -> ChosenScorer:
    """Train a layer's scorer in several sizes, keep the cheapest that finds as much, or an untrained score.

    Layers differ: one looks at a few tokens far back and needs every dimension, the next at everything a
    little, and any score will do. Judged is what blocks are chosen by: what they hold of their neediest row
    (docs/adr/0014). A score is trained on means of queries, which is cheap, and serves single ones as well:
    features are linear. Then some rows may be scored for all of them (docs/adr/0030).
    """
    # Means of 4 tokens: the best score that has learned nothing, and what a trained one has to beat.
    means = replace(scorer.shape, form="residual", rank=1, pool_tokens=4, query_pool=1)
    untrained = BlockScorer(means, scorer.scale).eval()
    kl_untrained = mean_divergence(partial(divergence, untrained), held_out)
    found_untrained = find_at(untrained, held_out)
    tried: list[tuple[BlockScorer, AtDensity]] = []
    for rank in _ranks(scorer.shape):
        one = scorer
        if rank != scorer.shape.rank:
            one = BlockScorer(replace(scorer.shape, rank=rank), scorer.scale, seed=options.seed)
        train_scorer(one, train, held_out, options)
        forms = [one.with_query_pool(size) for size in _halvings(one.shape.query_pool)]
        if options.query_pool > 1:
            # Heads that recall from token to token learn little from means; the start may know more.
            forms.append(BlockScorer(replace(one.shape, query_pool=1), scorer.scale).eval())
            _start_low_rank(forms[-1], train)
        tried += [(form, find_at(form, held_out)) for form in forms]
    tried.append((untrained, found_untrained))
    _, best = max(tried, key=lambda pair: pair[1].need_found)
    enough = [
        (form, found)
        for form, found in tried
        if found.need_found >= best.need_found * (1 - options.lost_need)
        and found.needles_missed <= best.needles_missed + options.lost_needles
    ]
    cheapest, found = min(enough, key=lambda pair: (pair[0].cost_per_pair, -pair[1].need_found))
    chosen, found = _choose_rows(cheapest, found, held_out, options)
    kl_held_out = mean_divergence(partial(divergence, chosen), held_out)
    if chosen.shape.is_single:
        _fit_steps(chosen, train)
    return ChosenScorer(chosen, kl_untrained, kl_held_out, found, found_untrained)


def _choose_rows(
    scorer: BlockScorer, found: AtDensity, held_out: Sequence[LayerRecord], options: DistillOptions
) -> tuple[BlockScorer, AtDensity]:
    """Score some rows for all of them where that finds more at the same price, and misses as few needles.

    A form that costs less than single queries do reads so many more blocks for the difference, and may miss
    with them hardly more needles than `found`, what the scorer finds at a tenth. Returned is what the form
    finds there, too.
    """
    if not scorer.shape.is_single:
        return scorer, found
    dearest = scorer.with_query_pool(1).share_of_dense
    chosen, (_, at_price) = (scorer, found), _find(scorer, held_out, dearest)
    for size in (size for size in _halvings(options.query_pool) if size in ROW_CHOICES):
        form = scorer.with_query_pool(size, "k_center")
        at_tenth, own = _find(form, held_out, dearest)
        is_as_safe = own.needles_missed <= found.needles_missed + options.lost_needles
        if is_as_safe and own.need_found > at_price.need_found:
            chosen, at_price = (form, at_tenth), own
    return chosen


def _find(scorer: BlockScorer, records: Sequence[LayerRecord], dearest: float) -> tuple[AtDensity, AtDensity]:
    """Return what a scorer finds at a tenth, and with the blocks that it saves beside a dearer price."""
    scored = _score(scorer, records)
    return at_density(scored, TENTH), at_density(scored, TENTH + dearest - scorer.share_of_dense)


def find_at(scorer: BlockScorer, records: Sequence[LayerRecord], density: float = TENTH) -> AtDensity:
    """Return what a scorer finds at a density of a layer's open blocks, on rows that choose by sixteen."""
    return at_density(_score(scorer, records), density)


def _score(scorer: BlockScorer, records: Sequence[LayerRecord]) -> Scored:
    (scored,), _ = score_records(scorer, records, (), pick_query_block("cpu"))
    return scored


def _ranks(shape: ScorerShape) -> list[int]:
    """Return the ranks to try: the given one, and each multiple of 16 below it."""
    return [shape.rank] if shape.is_residual else [shape.rank, *range(16, shape.rank, 16)]


def _halvings(size: int) -> list[int]:
    """Return a power of two, its half, and so on down to one."""
    return [size >> step for step in range(size.bit_length())]


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
    chosen = train[:: -(-len(train) // START_RECORDS)]
    queries, keys = [], []
    for record in chosen:
        stride = -(-record.keys.shape[2] * len(chosen) // START_KEYS)
        queries.append(record.q[0].float().flatten(1, 2))
        keys.append(record.keys[0, :, ::stride].float())
    scorer.start_from(torch.cat(queries, dim=1), torch.cat(keys, dim=1))


@torch.no_grad()
def _fit_steps(scorer: BlockScorer, train: Sequence[LayerRecord]) -> None:
    """Fit the bytes of keys to the training texts' keys that may be chosen, those behind the sink block."""
    chosen = train[:: -(-len(train) // START_RECORDS)]
    encoded = (scorer.encode_keys(*record.pool_keys(1))[0] for record in chosen)
    scorer.fit_steps(torch.cat([part[:, scorer.shape.block_tokens :] for part in encoded], dim=1))


def divergence(scorer: BlockScorer, record: LayerRecord) -> torch.Tensor:
    """KL from each row's true block mass to the estimate, in nats, averaged over rows and heads.

    Rows that are scored as one are judged by their mean.
    """
    shares, forced = pooled_shares(scorer, record)
    is_open = record.is_open[None, None, :, None, :]
    B, H, n, _, blocks = record.mass.shape
    true = record.mass.float().view(B, H, n, -1, scorer.shape.row_tokens, blocks).mean(dim=4) * is_open
    true_forced = (1 - true.sum(dim=-1)).clamp_min(TINY)
    gaps = true.clamp_min(TINY).log() - shares.masked_fill(~is_open, 0.0)
    far = torch.where(true > TINY, true * gaps, 0.0).sum(dim=-1)
    result: torch.Tensor = (far + true_forced * (true_forced.log() - forced)).mean()
    return result
