"""Other ways to choose blocks, at the same density, so that the learned scorer has something to beat."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sentei.kernels.hf.models import LayerInfo
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer.features import RotaryTable, pool_tokens
from sentei.kernels.scorer.network import ScorerShape
from sentei.kernels.scorer.selection import (
    Thresholds,
    block_starts,
    forced_blocks,
    score_blocks,
    select_blocks,
)
from sentei.kernels.scorer.untrained import UNTRAINED

LOCAL, ORACLE = "local", "oracle"
KINDS: tuple[str, ...] = (*UNTRAINED, LOCAL, ORACLE)


@dataclass(frozen=True, slots=True)
class RankSelector:
    """Keeps a KV group's best-scored blocks up to a density; sink and diagonal are kept as in ours.

    The untrained scores are those of `kernels/scorer/untrained.py`; `local` takes the nearest blocks,
    `oracle` the true mass of the neediest row. The threshold is read off the text itself, which favours them.
    """

    kind: str  # one of KINDS
    density_by_group: Mapping[int, tuple[float, ...]]
    shapes: Mapping[int, ScorerShape]
    table: RotaryTable
    block_q: int  # rows that choose together, as many as on the rung that it is compared with

    def __call__(self, layer: LayerInfo, q: torch.Tensor, k: torch.Tensor) -> BlockMask:
        """Return the mask for one prefill."""
        block = self.shapes[layer.index].block_tokens
        q_offset = k.shape[2] - q.shape[2]
        scores, starts = self._score(layer, q, k, q_offset)
        q_end = q_offset + q.shape[2]
        thresholds = [
            [self._threshold(part, starts, density, q_end)]
            for part, density in zip(
                scores.chunk(layer.kv_heads, dim=1), self.density_by_group[layer.index], strict=True
            )
        ]
        return select_blocks(
            scores,
            Thresholds(torch.tensor(thresholds), ()),
            starts=starts,
            q_len=q.shape[2],
            kv_len=k.shape[2],
            q_offset=q_offset,
            block_q=self.block_q,
            block_k=block,
        )

    def _score(
        self, layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, q_offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shapes[layer.index]
        starts = block_starts(q.shape[2], self.block_q, q_offset, q.device)
        if self.kind in UNTRAINED:
            scorer = UNTRAINED[self.kind](shape, layer.scale).to(q.device)
            pooled = pool_tokens(k, scorer.shape.pool_tokens)
            with torch.no_grad():
                keys = scorer.encode_keys(pooled, pooled)
                return score_blocks(scorer, q, k, keys, table=self.table, block_q=self.block_q)
        num_k = -(-k.shape[2] // shape.block_tokens)
        if self.kind == LOCAL:
            own = starts // shape.block_tokens
            ahead = torch.arange(num_k, device=own.device) - own[:, None]
            near = ahead.float().masked_fill(ahead > 0, float("-inf"))
            return near.expand(q.shape[0], q.shape[1], *near.shape).clone(), starts
        return self._true_needs(layer, q, k, num_k, len(starts)), starts

    def _true_needs(
        self, layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, num_k: int, num_q: int
    ) -> torch.Tensor:
        size, rows_each = self.shapes[layer.index].block_tokens, self.block_q
        offset = k.shape[2] - q.shape[2]
        needs = torch.empty(q.shape[0], q.shape[1], num_q, num_k, device=q.device)
        for i in range(num_q):
            rows = torch.arange(i * rows_each, min((i + 1) * rows_each, q.shape[2]), device=q.device)
            _, mass = block_mass(q, k, scale=layer.scale, block_k=size, rows=rows, q_offset=offset)
            needs[:, :, i] = mass.amax(dim=2)
        return needs.log()

    def _threshold(self, scores: torch.Tensor, starts: torch.Tensor, density: float, q_end: int) -> float:
        size = next(iter(self.shapes.values())).block_tokens
        forced = forced_blocks(starts, scores.shape[-1], q_end=q_end, block_q=self.block_q, block_k=size)
        own = starts // size
        is_open = (torch.arange(scores.shape[-1], device=own.device) < own[:, None]) & ~forced
        heads = scores.shape[0] * scores.shape[1]
        budget = int(density * float((own + 1).sum()) * heads) - int(forced.sum()) * heads
        ranked = scores[:, :, is_open].flatten()
        if budget <= 0:
            return float("inf")
        if budget >= ranked.numel():
            return float("-inf")
        return float(ranked.kthvalue(ranked.numel() - budget).values)
