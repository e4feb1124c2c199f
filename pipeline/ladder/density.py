"""A density as the target of a rung: one threshold on the mass share for all layers and heads.

Log shares mean the same everywhere, so one threshold lets blocks flow to the layers and heads that need them.
A longer context spreads the same mass over more blocks, so that a share fixed at one length keeps fewer of
them at a longer one: each bin of positions has a threshold of its own, and with it the density that was asked
for. A row's blocks hang on its position alone; what holds in every bin holds for prompts of every length.
Where questions about notes need more than it gives, a group may keep a lower threshold of its own; what that
spends is taken from all others, so that the density stays what was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sentei.errors import SenteiError
from sentei.kernels.scorer.network import BlockScorer
from sentei.pipeline.measure.needs import MAX_SHARE, MIN_SHARE, query_block_needs
from sentei.pipeline.measure.records import LayerRecord, LayerRecords


class DensityError(SenteiError, ValueError):
    """A density that cannot be had together with what is not to be missed; `least` is what that takes."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, slots=True)
class DensityFit:
    """The share thresholds that keep a density of the causal blocks, by bin, and the mean mass they drop.

    A bin without text is NaN.
    """

    shares: torch.Tensor  # [bins]
    dropped_mass: float


@dataclass(slots=True)
class _Bin:
    """What the query blocks of one range of positions need: [open blocks] over all layers, heads, records."""

    needs: list[torch.Tensor] = field(default_factory=list)
    mass: list[torch.Tensor] = field(default_factory=list)
    num_causal: float = 0.0
    num_forced: float = 0.0
    num_rows: int = 0


@torch.no_grad()
def fit_densities(
    scorers: Mapping[int, BlockScorer],
    records: LayerRecords,
    densities: Sequence[float],
    *,
    block_q: int,
    edges: Sequence[int] = (),
    most: Mapping[int, torch.Tensor] | None = None,
) -> list[DensityFit]:
    """Return the fit of each density in (0, 1] on calibration records, forced blocks counted as kept.

    Query blocks have `block_q` rows; bins end before the positions `edges`. `most` holds the largest share
    that each KV group's threshold may have, by layer: [Hkv].
    """
    bins = [_Bin() for _ in range(len(edges) + 1)]
    for index, scorer in scorers.items():
        for record in records[index]:
            need, true = query_block_needs(scorer, record, block_q)
            if most is not None:
                own = most[index].log().repeat_interleave(need.shape[0] // len(most[index]))
                need = need.masked_fill(need > own[:, None, None], 0.0)  # kept at every threshold
            _sort_into(bins, record, need, true.sum(dim=2), edges)
    _check_reach(bins, min(densities))
    ranked = [_rank(part) for part in bins]
    return [_fit(bins, ranked, density) for density in densities]


def _sort_into(
    bins: Sequence[_Bin], record: LayerRecord, need: torch.Tensor, mass: torch.Tensor, edges: Sequence[int]
) -> None:
    per_record = need.shape[1] // len(record.starts)
    which = torch.bucketize(record.starts, torch.tensor(edges), right=True).repeat_interleave(per_record)
    causal = _causal_blocks(record).repeat_interleave(per_record)
    is_open = record.is_open.repeat_interleave(per_record, dim=0)
    rows = record.mass[0, :, 0, :, 0].numel() // per_record
    for b, part in enumerate(bins):
        inside = which == b
        if not bool(inside.any()):
            continue
        chosen = (is_open & inside[:, None])[None].expand_as(need)
        part.needs.append(need[chosen])
        part.mass.append(mass[chosen])
        part.num_causal += float(causal[inside].sum()) * need.shape[0]
        part.num_forced += float(causal[inside].clamp_max(2).sum()) * need.shape[0]
        part.num_rows += rows * int(inside.sum())


def _check_reach(bins: Sequence[_Bin], density: float) -> None:
    num_needed = sum(int((need == 0.0).sum()) for part in bins for need in part.needs)
    num_causal, num_forced = sum(part.num_causal for part in bins), sum(part.num_forced for part in bins)
    if num_needed and num_needed > density * num_causal - num_forced:
        least = (num_needed + num_forced) / num_causal
        raise DensityError(
            f"density {density:g} is out of reach: what questions about notes need takes "
            f"{least:.1%} of the blocks by itself; "
            "allow more of it to be missed (--missed-needles), or ask for more blocks",
            least,
        )


def _causal_blocks(record: LayerRecord) -> torch.Tensor:
    """Blocks up to the own one, of each query block: [n]."""
    return record.starts // record.mass.shape[3] + 1


def _rank(part: _Bin) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a bin's needs, the largest first, and the summed mass at and below each; None without any."""
    if not part.needs:
        return None
    ranked, order = torch.cat(part.needs).sort(descending=True)
    return ranked, torch.cat(part.mass)[order].flip(0).cumsum(0).flip(0)


def _fit(
    bins: Sequence[_Bin], ranked: Sequence[tuple[torch.Tensor, torch.Tensor] | None], density: float
) -> DensityFit:
    shares, lost = torch.full((len(bins),), torch.nan), 0.0
    for b, (part, found) in enumerate(zip(bins, ranked, strict=True)):
        if found is not None:
            num_kept = round(density * part.num_causal - part.num_forced)
            shares[b], dropped = _cut(*found, num_kept=num_kept)
            lost += dropped
    return DensityFit(shares, lost / max(1, sum(part.num_rows for part in bins)))


def _cut(ranked: torch.Tensor, lost: torch.Tensor, *, num_kept: int) -> tuple[float, float]:
    if num_kept >= len(ranked):
        return MIN_SHARE, 0.0
    if num_kept <= 0:
        return MAX_SHARE, float(lost[0])
    share = float(ranked[num_kept].exp())  # a block passes if its share exceeds the threshold
    return min(MAX_SHARE, max(MIN_SHARE, share)), float(lost[num_kept])
