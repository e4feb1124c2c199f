"""How much of dense attention rows over pages went without: for replays, few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.block_mass import dropped_mass
from sentei.kernels.ops.layouts import PagedCache


@torch.no_grad()
def dropped_over_pages(
    q: Tensor, lse: Tensor, positions: Tensor, cache: PagedCache, sequence: int, scale: float
) -> Tensor:
    """Return the dropped shares [n, Hq] of rows q [n, Hq, D] at `positions` [n] of a sequence, in [0, 1].

    lse [n, Hq] is of what each row read. Every score of a row is held in fp32 at once.
    """
    num, heads, dim = q.shape
    pages = cache.page_table[sequence, : int(positions.max()) // cache.keys.shape[2] + 1].long()
    keys = cache.keys[pages].transpose(0, 1).flatten(1, 2).float()  # [Hkv, T, D]
    grouped = q.float().transpose(0, 1).reshape(keys.shape[0], -1, dim)
    scores = (grouped @ keys.transpose(1, 2) * scale).view(heads, num, -1)
    ahead = torch.arange(keys.shape[1]) > positions[:, None]
    dense = scores.masked_fill_(ahead, -torch.inf).logsumexp(-1)
    return dropped_mass(lse.T, dense).T
