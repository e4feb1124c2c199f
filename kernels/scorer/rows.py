"""Which of some neighbouring query rows are scored for all of them: those that differ most (docs/adr/0030).

Farthest-first traversal: T. F. Gonzalez, Clustering to minimize the maximum intercluster distance,
Theoretical Computer Science 38 (1985). A query block keeps what its neediest row needs, and rows that ask
alike need alike: one of them says it. The mean of rows asks for what none of them may need.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows among which some stand for the others: the shortest query blocks (docs/adr/0012).
RUN_ROWS = 16


def rows_that_differ(q: Tensor, one_in: int) -> tuple[Tensor, Tensor]:
    """Choose one in so many rows of q [..., R, D], in each run of RUN_ROWS rows those farthest apart.

    A shorter run leaves as many: how a prompt is cut makes no difference.

    Returns:
        The chosen rows [..., C] in their order, and of each row the place among them of the one that stands
        for it [..., R]. What is no number is infinitely far: such a row is chosen, so that no score hides it.
    """
    chosen, places, before = [], [], 0
    for first in range(0, q.shape[-2], RUN_ROWS):
        run = q[..., first : first + RUN_ROWS, :].float()
        picks, nearest = _farthest_first(run, min(RUN_ROWS // one_in, run.shape[-2]))
        picks, order = picks.sort(dim=-1)
        chosen.append(picks + first)
        places.append(order.argsort(dim=-1).gather(-1, nearest) + before)
        before += picks.shape[-1]
    return torch.cat(chosen, dim=-1), torch.cat(places, dim=-1)


def _farthest_first(run: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`num` rows of run [..., R, E], the first one first, and which of these each row is nearest to."""
    picks = torch.zeros(*run.shape[:-2], 1, dtype=torch.int64, device=run.device)
    least = _distances(run, picks).scatter_(-1, picks, -1.0)  # nothing is chosen twice, be it no number
    nearest = torch.zeros_like(least, dtype=torch.int64)
    for i in range(1, num):
        picks = torch.cat([picks, least.argmax(dim=-1, keepdim=True)], dim=-1)
        distances = _distances(run, picks[..., -1:])
        nearest = torch.where(distances < least, i, nearest)
        least = torch.where(distances < least, distances, least)
        least.scatter_(-1, picks[..., -1:], -1.0)
        nearest.scatter_(-1, picks[..., -1:], i)
    return picks, nearest


def _distances(run: Tensor, to: Tensor) -> Tensor:
    """Squared distances of all rows of run [..., R, E] to one of them, `to` [..., 1]; no number is infinity."""
    one = run.gather(-2, to[..., None].expand(*to.shape, run.shape[-1]))
    return (run - one).square().sum(dim=-1).nan_to_num(nan=torch.inf)
