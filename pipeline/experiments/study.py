"""Study: scorer forms beside each other on one model's held-out text, before one is chosen.

Every form is judged by what calibration will ask of it: how many of its blocks a head must keep so that no
more than a given share of needles is missed (a needle holds over 30% of some row's attention), what mass that
drops, what it finds at a given density, and the KL to each row's true block mass. `exact` scores every token
by its true attention logit: no scorer of blocks can do better, so it is the floor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from sentei.kernels.hf.models import LayerInfo, thinnable_layers
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.untrained import UNTRAINED
from sentei.pipeline.ladder.distill import DistillOptions, divergence, train_scorer
from sentei.pipeline.ladder.learn import mean_divergence
from sentei.pipeline.measure.capture import Sampling, capture
from sentei.pipeline.measure.needs import (
    MAX_SHARE,
    MIN_SHARE,
    AtDensity,
    Scored,
    at_density,
    max_head_density,
    needle_threshold,
    score_records,
)
from sentei.pipeline.measure.records import LayerRecord, LayerRecords
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted, silent
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

EXACT = "exact"


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """What is compared, and on how much text; lengths in tokens."""

    window_tokens: int = 4096
    num_windows: int = 9
    blocks_per_window: int = 8
    pools: tuple[int, ...] = (4, 16)
    ranks: tuple[int, ...] = (16, 32, 64)
    query_pools: tuple[int, ...] = (1, 2, 4)  # queries that a low rank scores as one; trained on the most
    missed_needles: tuple[float, ...] = (0.003, 0.03)
    densities: tuple[float, ...] = (0.1, 0.2)  # of the blocks that may be chosen, over a layer's heads
    block_tokens: int = 64
    query_blocks: tuple[int, ...] = (64, 16)  # rows that choose together
    max_epochs: int = 5
    learning_rate: float = 1e-2
    low_rank_learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One form in one layer; densities of its open blocks are of the worst head, dropped mass the mean."""

    layer: int
    form: str
    query_block: int
    dims_per_token: float  # multiply-adds of scoring one query token against one key token
    kl: float
    density: Mapping[str, float]  # by share of needles missed
    dropped_mass: Mapping[str, float]
    at_density: Mapping[str, AtDensity]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Texts:
    train: LayerRecords
    held_out: LayerRecords
    judged: LayerRecords


def study(
    loaded: LoadedModel,
    corpus: Corpus,
    options: StudyOptions | None = None,
    progress: Progress = silent,
) -> list[StudyRow]:
    """Train every form on the same text and judge all of them, trained and not, on other text."""
    options = options if options is not None else StudyOptions()
    layers = {layer.index: layer for layer in thinnable_layers(loaded.model)}
    rows: list[StudyRow] = []
    shapes = {index: _shape(layer, options, pool=1) for index, layer in layers.items()}
    texts = _capture(loaded, corpus, shapes, options, progress)
    for pool in dict.fromkeys((*options.pools, 1)):
        for index, layer in counted(list(layers.items()), f"study pools of {pool}", progress):
            for form, scorer in _forms(layer, texts, options, pool):
                rows += [
                    _judge(index, form, scorer, texts.judged[index], options, block_q)
                    for block_q in options.query_blocks
                ]
    return sorted(rows, key=lambda row: row.layer)


def _shape(layer: LayerInfo, options: StudyOptions, *, pool: int) -> ScorerShape:
    return ScorerShape(
        layer.query_heads,
        layer.kv_heads,
        layer.head_dim,
        pool_tokens=pool,
        block_tokens=options.block_tokens,
    )


def _forms(
    layer: LayerInfo, texts: _Texts, options: StudyOptions, pool: int
) -> Iterator[tuple[str, BlockScorer]]:
    """Yield each form before and after training, with its name."""
    shape = _shape(layer, options, pool=pool)
    train, held_out = texts.train[layer.index], texts.held_out[layer.index]
    scorer = BlockScorer(shape, layer.scale)
    if pool > 1:
        yield f"untrained means_{pool}", scorer
        train_scorer(scorer, train, held_out, _training(options, options.learning_rate))
        yield f"residual, means of {pool}", scorer
        return
    yield EXACT, scorer
    for name, make in UNTRAINED.items():
        if (other := make(shape, layer.scale)).shape.pool_tokens == 1:  # means have pools of their own
            yield f"untrained {name}", other
    for rank in options.ranks:
        together = max(options.query_pools)
        scorer = BlockScorer(replace(shape, form="low_rank", rank=rank, query_pool=together), layer.scale)
        train_scorer(scorer, train, held_out, replace(_training(options, 0.0), max_epochs=0))
        yield f"low rank {rank}, start", scorer.with_query_pool(1)
        low = _training(options, options.low_rank_learning_rate)
        train_scorer(scorer, train, held_out, low)
        for size in options.query_pools:
            as_one = "" if size == 1 else f", {size} queries as one"
            yield f"low rank {rank}, trained{as_one}", scorer.with_query_pool(size)


def _training(options: StudyOptions, learning_rate: float) -> DistillOptions:
    return DistillOptions(learning_rate=learning_rate, max_epochs=options.max_epochs, seed=options.seed)


def _capture(
    loaded: LoadedModel,
    corpus: Corpus,
    shapes: dict[int, ScorerShape],
    options: StudyOptions,
    progress: Progress,
) -> _Texts:
    parts = split_text(corpus)
    window = min(options.window_tokens, loaded.max_tokens)
    few = max(3, options.num_windows // 4)
    wanted = (
        (parts.train, options.num_windows, options.seed),
        (parts.early_stop, few, options.seed),
        (parts.calibrate, few, options.seed + 1),
    )
    records = [
        capture(
            loaded,
            make_texts(loaded, documents, window_tokens=window, num=num, seed=seed),
            shapes,
            Sampling(options.blocks_per_window, options.seed),
            label=f"capture text {i + 1} of {len(wanted)}",
            progress=progress,
        )
        for i, (documents, num, seed) in enumerate(wanted)
    ]
    return _Texts(*records)


def _judge(
    layer: int,
    form: str,
    scorer: BlockScorer,
    records: Sequence[LayerRecord],
    options: StudyOptions,
    block_q: int,
) -> StudyRow:
    (scored,), asking = score_records(scorer, records, (), block_q)
    density, dropped = {}, {}
    for missed in options.missed_needles:
        found = [
            _at(scored, asking, heads, missed) for heads in _groups(scorer.shape)
        ]  # per KV group: (density, dropped mass)
        density[f"{missed:g}"] = max(one for one, _ in found)
        dropped[f"{missed:g}"] = sum(mass for _, mass in found) / len(found)
    return StudyRow(
        layer=layer,
        form=form,
        query_block=block_q,
        dims_per_token=scorer.shape.head_dim if form == EXACT else scorer.dims_per_token,
        kl=mean_divergence(partial(divergence, scorer), records),
        density=density,
        dropped_mass=dropped,
        at_density={f"{share:g}": at_density(scored, share) for share in options.densities},
    )


def _groups(shape: ScorerShape) -> Sequence[slice]:
    group = shape.query_heads // shape.kv_heads
    return [slice(h * group, (h + 1) * group) for h in range(shape.kv_heads)]


def _at(scored: Scored, asking: Scored, heads: slice, missed: float) -> tuple[float, float]:
    share = needle_threshold(scored, heads, missed)
    if asking.needs:
        share = min(share, needle_threshold(asking, heads, missed))
    share = min(MAX_SHARE, max(MIN_SHARE, share))
    return max_head_density(scored, heads, share), float(scored.dropped(heads, share).mean())
