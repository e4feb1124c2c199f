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
ROW_CHOICES = (2, 4, 8)  # of so many rows one: a run leaves two at least, or one that is no number could hide


def rows_that_differ(q: Tensor, one_in: int) -> tuple[Tensor, Tensor]:
    """Choose one in so many rows of q [..., R, D], in each run of RUN_ROWS rows those farthest apart.

    A shorter run at the end leaves as many: cut at multiples of RUN_ROWS, a prompt is scored as it is whole.

    Returns:
        The chosen rows [..., C] in their order, and of each row the place among them of the one that stands
        for it [..., R]. What is no number is infinitely far: such a row is chosen, so that no score hides it.
    """
    full = q.shape[-2] // RUN_ROWS * RUN_ROWS
    whole = q[..., :full, :].reshape(*q.shape[:-2], -1, RUN_ROWS, q.shape[-1])
    parts = [whole, q[..., None, full:, :]]
    chosen, places, before, first = [], [], 0, 0
    for runs in parts:
        if not runs.shape[-2] * runs.shape[-3]:
            continue
        num, size = runs.shape[-3:-1]
        kept = min(RUN_ROWS // one_in, size)
        picks, nearest = _farthest_first(_distances(runs.float()), kept)
        picks, order = picks.sort(dim=-1)
        run = torch.arange(num, device=q.device)[:, None]
        chosen.append((picks + run * size + first).flatten(-2))
        places.append((order.argsort(dim=-1).gather(-1, nearest) + run * kept + before).flatten(-2))
        before, first = before + num * kept, first + num * size
    return torch.cat(chosen, dim=-1), torch.cat(places, dim=-1)


def _distances(run: Tensor) -> Tensor:
    """Squared distances of all rows of run [..., R, D] to each other, [..., R, R]; infinity for no number."""
    products = run @ run.mT
    sizes = products.diagonal(dim1=-2, dim2=-1)
    away = sizes[..., :, None] + sizes[..., None, :] - 2 * products
    return away.clamp_min(0.0).nan_to_num(nan=torch.inf)


def _farthest_first(distances: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`num` rows by their distances [..., R, R], the first one first, and the place of each row's nearest."""
    picks = torch.zeros(*distances.shape[:-2], 1, dtype=torch.int64, device=distances.device)
    least = distances[..., 0, :].scatter(-1, picks, -1.0)  # nothing is chosen twice, be it no number
    nearest = torch.zeros_like(least, dtype=torch.int64)
    for i in range(1, num):
        last = least.argmax(dim=-1, keepdim=True)
        picks = torch.cat([picks, last], dim=-1)
        away = distances.gather(-2, last[..., None].expand(*last.shape, distances.shape[-1]))[..., 0, :]
        nearest = torch.where(away < least, i, nearest).scatter(-1, last, i)
        least = torch.minimum(away, least).scatter(-1, last, -1.0)
    return picks, nearest
