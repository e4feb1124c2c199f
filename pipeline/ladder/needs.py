"""What query blocks need, by the scorer and in truth: how much is missed or dropped at a threshold.

A needle is a block that holds more than 30% of some row's attention (docs/adr/0003).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.scorer.network import BlockScorer
from sentei.pipeline.ladder.density import MAX_SHARE
from sentei.pipeline.measure.capture import LayerRecord, query_block_needs
from sentei.pipeline.measure.dropped import dropped_rows

NEEDLE_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Scored:
    """One layer's scores and truth for the query blocks of one length bin, over all records."""

    needs: list[torch.Tensor]  # per record [Hq, n, blocks]: neediest row's log share, -inf where closed
    mass: list[torch.Tensor]  # per record [Hq, n, rows, blocks]: true share, 0 where closed

    def dropped(self, heads: slice, share: float) -> torch.Tensor:
        """Return the true mass that each row of some heads would lose under a share threshold."""
        log_share = torch.tensor(share).log()
        pairs = zip(self.needs, self.mass, strict=True)
        return torch.cat([dropped_rows(mass[heads], needs[heads] <= log_share) for needs, mass in pairs])


@torch.no_grad()
def score_records(
    scorer: BlockScorer, records: Sequence[LayerRecord], edges: Sequence[int], block_q: int
) -> tuple[list[Scored], Scored]:
    """Score query blocks of `block_q` rows: sorted into length bins, and those apart that ask for notes."""
    bins, asking = [Scored([], []) for _ in range(len(edges) + 1)], Scored([], [])
    for record in records:
        which = torch.bucketize(record.starts, torch.tensor(edges), right=True)
        needs, mass = query_block_needs(scorer, record, block_q)
        parts = [*((scored, which == b) for b, scored in enumerate(bins)), (asking, record.is_asking)]
        for scored, inside in parts:
            if bool(inside.any()):
                chosen = inside.repeat_interleave(needs.shape[1] // len(inside))
                scored.needs.append(needs[:, chosen])
                scored.mass.append(mass[:, chosen])
    return bins, asking


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
