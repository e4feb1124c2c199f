"""Evaluate: every rung against dense and against simpler choices of blocks, on untouched text."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from math import expm1
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.models import rotary_table
from sentei.pipeline.evaluation.costs import CostReport, Measured, reckon_costs, this_machine
from sentei.pipeline.evaluation.prices import PRICES_FILE, load_prices
from sentei.pipeline.evaluation.recall import (
    TASK_NAMES,
    RecallSummary,
    TaskPlan,
    make_tasks,
    recall_by_rung,
)
from sentei.pipeline.evaluation.user_tasks import UserAnswer, UserSummary, answers_by_rung, summarise
from sentei.pipeline.measure.baselines import KINDS, RankSelector
from sentei.pipeline.measure.capture import Sampling
from sentei.pipeline.measure.latency import BEST_DENSE, DENSE_FORMS, Timing, time_prefills
from sentei.pipeline.measure.memory import prefill_peaks
from sentei.pipeline.measure.needs import dropped_by_rung
from sentei.pipeline.measure.rungs import Variant, run_each, rung_variants
from sentei.pipeline.measure.scores import (
    TokenScores,
    agreement,
    hidden_at,
    join_scores,
    paired_delta,
    pick_positions,
    score_variants,
)
from sentei.pipeline.measure.texts import make_windows
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, silent
from sentei.pipeline.tasks.prompt import TaskError, TaskName
from sentei.pipeline.tasks.user import UserTask, load_user_tasks
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

NUM_POSITION_BINS = 4
ANSWER_ROOM_TOKENS = 64  # positions that a recall task leaves for its answer


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How much to measure; every length in tokens."""

    window_tokens: int = 8192
    num_windows: int = 2
    max_positions: int = 2048
    blocks_per_window: int = 24
    task_kinds: tuple[TaskName, ...] = TASK_NAMES
    task_lengths: tuple[int, ...] = ()  # none: a quarter of the window, and all of it
    num_tasks: int = 3  # of each kind at each length, the notes at as many depths
    timed_runs: int = 3
    warm_up_tokens: int | None = None  # of the round before the timed ones; None: the whole window
    dense_forms: tuple[str, ...] = DENSE_FORMS  # timed beside the rungs, our own among them
    first_position: int | None = None  # of the judged ones; none: an eighth of the window
    # Rungs at whose density other choices of blocks are judged; None: the boldest; an empty tuple: none.
    baseline_rungs: tuple[str, ...] | None = None
    user_tasks: Path | None = None
    prices: Path | None = None  # a list of the user's own, on top of the shipped one
    setup_s: float | None = None  # what calibrating took; distilling is in the adapter's manifest
    seed: int = 3

    def task_plan(self, window_tokens: int, max_tokens: int) -> TaskPlan:
        """Return which recall tasks to run on a model of `max_tokens` positions; answers need room, too."""
        longest = max_tokens - ANSWER_ROOM_TOKENS
        for length in self.task_lengths:
            if length > longest:
                raise TaskError(
                    f"a task length is {length}; this model has {max_tokens} positions, so at most {longest}"
                )
        lengths = self.task_lengths or (window_tokens // 4, min(window_tokens, longest))
        return TaskPlan(self.task_kinds, tuple(dict.fromkeys(lengths)), self.num_tasks, self.seed)

    def judged_from(self, window_tokens: int) -> int:
        """Return the first position whose next token is judged."""
        return window_tokens // 8 if self.first_position is None else self.first_position


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
    kl_mean: float  # nats per token, dense against this rung on the same text
    kl_p99: float
    top1_agreement: float
    dropped_mass_mean: float
    dropped_mass_p99: float
    prefill_s: float
    prefill_s_range: tuple[float, float]
    prefill_s_by_baseline: dict[str, float]
    peak_mib: float | None  # that one prefill adds at its peak; None: this machine cannot say
    tasks: dict[str, float]  # share of right answers per kind, over all lengths
    recall: RecallSummary
    user_tasks: UserSummary | None
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
    kl_mean: float  # nats per token from dense, and by how much that is more than ours
    kl_more_than_ours: float
    kl_more_than_ours_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one evaluation."""

    model: str
    window_tokens: int
    num_windows: int
    num_tasks: int
    rungs: tuple[RungResult, ...]
    costs: CostReport
    baselines: tuple[BaselineResult, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    user_answers: Mapping[str, Sequence[UserAnswer]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the answers themselves are left to a file of their own."""
        document = asdict(self)
        del document["user_answers"]
        return document


@dataclass(frozen=True, slots=True)
class _Losses:
    """Scores per variant over the same tokens, and the density that each variant ran at."""

    by_variant: Mapping[str, TokenScores]
    density: Mapping[str, float]
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Findings:
    """Everything that was measured, before it is told rung by rung."""

    losses: _Losses
    dropped: Mapping[str, tuple[float, float]]
    timings: Mapping[str, Timing]
    peaks: Mapping[str, float]
    recall: Mapping[str, RecallSummary]
    user: Mapping[str, UserSummary]
    costs: CostReport


def evaluate(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: EvaluateOptions | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure quality, recall, speed, memory and price of every rung on evaluation text."""
    options = options if options is not None else EvaluateOptions()
    started = time.monotonic()
    prices = load_prices(options.prices)
    own_tasks = _load_own(loaded, options)
    documents = split_text(corpus).evaluate
    window = min(options.window_tokens, loaded.max_tokens)
    texts = make_windows(loaded, documents, window_tokens=window, num=options.num_windows, seed=options.seed)
    tasks = make_tasks(loaded, documents, options.task_plan(window, loaded.max_tokens))
    recall = recall_by_rung(loaded, adapter, tasks, progress)
    answers = answers_by_rung(loaded, adapter, own_tasks, progress) if own_tasks else {}
    user = {rung_id: summarise(own_tasks, found, answers[DENSE]) for rung_id, found in answers.items()}
    losses = _measure_losses(loaded, adapter, texts, options, progress)
    sampling = Sampling(options.blocks_per_window, options.seed)
    dropped = dropped_by_rung(loaded, adapter, texts, sampling, progress)
    timings = time_prefills(
        loaded,
        adapter,
        texts[0],
        runs=options.timed_runs,
        progress=progress,
        dense=options.dense_forms,
        warm_up_tokens=options.warm_up_tokens,
    )
    peaks = prefill_peaks(loaded, adapter, texts[0], runs=options.timed_runs, progress=progress)
    prefill_s = {rung.id: _timing(timings, rung.id).median_s for rung in adapter.ladder.rungs}
    setup_s = _setup_s(adapter, options) + time.monotonic() - started
    costs = reckon_costs(prices, Measured(prefill_s, window, setup_s, this_machine(loaded)))
    findings = _Findings(losses, dropped, timings, peaks, recall, user, costs)
    return Evaluation(
        model=loaded.name,
        window_tokens=window,
        num_windows=options.num_windows,
        num_tasks=options.num_tasks,
        rungs=tuple(_rung_result(rung.id, findings) for rung in adapter.ladder.rungs),
        costs=costs,
        baselines=_baseline_results(losses, _compared(adapter, options)),
        notes=_notes(findings, window),
        user_answers=answers,
    )


def evaluate_recall(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: EvaluateOptions | None = None,
    progress: Progress = silent,
) -> dict[str, RecallSummary]:
    """Run the recall tasks alone, as `evaluate` does, and return what each rung found."""
    options = options if options is not None else EvaluateOptions()
    plan = options.task_plan(min(options.window_tokens, loaded.max_tokens), loaded.max_tokens)
    tasks = make_tasks(loaded, split_text(corpus).evaluate, plan)
    return recall_by_rung(loaded, adapter, tasks, progress)


def _load_own(loaded: LoadedModel, options: EvaluateOptions) -> tuple[UserTask, ...]:
    if options.user_tasks is None:
        return ()
    return load_user_tasks(options.user_tasks, loaded.tokenizer, loaded.max_tokens)


def _setup_s(adapter: Adapter, options: EvaluateOptions) -> float:
    return adapter.manifest.figures.get("distill_s", 0.0) + (options.setup_s or 0.0)


def _timing(timings: Mapping[str, Timing], rung_id: str) -> Timing:
    return timings[BEST_DENSE if rung_id == DENSE else rung_id]


def _notes(findings: _Findings, window: int) -> tuple[str, ...]:
    own = [file for file in findings.costs.files if file != str(PRICES_FILE)]
    lists = ", ".join(["the list that ships", *own])
    notes = [f"prices from {lists}: {window} tokens of prefill, one request at a time"]
    if not findings.peaks:
        notes.append("memory is left out: this platform cannot give freed memory back, so no peak is its own")
    if cells := findings.recall[DENSE].untold():
        notes.append(
            f"dense itself finds nothing in {', '.join(cells)}: these tasks say nothing about a rung"
        )
    short = {
        rung_id: sum(task.num_untouched for task in summary.tasks)
        for rung_id, summary in findings.user.items()
        if rung_id != DENSE
    }
    if any(short.values()):
        counts = ", ".join(f"{num} on {rung_id}" for rung_id, num in short.items() if num)
        notes.append(f"your prompts on which nothing was dropped, as too short to thin: {counts}")
    return tuple(notes)


def _measure_losses(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    options: EvaluateOptions,
    progress: Progress,
) -> _Losses:
    length = len(texts[0])
    positions = pick_positions(length, first=options.judged_from(length), most=options.max_positions)
    variants = [*rung_variants(adapter), *_other_choices(loaded, adapter, options, length)]
    found: dict[str, list[TokenScores]] = {variant.name: [] for variant in variants}
    densities: dict[str, list[float]] = {variant.name: [] for variant in variants}
    states = partial(hidden_at, loaded, positions=positions)
    turns = run_each(loaded, adapter, texts, states, variants=variants, label="losses", progress=progress)
    with closing(turns):
        for text, runs in turns:
            hidden = {name: run.result for name, run in runs.items()}
            for name, scores in score_variants(loaded, text, positions, hidden, DENSE).items():
                found[name].append(scores)
                densities[name].append(runs[name].density)
    return _Losses(
        {name: join_scores(scores) for name, scores in found.items()},
        {name: fmean(values) for name, values in densities.items()},
        positions.repeat(len(texts)),
    )


def _other_choices(
    loaded: LoadedModel, adapter: Adapter, options: EvaluateOptions, length: int
) -> list[Variant]:
    """Return other ways to choose blocks, each at the density of a rung that it is compared with."""
    make = partial(
        RankSelector,
        shapes=adapter.manifest.shapes,
        table=rotary_table(loaded.model, length, loaded.device),
        block_q=adapter.ladder.query_block_tokens,
    )
    return [
        Variant(_other(kind, rung_id), adapter.ladder.find(rung_id).id, chooser=partial(make, kind))
        for rung_id in _compared(adapter, options)
        for kind in KINDS
    ]


def _rung_result(rung_id: str, findings: _Findings) -> RungResult:
    losses, timings = findings.losses, findings.timings
    own, dense = losses.by_variant[rung_id], losses.by_variant[DENSE]
    delta, near = paired_delta(own.loss, dense.loss), agreement(own)
    timing, recall = _timing(timings, rung_id), findings.recall[rung_id]
    dropped = findings.dropped.get(rung_id, (0.0, 0.0))
    return RungResult(
        rung=rung_id,
        density=losses.density[rung_id],
        nll=float(own.loss.mean()),
        nll_delta=delta.mean,
        nll_delta_ci=delta.ci,
        nll_delta_by_position=_by_position(own.loss - dense.loss, losses.positions),
        ppl_cost_pct=100 * expm1(delta.mean),
        kl_mean=near.kl_mean,
        kl_p99=near.kl_p99,
        top1_agreement=near.top1_agreement,
        dropped_mass_mean=dropped[0],
        dropped_mass_p99=dropped[1],
        prefill_s=timing.median_s,
        prefill_s_range=(timing.lowest_s, timing.highest_s),
        prefill_s_by_baseline={name: timings[name].median_s for name in DENSE_FORMS if name in timings},
        peak_mib=findings.peaks.get(rung_id),
        tasks=recall.by_kind(),
        recall=recall,
        user_tasks=findings.user.get(rung_id),
        usd_per_million_tokens=findings.costs.usd_by_machine(rung_id),
    )


def _by_position(delta: torch.Tensor, positions: torch.Tensor) -> dict[str, float]:
    edges = torch.linspace(float(positions.min()), float(positions.max()) + 1, NUM_POSITION_BINS + 1)
    result = {}
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = (positions >= low) & (positions < high)
        result[f"{int(low)}-{int(high)}"] = float(delta[inside].mean())
    return result


def _compared(adapter: Adapter, options: EvaluateOptions) -> tuple[str, ...]:
    """Rungs that other choices of blocks are measured at."""
    boldest = adapter.ladder.rungs[-1]
    if options.baseline_rungs is None:
        return () if boldest.is_dense else (boldest.id,)
    return options.baseline_rungs


def _other(kind: str, rung_id: str) -> str:
    """Name the losses of another choice of blocks at a rung's density."""
    return f"{kind} at {rung_id}"


def _baseline_results(losses: _Losses, rung_ids: Sequence[str]) -> tuple[BaselineResult, ...]:
    dense = losses.by_variant[DENSE]
    results = []
    for rung_id in rung_ids:
        ours = losses.by_variant[rung_id]
        for kind in KINDS:
            name = _other(kind, rung_id)
            theirs = losses.by_variant[name]
            cost, gap = paired_delta(theirs.loss, dense.loss), paired_delta(theirs.loss, ours.loss)
            farther = paired_delta(theirs.kl, ours.kl)
            results.append(
                BaselineResult(
                    kind,
                    rung_id,
                    losses.density[name],
                    cost.mean,
                    cost.ci,
                    gap.mean,
                    gap.ci,
                    float(theirs.kl.mean()),
                    farther.mean,
                    farther.ci,
                )
            )
    return tuple(results)
