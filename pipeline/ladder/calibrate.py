"""Calibrate: turn scores into a ladder of rungs, and verify each rung on text that it was not tuned on.

A rung bounds two things per layer, KV group and length bin: the share of *needles* it may miss, and the mean
attention mass it may drop. A needle is a block that holds more than 30% of some row's attention; recall and
most of the perplexity hang on them, while the mean hardly notices one (measured on the pocket model: a rung
with 5% of the mass dropped on average had lost every passkey). The threshold is the largest that keeps both.
Recall questions are rare in running text, so their needles are counted apart, over all lengths.
Where a head would need most blocks to stay within them, its scorer is too coarse for it: the KV group stays
dense, which costs little more and risks nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from sentei.kernels.hf.adapter import Adapter, save_ladder
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.selection import pick_query_block
from sentei.pipeline.ladder.break_even import BreakEven, measure_decode_break_even
from sentei.pipeline.ladder.density import DensityError, fit_densities
from sentei.pipeline.ladder.search import HeldOut, pick_rungs, prefill_speeds
from sentei.pipeline.ladder.targets import RungTarget, candidates_for
from sentei.pipeline.ladder.verify import VerifyOptions, verify_ladder
from sentei.pipeline.measure.capture import Sampling, capture
from sentei.pipeline.measure.needs import (
    MAX_SHARE,
    MIN_SHARE,
    Scored,
    max_head_density,
    needle_threshold,
    score_records,
    scorers_beside_records,
)
from sentei.pipeline.measure.records import LayerRecord, LayerRecords
from sentei.pipeline.measure.scores import pick_positions
from sentei.pipeline.measure.texts import make_texts, make_windows
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, silent
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

NUM_BOUND_STEPS = 24
# Bins of a density: within each, positions differ by half at most, and so do the shares that keep it.
DENSITY_EDGES = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How much held-out text to calibrate on, and the rungs to make."""

    window_tokens: int = 8192
    num_windows: int = 4
    blocks_per_window: int = 32
    bin_edges_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    break_even_tokens: int = 1024
    targets: tuple[RungTarget, ...] = (
        RungTarget("mild", 0.003, 0.15),
        RungTarget("medium", 0.01, 0.25),
        RungTarget("bold", 0.03, 0.40),
    )
    dense_above: float = 0.6
    dense_last_tokens: int = 0  # of a prompt, whose rows keep everything (docs/adr/0027)
    # Rows that choose together; None: what suits the device. A divisor of the adapter's blocks.
    query_block_tokens: int | None = None
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    decode: BreakEven = field(default_factory=BreakEven)  # what times each rung's break-even
    timed_runs: int = 3  # rounds of prefill; timed only where a rung is made for its speed
    seed: int = 1


def calibrate(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: CalibrateOptions | None = None,
    progress: Progress = silent,
) -> Ladder:
    """Fit the ladder on one part of the held-out text and verify it on another; save and return it.

    On a CPU the context length from which each rung's decode steps pay is timed, too, by batch.
    """
    options = options if options is not None else CalibrateOptions()
    window = min(options.window_tokens, loaded.max_tokens)
    parts = split_text(corpus)
    texts = make_texts(
        loaded, parts.calibrate, window_tokens=window, num=options.num_windows, seed=options.seed
    )
    verify = options.verify
    windows = make_windows(
        loaded,
        parts.verify,
        window_tokens=min(verify.window_tokens, loaded.max_tokens),
        num=verify.num_windows,
        seed=verify.seed,
    )
    records = capture(
        loaded,
        texts,
        adapter.manifest.shapes,
        Sampling(options.blocks_per_window, options.seed),
        label="capture calibration text",
        progress=progress,
    )
    scorers = scorers_beside_records(adapter.scorers)
    fitted = adapter.with_ladder(fit_reachable(scorers, records, options, loaded.device.type))
    positions = pick_positions(len(windows[0]), first=verify.first_position, most=verify.max_positions)
    held_out = HeldOut(windows, positions, options.timed_runs)
    if any(target.is_searched for target in options.targets):
        fitted = fitted.with_ladder(pick_rungs(loaded, fitted, options.targets, held_out, progress))
    verified = fitted.with_ladder(verify_ladder(loaded, fitted, windows, verify, progress))
    if any(target.speed is not None for target in options.targets):
        speeds = prefill_speeds(loaded, verified, held_out, progress)
        verified = verified.with_ladder(verified.ladder.with_speeds(speeds))
    ladder = measure_decode_break_even(loaded, verified, windows[0], options.decode, progress)
    if adapter.folder is not None:
        save_ladder(ladder, adapter.folder)
    return ladder


@dataclass(frozen=True, slots=True)
class _Fit:
    """A rung's share thresholds [Hkv, bins] by layer; the mean mass that it may drop, if bounded."""

    shares: Mapping[int, torch.Tensor]
    bound_dropped_mass: float | None


def fit_reachable(
    scorers: Mapping[int, BlockScorer], records: LayerRecords, options: CalibrateOptions, device: str
) -> Ladder:
    """Fit the rungs of all targets that are known now, and the candidates of the others that can be had."""
    known = tuple(target for target in options.targets if not target.is_searched)
    candidates = candidates_for(options.targets)
    while True:
        try:
            return fit_ladder(scorers, records, replace(options, targets=(*known, *candidates)), device)
        except DensityError as error:
            within = tuple(each for each in candidates if (each.density or 0.0) > error.least)
            if len(within) in (0, len(candidates)):
                raise
            candidates = within


def fit_ladder(
    scorers: Mapping[int, BlockScorer], records: LayerRecords, options: CalibrateOptions, device: str
) -> Ladder:
    """Read thresholds off calibration records; they never fall from a milder rung to a bolder one."""
    block_q = options.query_block_tokens or pick_query_block(device)
    bounded = [target for target in options.targets if target.density is None]
    edges = options.bin_edges_tokens
    fits = _fit_bounded(scorers, records, bounded, options, block_q) if bounded else {}
    if len(bounded) < len(options.targets):
        edges = tuple(sorted({*edges, *DENSITY_EDGES}))
        fits = {id_: _spread(fit, options.bin_edges_tokens, edges) for id_, fit in fits.items()}
    for missed in dict.fromkeys(t.missed_needles for t in options.targets if t.density is not None):
        wanted = {
            target.id: target.density
            for target in options.targets
            if target.density is not None and target.missed_needles == missed
        }
        fits |= _fit_by_density(scorers, records, wanted, missed, edges=edges, block_q=block_q)
    rungs = [
        Rung(
            target.id,
            {index: _as_tuples(found) for index, found in fits[target.id].shares.items()},
            bound_dropped_mass=fits[target.id].bound_dropped_mass,
            break_even_tokens=options.break_even_tokens,
            target_density=target.density,
            dense_last_tokens=options.dense_last_tokens,
        )
        for target in options.targets
    ]
    return Ladder((Rung(DENSE), *rungs), edges, block_q)


def _spread(fit: _Fit, coarse: Sequence[int], fine: Sequence[int]) -> _Fit:
    """Give every finer bin the thresholds of the coarser one that it lies in."""
    which = torch.bucketize(torch.tensor([0, *fine]), torch.tensor(coarse), right=True)
    return replace(fit, shares={index: found[:, which] for index, found in fit.shares.items()})


def _fit_by_density(
    scorers: Mapping[int, BlockScorer],
    records: LayerRecords,
    wanted: Mapping[str, float],
    missed: float,
    *,
    edges: Sequence[int],
    block_q: int,
) -> dict[str, _Fit]:
    """Fit rungs to their densities; all of them may miss the same share of what questions ask for."""
    limits = {
        index: _asking_limits(scorer, records[index], missed, block_q) for index, scorer in scorers.items()
    }
    found = fit_densities(scorers, records, list(wanted.values()), block_q=block_q, edges=edges, most=limits)
    return {
        rung_id: _Fit(
            {
                index: torch.minimum(limit[:, None], _fill_empty_bins(fit.shares[None]))
                for index, limit in limits.items()
            },
            None,
        )
        for rung_id, fit in zip(wanted, found, strict=True)
    }


def _fit_bounded(
    scorers: Mapping[int, BlockScorer],
    records: LayerRecords,
    targets: Sequence[RungTarget],
    options: CalibrateOptions,
    block_q: int,
) -> dict[str, _Fit]:
    """Fit rungs to the bounds of their targets, the mildest first."""
    shares: dict[str, dict[int, torch.Tensor]] = {target.id: {} for target in targets}
    for index, scorer in scorers.items():
        bins, asking = score_records(scorer, records[index], options.bin_edges_tokens, block_q)
        floor = torch.zeros(scorer.shape.kv_heads, len(bins))
        for target in targets:
            found = [
                _fit_bin(scored, asking, scorer.shape.kv_heads, target, options.dense_above)
                for scored in bins
            ]
            floor = torch.maximum(floor, _fill_empty_bins(torch.stack(found, dim=1)))
            shares[target.id][index] = floor
    return {target.id: _Fit(shares[target.id], target.bound_dropped_mass) for target in targets}


def _asking_limits(
    scorer: BlockScorer, records: Sequence[LayerRecord], missed: float, block_q: int
) -> torch.Tensor:
    """Return the largest share threshold [Hkv] at which each KV group misses no more of what is asked for."""
    free = torch.full((scorer.shape.kv_heads,), MAX_SHARE)
    asked = [record for record in records if bool(record.is_asking.any())]
    if missed >= 1.0 or not asked:
        return free
    _, asking = score_records(scorer, asked, (), block_q)
    group = scorer.shape.query_heads // scorer.shape.kv_heads
    limits = [
        needle_threshold(asking, slice(h * group, (h + 1) * group), missed)
        for h in range(scorer.shape.kv_heads)
    ]
    return torch.tensor(limits).clamp(MIN_SHARE, MAX_SHARE)


def _fit_bin(
    scored: Scored, asking: Scored, kv_heads: int, target: RungTarget, dense_above: float
) -> torch.Tensor:
    """Return the share threshold of each KV group [Hkv] in one bin; NaN where the bin has no text."""
    if not scored.needs:
        return torch.full((kv_heads,), float("nan"))
    group = scored.needs[0].shape[0] // kv_heads
    shares = []
    for h in range(kv_heads):
        heads = slice(h * group, (h + 1) * group)
        limit = needle_threshold(asking, heads, target.missed_needles) if asking.needs else MAX_SHARE
        shares.append(_fit_group(scored, heads, target, limit=limit, dense_above=dense_above))
    return torch.tensor(shares)


def _fit_group(
    scored: Scored, heads: slice, target: RungTarget, *, limit: float, dense_above: float
) -> float:
    """Return the largest threshold at which a group stays within all bounds, or 0 where it stays dense."""
    share = min(limit, needle_threshold(scored, heads, target.missed_needles))
    share = min(MAX_SHARE, max(MIN_SHARE, share))
    if max_head_density(scored, heads, share) > dense_above:
        return 0.0
    for _ in range(NUM_BOUND_STEPS):
        if share <= MIN_SHARE or scored.dropped(heads, share).mean() <= target.bound_dropped_mass:
            break
        share *= 0.7
    return max(share, MIN_SHARE)


def _fill_empty_bins(shares: torch.Tensor) -> torch.Tensor:
    """Give a bin without text the threshold of the nearest shorter bin with some, else of the next longer."""
    filled = shares.clone()
    known = [b for b in range(shares.shape[1]) if not bool(torch.isnan(shares[:, b]).any())]
    for b in range(shares.shape[1]):
        if b not in known:
            shorter = [other for other in known if other < b]
            filled[:, b] = shares[:, shorter[-1] if shorter else known[0]]
    return filled


def _as_tuples(shares: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in group) for group in shares)
