"""A density as the target of a rung: one threshold on the mass share for all layers and heads.

Log shares mean the same everywhere, so one threshold lets blocks flow to the layers and heads that need them.
Where questions about notes need more than it gives, a group may keep a lower threshold of its own; what that
spends is taken from all others, so that the density stays what was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.scorer.network import BlockScorer
from sentei.pipeline.measure.capture import LayerRecord, Records
from sentei.pipeline.measure.needs import MAX_SHARE, MIN_SHARE, query_block_needs


class DensityError(ValueError):
    """A density that cannot be had together with what is not to be missed."""


@dataclass(frozen=True, slots=True)
class DensityFit:
    """The share threshold that keeps a density of the causal blocks, and the mean mass it drops."""

    share: float
    dropped_mass: float


@torch.no_grad()
def fit_densities(
    scorers: Mapping[int, BlockScorer],
    records: Records,
    densities: Sequence[float],
    *,
    block_q: int,
    most: Mapping[int, torch.Tensor] | None = None,
) -> list[DensityFit]:
    """Return the fit of each density in (0, 1] on calibration records, forced blocks counted as kept.

    Query blocks have `block_q` rows. `most` holds the largest share that each KV group's threshold may have,
    by layer: [Hkv].
    """
    needs, mass, num_causal, num_forced, num_rows = [], [], 0.0, 0.0, 0
    for index, scorer in scorers.items():
        for record in records[index]:
            need, true = query_block_needs(scorer, record, block_q)
            per_record = need.shape[1] // len(record.starts)
            if most is not None:
                own = most[index].log().repeat_interleave(need.shape[0] // len(most[index]))
                need = need.masked_fill(need > own[:, None, None], 0.0)  # kept at every threshold
            is_open = record.is_open.repeat_interleave(per_record, dim=0)[None].expand_as(need)
            needs.append(need[is_open])
            mass.append(true.sum(dim=2)[is_open])
            causal = _causal_blocks(record).repeat_interleave(per_record)
            num_causal += float(causal.sum()) * need.shape[0]
            num_forced += float(causal.clamp_max(2).sum()) * need.shape[0]
            num_rows += record.mass[0, :, :, :, 0].numel()
    ranked, order = torch.cat(needs).sort(descending=True)
    lost = torch.cat(mass)[order].flip(0).cumsum(0).flip(0) / num_rows  # mass at and below each rank
    num_needed = int((ranked == 0.0).sum())
    if num_needed and num_needed > min(densities) * num_causal - num_forced:
        raise DensityError(
            f"density {min(densities):g} is out of reach: what questions about notes need takes "
            f"{(num_needed + num_forced) / num_causal:.1%} of the blocks by itself; "
            "allow more of it to be missed (--missed-needles), or ask for more blocks"
        )
    return [_cut(ranked, lost, num_kept=round(density * num_causal - num_forced)) for density in densities]


def _causal_blocks(record: LayerRecord) -> torch.Tensor:
    """Blocks up to the own one, of each query block: [n]."""
    return record.starts // record.mass.shape[3] + 1


def _cut(ranked: torch.Tensor, lost: torch.Tensor, *, num_kept: int) -> DensityFit:
    if num_kept <= 0:
        return DensityFit(MAX_SHARE, float(lost[0]))
    if num_kept >= len(ranked):
        return DensityFit(MIN_SHARE, 0.0)
    share = float(ranked[num_kept].exp())  # a block passes if its share exceeds the threshold
    return DensityFit(min(MAX_SHARE, max(MIN_SHARE, share)), float(lost[num_kept]))
