"""Forms of a score that only the study knows: the nearest blocks, and two stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from sentei.kernels.scorer.network import BlockScorer
from sentei.pipeline.measure.needs import query_block_needs
from sentei.pipeline.measure.records import LayerRecord

# Log shares of blocks that the first stage left out lie below all others, and are still shares in fp32.
LOWEST, FAR_BELOW = -30.0, 40.0
TIE = 1e-3  # less than lies between two distances of some hundred blocks


def local_needs(scorer: BlockScorer, record: LayerRecord, block_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `query_block_needs` does for a window: the nearer the better, whatever stands there."""
    needs, mass = query_block_needs(scorer, record, block_q)
    own = record.starts // scorer.shape.block_tokens
    away = (own[:, None] - torch.arange(needs.shape[-1])).clamp_min(0).float()
    near = -torch.log1p(away).repeat_interleave(needs.shape[1] // len(own), dim=0)
    # Blocks equally far away are told apart by chance, or a threshold would take all of them or none.
    chance = torch.rand(needs.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(torch.isinf(needs), needs, near + TIE * chance), mass


@dataclass(frozen=True, slots=True)
class TwoStages:
    """A cheap score leaves each query block its `kept` best blocks; a dear one decides among them."""

    coarse: BlockScorer
    fine: BlockScorer
    kept: int

    @torch.no_grad()
    def needs(
        self, _scorer: BlockScorer, record: LayerRecord, block_q: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `query_block_needs` does; what the first stage left out comes last, in its order."""
        first, _ = query_block_needs(self.coarse, record, block_q)
        needs, mass = query_block_needs(self.fine, record, block_q)
        num = min(self.kept, first.shape[-1])
        reaches = first >= first.topk(num, dim=-1).values[..., -1:]
        last = first.clamp_min(LOWEST) - FAR_BELOW
        return torch.where(reaches | torch.isinf(first), needs, last), mass

    def dims_per_token(self, records: Sequence[LayerRecord]) -> float:
        """Multiply-adds per pair of tokens: the first stage's, and the second's where it looks."""
        shares = []
        for record in records:
            num_open = record.is_open.sum(dim=1).clamp_min(1)
            shares.append(float((num_open.clamp_max(self.kept) / num_open).mean()))
        return self.coarse.dims_per_token + fmean(shares) * self.fine.dims_per_token
