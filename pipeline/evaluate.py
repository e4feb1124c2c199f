"""Evaluate: every rung against dense and against simpler choices of blocks, on untouched text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import expm1
from pathlib import Path
from typing import Any

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.models import rotary_tables
from sentei.kernels.hf.retrofit import retrofit
from sentei.kernels.scorer.features import RotaryTable
from sentei.pipeline.baselines import KINDS, RankSelector
from sentei.pipeline.capture import Progress
from sentei.pipeline.corpus import Corpus
from sentei.pipeline.costs import PRICES_FILE, load_prices, price_rows
from sentei.pipeline.latency import BEST_DENSE, Timing, medians, time_prefills
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.recall import make_tasks, recall_by_rung
from sentei.pipeline.splits import split_text
from sentei.pipeline.verify import (
    VerifyOptions,
    dropped_by_rung,
    make_windows,
    paired_delta,
    pick_positions,
    token_losses,
)

NUM_POSITION_BINS = 4


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How much to measure; every length in tokens."""

    window_tokens: int = 8192
    num_windows: int = 2
    max_positions: int = 2048
    blocks_per_window: int = 24
    num_tasks: int = 4
    timed_runs: int = 3
    baseline_rung: str = "bold"
    with_baselines: bool = True
    prices: Path = PRICES_FILE
    seed: int = 3

    def verify_options(self, window_tokens: int) -> VerifyOptions:
        """Return the same amounts in the terms of the verification."""
        return VerifyOptions(
            window_tokens=window_tokens,
            num_windows=self.num_windows,
            max_positions=self.max_positions,
            first_position=window_tokens // 8,
            blocks_per_window=self.blocks_per_window,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class RungResult:
    """One rung's figures; differences are against dense on the same tokens."""

    rung: str
    density: float
    nll: float
    nll_delta: float
    nll_delta_ci: tuple[float, float]
    nll_delta_by_position: dict[str, float]
    ppl_cost_pct: float
    dropped_mass_mean: float
    dropped_mass_p99: float
    prefill_s: float
    prefill_s_range: tuple[float, float]
    prefill_s_by_baseline: dict[str, float]
    peak_mib: float
    tasks: dict[str, float]
    usd_per_million_tokens: dict[str, float]


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """Another way to choose blocks, at the density of the rung it is compared with."""

    kind: str
    rung: str
    density: float
    nll_delta: float
    nll_delta_ci: tuple[float, float]
    worse_than_ours: float
    worse_than_ours_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one evaluation."""

    model: str
    window_tokens: int
    num_windows: int
    num_tasks: int
    rungs: tuple[RungResult, ...]
    baselines: tuple[BaselineResult, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Losses:
    """Losses per variant over the same tokens, and the density that each variant ran at."""

    by_variant: Mapping[str, torch.Tensor]
    density: Mapping[str, float]
    positions: torch.Tensor


def evaluate(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: EvaluateOptions | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> Evaluation:
    """Measure quality, recall, speed, memory and price of every rung on evaluation text."""
    options = options if options is not None else EvaluateOptions()
    prices = load_prices(options.prices)
    documents = split_text(corpus).evaluate
    window = min(options.window_tokens, loaded.max_tokens)
    verify = options.verify_options(window)
    texts = make_windows(loaded, documents, window_tokens=window, num=options.num_windows, seed=options.seed)
    losses = _measure_losses(loaded, adapter, texts, options, progress)
    dropped = dropped_by_rung(loaded, adapter, texts, verify, progress)
    tasks = make_tasks(loaded, documents, prompt_tokens=window, num=options.num_tasks, seed=options.seed)
    recall = recall_by_rung(loaded, adapter, tasks, progress)
    timings = time_prefills(loaded, adapter, texts[0], runs=options.timed_runs, progress=progress)
    rungs = tuple(
        _rung_result(
            rung.id,
            losses,
            dropped.get(rung.id, (0.0, 0.0)),
            timings,
            recall[rung.id],
            lambda seconds: price_rows(prices, seconds, window),
        )
        for rung in adapter.ladder.rungs
    )
    return Evaluation(
        model=loaded.name,
        window_tokens=window,
        num_windows=options.num_windows,
        num_tasks=options.num_tasks,
        rungs=rungs,
        baselines=_baseline_results(losses, options.baseline_rung),
        notes=(f"prices from {options.prices.name}: {window} tokens of prefill, one request at a time",),
    )


def _measure_losses(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    options: EvaluateOptions,
    progress: Progress,
) -> _Losses:
    positions = pick_positions(len(texts[0]), options.verify_options(len(texts[0])))
    table = RotaryTable(*rotary_tables(loaded.model, len(texts[0]), torch.device("cpu")))
    found: dict[str, list[torch.Tensor]] = {}
    densities: dict[str, list[float]] = {}
    kinds = KINDS if options.with_baselines else ()
    variants = [*(rung.id for rung in adapter.ladder.rungs), *kinds]
    with retrofit(loaded.model, adapter, DENSE, base="flex") as handle:
        for i_text, text in enumerate(texts):
            by_group: dict[int, tuple[float, ...]] = {}
            for i_variant, variant in enumerate(variants):
                progress("losses", i_text * len(variants) + i_variant, len(texts) * len(variants))
                handle.set_rung(options.baseline_rung if variant in kinds else variant)
                handle.set_selector(
                    RankSelector(variant, by_group, adapter.manifest.shapes, table)
                    if variant in kinds
                    else None
                )
                handle.reset_stats()
                found.setdefault(variant, []).append(token_losses(loaded, text, positions))
                density = handle.stats().density()
                densities.setdefault(variant, []).append(1.0 if density is None else density)
                if variant == options.baseline_rung:
                    by_group = handle.stats().density_by_group()
    progress("losses", len(texts) * len(variants), len(texts) * len(variants))
    return _Losses(
        {variant: torch.cat(values) for variant, values in found.items()},
        {variant: sum(values) / len(values) for variant, values in densities.items()},
        positions.repeat(len(texts)),
    )


def _rung_result(
    rung_id: str,
    losses: _Losses,
    dropped: tuple[float, float],
    timings: Mapping[str, Timing],
    recall: dict[str, float],
    prices: Any,
) -> RungResult:
    own, dense = losses.by_variant[rung_id], losses.by_variant[DENSE]
    delta = paired_delta(own, dense)
    timing = timings[BEST_DENSE if rung_id == DENSE else rung_id]
    return RungResult(
        rung=rung_id,
        density=losses.density[rung_id],
        nll=float(own.mean()),
        nll_delta=delta.mean,
        nll_delta_ci=delta.ci,
        nll_delta_by_position=_by_position(own - dense, losses.positions),
        ppl_cost_pct=100 * expm1(delta.mean),
        dropped_mass_mean=dropped[0],
        dropped_mass_p99=dropped[1],
        prefill_s=timing.median_s,
        prefill_s_range=(timing.lowest_s, timing.highest_s),
        prefill_s_by_baseline=medians(timings),
        peak_mib=timing.peak_mib,
        tasks=recall,
        usd_per_million_tokens=prices(timing.median_s),
    )


def _by_position(delta: torch.Tensor, positions: torch.Tensor) -> dict[str, float]:
    edges = torch.linspace(float(positions.min()), float(positions.max()) + 1, NUM_POSITION_BINS + 1)
    result = {}
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = (positions >= low) & (positions < high)
        result[f"{int(low)}-{int(high)}"] = float(delta[inside].mean())
    return result


def _baseline_results(losses: _Losses, rung_id: str) -> tuple[BaselineResult, ...]:
    ours, dense = losses.by_variant[rung_id], losses.by_variant[DENSE]
    results = []
    for kind in KINDS:
        if kind not in losses.by_variant:
            continue
        theirs = losses.by_variant[kind]
        cost, gap = paired_delta(theirs, dense), paired_delta(theirs, ours)
        results.append(
            BaselineResult(kind, rung_id, losses.density[kind], cost.mean, cost.ci, gap.mean, gap.ci)
        )
    return tuple(results)
