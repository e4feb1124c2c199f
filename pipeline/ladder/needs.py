"""What query blocks need, by the scorer and in truth: how much is missed or dropped at a threshold.

A needle is a block that holds more than 30% of some row's attention (docs/adr/0003).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer
from sentei.pipeline.ladder.density import MAX_SHARE
from sentei.pipeline.measure.capture import by_query_block, row_shares
from sentei.pipeline.measure.records import LayerRecord

NEEDLE_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Scored:
    """One layer's scores and truth for the query blocks of one length bin, over all records."""

    needs: list[torch.Tensor]  # per record [Hq, n, blocks]: neediest row's log share, -inf where closed
    mass: list[torch.Tensor]  # per record [Hq, n, rows, blocks]: true share, 0 where closed


@dataclass(frozen=True, slots=True)
class AtDensity:
    """What a form finds at a given density: shares of the attention that rows truly pay."""

    mass_recall_mean: float
    mass_recall_p5: float  # 5th percentile over rows
    mass_recall_worst_head: float
    needles_missed: float


@torch.no_grad()
def score_bins(
    scorer: BlockScorer,
    records: Sequence[LayerRecord],
    table: RotaryTable,
    edges: Sequence[int],
    block_q: int,
) -> list[Scored]:
    """Score every record and sort its query blocks of `block_q` rows into length bins."""
    bins = [Scored([], []) for _ in range(len(edges) + 1)]
    for record in records:
        which = torch.bucketize(record.starts, torch.tensor(edges), right=True)
        parts = [(scored, which == b) for b, scored in enumerate(bins)]
        _score_into(parts, scorer, record, table, block_q)
    return bins


@torch.no_grad()
def score_asking(
    scorer: BlockScorer, records: Sequence[LayerRecord], table: RotaryTable, block_q: int
) -> Scored:
    """Score the query blocks that ask for notes, whatever their length."""
    asking = Scored([], [])
    for record in records:
        _score_into([(asking, record.is_asking)], scorer, record, table, block_q)
    return asking


def _score_into(
    parts: Sequence[tuple[Scored, torch.Tensor]],
    scorer: BlockScorer,
    record: LayerRecord,
    table: RotaryTable,
    block_q: int,
) -> None:
    shares, _ = row_shares(scorer, record, table)
    mass = record.mass[0].float() * record.is_open[None, :, None, :]
    for scored, inside in parts:
        if bool(inside.any()):
            scored.needs.append(by_query_block(shares[0][:, inside], block_q).amax(dim=2))
            scored.mass.append(by_query_block(mass[:, inside], block_q))


def needle_threshold(scored: Scored, heads: slice, missed: float) -> float:
    """Return the threshold below which a share `missed` of the needles' mass lies."""
    needs = torch.cat([needs[heads].flatten() for needs in scored.needs])
    weights = torch.cat(
        [(mass[heads] * (mass[heads] > NEEDLE_SHARE)).sum(dim=2).flatten() for mass in scored.mass]
    )
    is_needle = weights > 0
    if not bool(is_needle.any()):
        return MAX_SHARE
    order = needs[is_needle].argsort()
    lost = weights[is_needle][order].cumsum(0) / weights.sum()
    first_kept = int((lost <= missed).sum())
    ranked = needs[is_needle][order]
    # A block passes if its share exceeds the threshold, so the threshold lies just below the first one kept.
    return float(ranked[min(first_kept, len(ranked) - 1)].exp()) * (1 - 1e-4)


def max_head_density(scored: Scored, heads: slice, share: float) -> float:
    """Return the largest share of its open blocks that any of the heads keeps at a threshold."""
    log_share = torch.tensor(share).log()
    kept = torch.stack([(needs[heads] > log_share).sum(dim=(1, 2)) for needs in scored.needs]).sum(dim=0)
    num_open = sum(int(torch.isfinite(needs[heads.start]).sum()) for needs in scored.needs)
    return float(kept.max()) / max(1, num_open)


def dropped_rows(scored: Scored, heads: slice, share: float) -> torch.Tensor:
    """Return the true mass that each row of some heads would lose under a share threshold."""
    log_share = torch.tensor(share).log()
    return torch.cat(
        [
            (mass[heads] * (needs[heads] <= log_share)[:, :, None, :]).sum(dim=-1).flatten()
            for needs, mass in zip(scored.needs, scored.mass, strict=True)
        ]
    )


def at_density(scored: Scored, density: float) -> AtDensity:
    """Keep a layer's best-scored blocks up to a density, one threshold for all heads; see what they hold."""
    ranked = torch.cat([needs[torch.isfinite(needs)] for needs in scored.needs]).sort(descending=True).values
    share = float(ranked[min(round(density * len(ranked)), len(ranked) - 1)].exp())
    heads = range(scored.needs[0].shape[0])
    found = torch.stack([1 - dropped_rows(scored, slice(head, head + 1), share) for head in heads])
    needles = [(mass * (mass > NEEDLE_SHARE)).sum(dim=2) for mass in scored.mass]
    missed = sum(
        float(weight[needs <= math.log(share)].sum())
        for weight, needs in zip(needles, scored.needs, strict=True)
    )
    rank = max(1, round(0.05 * found.numel()))
    return AtDensity(
        mass_recall_mean=float(found.mean()),
        mass_recall_p5=float(found.flatten().kthvalue(rank).values),
        mass_recall_worst_head=float(found.mean(dim=1).min()),
        needles_missed=missed / max(1e-9, sum(float(weight.sum()) for weight in needles)),
    )
