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
from typing import Any

import torch

from sentei.kernels.hf.adapter import Adapter, save_ladder
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung, Verified
from sentei.kernels.hf.models import rotary_table
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.selection import pick_query_block
from sentei.pipeline.ladder.density import MAX_SHARE, MIN_SHARE, fit_densities
from sentei.pipeline.ladder.needs import (
    Scored,
    dropped_rows,
    max_head_density,
    needle_threshold,
    score_asking,
    score_bins,
)
from sentei.pipeline.ladder.verify import VerifyOptions, verify_ladder
from sentei.pipeline.measure.capture import capture
from sentei.pipeline.measure.records import LayerRecord, LayerRecords
from sentei.pipeline.measure.texts import make_texts
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

NUM_BOUND_STEPS = 24
# Bins of a density: within each, positions differ by half at most, and so do the shares that keep it.
DENSITY_EDGES = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576)


@dataclass(frozen=True, slots=True)
class RungTarget:
    """What a rung may cost in any KV group: missed needles (a share), mean dropped mass; or its density.

    With a density, `missed_needles` is asked of questions about notes alone, and the mass is not bounded.
    """

    id: str
    missed_needles: float = 1.0
    bound_dropped_mass: float = 1.0
    density: float | None = None  # of the causal blocks


def density_targets(densities: Sequence[float], missed_needles: float = 1.0) -> tuple[RungTarget, ...]:
    """Return one rung per density, the densest first, named after it: d50, d20, d10."""
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density {density:g} is no share of the blocks; give one above 0, at most 1")
    ordered = sorted(set(densities), reverse=True)
    return tuple(RungTarget(f"d{100 * density:g}", missed_needles, density=density) for density in ordered)


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
    # Rows that choose together; None: what suits the device. A divisor of the adapter's blocks.
    query_block_tokens: int | None = None
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    seed: int = 1


def calibrate(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: CalibrateOptions | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> Ladder:
    """Fit the ladder on one part of the held-out text and verify it on another; save and return it."""
    options = options if options is not None else CalibrateOptions()
    window = min(options.window_tokens, loaded.max_tokens)
    parts = split_text(corpus)
    texts = make_texts(
        loaded, parts.calibrate, window_tokens=window, num=options.num_windows, seed=options.seed
    )
    records = capture(
        loaded,
        texts,
        dict(adapter.manifest.shapes),
        blocks_per_text=options.blocks_per_window,
        seed=options.seed,
        progress=progress,
        label="capture calibration text",
    )
    ladder = fit_ladder(adapter, loaded, records, options)
    verified = verify_ladder(loaded, adapter.with_ladder(ladder), parts.verify, options.verify, progress)
    ladder = replace(
        ladder, rungs=tuple(_with_verified(rung, verified.get(rung.id)) for rung in ladder.rungs)
    )
    if adapter.folder is not None:
        save_ladder(ladder, adapter.folder)
    return ladder


def fit_ladder(
    adapter: Adapter, loaded: LoadedModel, records: LayerRecords, options: CalibrateOptions
) -> Ladder:
    """Read thresholds off calibration records; they never fall from a milder rung to a bolder one."""
    longest = max(record.mass.shape[-1] * record.mass.shape[3] for record in next(iter(records.values())))
    table = rotary_table(loaded.model, longest)
    block_q = options.query_block_tokens or pick_query_block(next(loaded.model.parameters()).device.type)
    bounded = [target for target in options.targets if target.density is None]
    edges = options.bin_edges_tokens
    shares = _fit_bounded(adapter.scorers, records, table, bounded, options, block_q) if bounded else {}
    if len(bounded) < len(options.targets):
        edges = tuple(sorted({*edges, *DENSITY_EDGES}))
        shares = _spread(shares, options.bin_edges_tokens, edges)
        shares |= _fit_by_density(adapter.scorers, records, table, options, block_q, edges)
    rungs = [
        Rung(
            target.id,
            {index: _as_tuples(found) for index, found in shares[target.id].items()},
            bound_dropped_mass=target.bound_dropped_mass if target.density is None else None,
            break_even_tokens=options.break_even_tokens,
            target_density=target.density,
        )
        for target in options.targets
    ]
    return Ladder((Rung(DENSE), *rungs), edges, block_q)


def _with_verified(rung: Rung, verified: Verified | None) -> Rung:
    """Return the rung with what was verified; past the longest length of it, dense will run."""
    if verified is None:
        return rung
    return replace(rung, verified=verified, verified_tokens=verified.by_length[-1].tokens)


def _spread(
    shares: Mapping[str, Mapping[int, torch.Tensor]], coarse: Sequence[int], fine: Sequence[int]
) -> dict[str, dict[int, torch.Tensor]]:
    """Give every finer bin the thresholds of the coarser one that it lies in."""
    firsts = torch.tensor([0, *fine])
    which = torch.bucketize(firsts, torch.tensor(coarse), right=True)
    return {
        rung: {index: found[:, which] for index, found in by_layer.items()}
        for rung, by_layer in shares.items()
    }


def _fit_by_density(
    scorers: Mapping[int, BlockScorer],
    records: LayerRecords,
    table: RotaryTable,
    options: CalibrateOptions,
    block_q: int,
    edges: Sequence[int],
) -> dict[str, dict[int, torch.Tensor]]:
    """Return share thresholds [KV groups, bins] per rung and layer that keep its density in each bin."""
    shares: dict[str, dict[int, torch.Tensor]] = {}
    targets = [target for target in options.targets if target.density is not None]
    for missed in dict.fromkeys(target.missed_needles for target in targets):
        limits = {
            index: _asking_limits(scorer, records[index], table, missed, block_q)
            for index, scorer in scorers.items()
        }
        wanted = {t.id: t.density for t in targets if t.missed_needles == missed and t.density is not None}
        fits = fit_densities(
            scorers, records, table, list(wanted.values()), block_q=block_q, edges=edges, most=limits
        )
        for rung_id, fit in zip(wanted, fits, strict=True):
            by_bin = _fill_empty_bins(fit.shares[None])
            shares[rung_id] = {
                index: torch.minimum(limit[:, None], by_bin) for index, limit in limits.items()
            }
    return shares


def _fit_bounded(
    scorers: Mapping[int, BlockScorer],
    records: LayerRecords,
    table: RotaryTable,
    targets: Sequence[RungTarget],
    options: CalibrateOptions,
    block_q: int,
) -> dict[str, dict[int, torch.Tensor]]:
    """Return share thresholds [KV groups, bins] per rung and layer that keep the bounds of each target."""
    shares: dict[str, dict[int, torch.Tensor]] = {target.id: {} for target in targets}
    for index, scorer in scorers.items():
        bins = score_bins(scorer, records[index], table, options.bin_edges_tokens, block_q)
        asking = score_asking(scorer, records[index], table, block_q)
        floor = torch.zeros(scorer.shape.kv_heads, len(bins))
        for target in targets:
            found = torch.stack(
                [
                    _fit_bin(scored, asking, scorer.shape.kv_heads, target, options.dense_above)
                    for scored in bins
                ],
                dim=1,
            )
            floor = torch.maximum(floor, _fill_empty_bins(found))
            shares[target.id][index] = floor
    return shares


def _asking_limits(
    scorer: BlockScorer, records: Sequence[LayerRecord], table: RotaryTable, missed: float, block_q: int
) -> torch.Tensor:
    """Return the largest share threshold [Hkv] at which each KV group misses no more of what is asked for."""
    free = torch.full((scorer.shape.kv_heads,), MAX_SHARE)
    if missed >= 1.0:
        return free
    asking = score_asking(scorer, records, table, block_q)
    if not asking.needs:
        return free
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
        if share <= MIN_SHARE or dropped_rows(scored, heads, share).mean() <= target.bound_dropped_mass:
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


def ladder_summary(ladder: Ladder) -> list[Mapping[str, Any]]:
    """Return one plain row per calibrated rung, for tables and trackers."""
    return [
        {
            "rung": rung.id,
            "bound_dropped_mass": rung.bound_dropped_mass,
            "target_density": rung.target_density,
            "is_kept": rung.is_kept,
            "verified": rung.verified,
        }
        for rung in ladder.rungs
        if not rung.is_dense
    ]
