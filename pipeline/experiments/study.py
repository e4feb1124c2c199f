"""Study: scorer forms beside each other on one model's held-out text, before one is chosen.

Every form is judged by what calibration will ask of it: how many of its blocks a head must keep so that no
more than a given share of needles is missed (a needle holds over 30% of some row's attention), what mass that
drops, what it finds at a given density, and the KL to each row's true block mass. `exact` scores every token
by its true attention logit: no scorer of blocks can do better, so it is the floor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from sentei.kernels.hf.models import LayerInfo, thinnable_layers
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.rows import ROW_CHOICES
from sentei.kernels.scorer.untrained import UNTRAINED
from sentei.pipeline.experiments.forms import TwoStages, local_needs
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
    query_block_needs,
    score_records,
)
from sentei.pipeline.measure.records import LayerRecord, LayerRecords
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted, silent
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

EXACT = "exact"
Needs = Callable[[BlockScorer, LayerRecord, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """What is compared, and on how much text; lengths in tokens."""

    window_tokens: int = 4096
    num_windows: int = 9
    blocks_per_window: int = 8
    layers: tuple[int, ...] = ()  # none: all that have full attention
    untrained_pools: tuple[int, ...] = (2, 4, 16)
    pools: tuple[int, ...] = (4, 16)  # of the residual form
    ranks: tuple[int, ...] = (16, 32, 64)
    # Queries that a low rank scores as one, by their mean or by those that differ most; trained on the most.
    query_pools: tuple[int, ...] = (1, 2, 4)
    # Queries whose mean looks first, and how many blocks it leaves to single queries; with the middle rank.
    two_stages: tuple[tuple[int, int], ...] = ((16, 16), (8, 24))
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
    kl: float | None  # None: a form whose scores are no shares
    density: Mapping[str, float]  # by share of needles missed
    dropped_mass: Mapping[str, float]
    at_density: Mapping[str, AtDensity]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FormSummary:
    """One form over all layers that were looked at: means, by density for what it finds there."""

    form: str
    query_block: int
    dims_per_token: float
    kl: float | None
    need_found: Mapping[str, float]
    dropped_mass: Mapping[str, float]
    needles_missed: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Texts:
    train: LayerRecords
    held_out: LayerRecords
    judged: LayerRecords


@dataclass(frozen=True, slots=True)
class _Form:
    """A way to score blocks: a scorer, and how needs come from it."""

    name: str
    scorer: BlockScorer
    dims_per_token: float
    needs: Needs = query_block_needs
    has_shares: bool = True


def study(
    loaded: LoadedModel,
    corpus: Corpus,
    options: StudyOptions | None = None,
    progress: Progress = silent,
) -> list[StudyRow]:
    """Train every form on the same text and judge all of them, trained and not, on other text."""
    options = options if options is not None else StudyOptions()
    layers = _pick_layers(loaded, options)
    rows: list[StudyRow] = []
    shapes = {index: _shape(layer, options, pool=1) for index, layer in layers.items()}
    texts = _capture(loaded, corpus, shapes, options, progress)
    for index, layer in counted(list(layers.items()), "study layers", progress):
        for form in _forms(layer, texts, options):
            rows += [_judge(index, form, texts.judged[index], options, size) for size in options.query_blocks]
    return rows


def summarise_forms(rows: Sequence[StudyRow]) -> list[FormSummary]:
    """Return each form's means over the layers, for each size of query blocks, in the order of the rows."""
    found = []
    for form, size in dict.fromkeys((row.form, row.query_block) for row in rows):
        mine = [row for row in rows if (row.form, row.query_block) == (form, size)]
        kls = [row.kl for row in mine if row.kl is not None]
        by_density = {share: [row.at_density[share] for row in mine] for share in mine[0].at_density}
        found.append(
            FormSummary(
                form=form,
                query_block=size,
                dims_per_token=fmean(row.dims_per_token for row in mine),
                kl=fmean(kls) if kls else None,
                need_found={share: fmean(at.need_found for at in ats) for share, ats in by_density.items()},
                dropped_mass={
                    share: 1 - fmean(at.mass_recall_mean for at in ats) for share, ats in by_density.items()
                },
                needles_missed={
                    share: fmean(at.needles_missed for at in ats) for share, ats in by_density.items()
                },
            )
        )
    return found


def _pick_layers(loaded: LoadedModel, options: StudyOptions) -> dict[int, LayerInfo]:
    layers = {layer.index: layer for layer in thinnable_layers(loaded.model)}
    for index in options.layers:
        if index not in layers:
            known = ", ".join(map(str, layers))
            raise ValueError(f"layer {index} of {loaded.name} has no full attention; choose from {known}")
    return {index: layers[index] for index in sorted(set(options.layers) or layers)}


def _shape(layer: LayerInfo, options: StudyOptions, *, pool: int) -> ScorerShape:
    return ScorerShape(
        layer.query_heads,
        layer.kv_heads,
        layer.head_dim,
        pool_tokens=pool,
        block_tokens=options.block_tokens,
    )


def _forms(layer: LayerInfo, texts: _Texts, options: StudyOptions) -> Iterator[_Form]:
    """Yield each form, untrained ones first, trained ones right after their training."""
    shape = _shape(layer, options, pool=1)
    yield _Form(EXACT, BlockScorer(shape, layer.scale), float(shape.head_dim))
    yield _Form("local window", BlockScorer(shape, layer.scale), 0.0, needs=local_needs, has_shares=False)
    for pool in dict.fromkeys((*options.untrained_pools, *options.pools)):
        yield _plain(f"untrained means_{pool}", _means(layer, options, pool))
    for name, make in UNTRAINED.items():
        if (other := make(shape, layer.scale)).shape.pool_tokens == 1:  # means have pools of their own
            yield _plain(f"untrained {name}", other)
    train, held_out = texts.train[layer.index], texts.held_out[layer.index]
    for pool in options.pools:
        scorer = _means(layer, options, pool)
        train_scorer(scorer, train, held_out, _training(options, options.learning_rate))
        yield _plain(f"residual, means of {pool}", scorer)
    for rank in options.ranks:
        yield from _low_rank_forms(layer, texts, options, rank)


def _low_rank_forms(layer: LayerInfo, texts: _Texts, options: StudyOptions, rank: int) -> Iterator[_Form]:
    train, held_out = texts.train[layer.index], texts.held_out[layer.index]
    shape = _shape(layer, options, pool=1)
    together = max(options.query_pools)
    scorer = BlockScorer(replace(shape, form="low_rank", rank=rank, query_pool=together), layer.scale)
    train_scorer(scorer, train, held_out, replace(_training(options, 0.0), max_epochs=0))
    yield _plain(f"low rank {rank}, start", scorer.with_query_pool(1))
    train_scorer(scorer, train, held_out, _training(options, options.low_rank_learning_rate))
    for size in options.query_pools:
        as_one = "" if size == 1 else f", {size} queries as one"
        yield _plain(f"low rank {rank}, trained{as_one}", scorer.with_query_pool(size))
        if size in ROW_CHOICES:
            one_of = scorer.with_query_pool(size, "k_center")
            yield _plain(f"low rank {rank}, trained, one of {size} queries", one_of)
    if rank != sorted(options.ranks)[len(options.ranks) // 2]:
        return
    for size, kept in options.two_stages:
        stages = TwoStages(scorer.with_query_pool(size), scorer.with_query_pool(1), kept)
        yield _Form(
            f"low rank {rank}, mean of {size} picks {kept} blocks, then single queries",
            stages.fine,
            stages.dims_per_token(texts.judged[layer.index]),
            needs=stages.needs,
            has_shares=False,
        )


def _means(layer: LayerInfo, options: StudyOptions, pool: int) -> BlockScorer:
    return BlockScorer(_shape(layer, options, pool=pool), layer.scale)


def _plain(name: str, scorer: BlockScorer) -> _Form:
    return _Form(name, scorer, scorer.dims_per_token)


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
    layer: int, form: _Form, records: Sequence[LayerRecord], options: StudyOptions, block_q: int
) -> StudyRow:
    (scored,), asking = score_records(form.scorer, records, (), block_q, score=form.needs)
    density, dropped = {}, {}
    for missed in options.missed_needles:
        found = [
            _at(scored, asking, heads, missed) for heads in _groups(form.scorer.shape)
        ]  # per KV group: (density, dropped mass)
        density[f"{missed:g}"] = max(one for one, _ in found)
        dropped[f"{missed:g}"] = sum(mass for _, mass in found) / len(found)
    return StudyRow(
        layer=layer,
        form=form.name,
        query_block=block_q,
        dims_per_token=form.dims_per_token,
        kl=mean_divergence(partial(divergence, form.scorer), records) if form.has_shares else None,
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
