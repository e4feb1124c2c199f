"""The scorer's log shares in fp64, row by row and token by token, written apart from the package."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.rows import RUN_ROWS


def exact_shares(scorer: BlockScorer, q: Tensor, k: Tensor, table: RotaryTable, block_q: int) -> Tensor:
    """The neediest row's log share [B, Hq, Q, Kb]: -inf for sink, own blocks and what lies ahead."""
    q, k = q.double(), k.double()
    shape, block = scorer.shape, scorer.shape.block_tokens
    q_len, kv_len = q.shape[2], k.shape[2]
    past, group = kv_len - q_len, q.shape[1] // k.shape[1]
    size = min(shape.row_tokens, q_len)
    num = -(-q_len // block_q)
    rows = -(-min(block_q, q_len) // size)
    first = torch.arange(num, device=q.device)[:, None] * block_q + torch.arange(rows, device=q.device) * size
    tokens = (first.flatten()[:, None] + torch.arange(size, device=q.device)).clamp(max=q_len - 1)
    plain_q, plain_k = _unrotated(q, past, table), _unrotated(k, 0, table)
    keys = _means(
        k, torch.arange(kv_len // shape.pool_tokens * shape.pool_tokens, device=k.device), shape.pool_tokens
    )
    plain_keys = _means(
        plain_k, torch.arange(keys.shape[2] * shape.pool_tokens, device=k.device), shape.pool_tokens
    )
    mean_q, mean_plain = q[:, :, tokens].mean(3), plain_q[:, :, tokens].mean(3)
    scores = _scores(scorer, mean_q, mean_plain, keys, plain_keys)
    blocks = -(-kv_len // block)
    full = kv_len // block
    per_block = (
        scores[..., : full * (block // shape.pool_tokens)]
        .unflatten(-1, (full, block // shape.pool_tokens))
        .logsumexp(-1)
    )
    weights = per_block + math.log(shape.pool_tokens)
    own = (past + first[:, :1].expand(-1, rows).flatten()) // block
    distance = own[:, None] - torch.arange(full, device=q.device)
    bins = (
        (2 * torch.log2(distance.clamp(min=1).double())).long().clamp(max=scorer.distance_bias.shape[1] - 1)
    )
    weights = weights + scorer.distance_bias.double()[:, bins]
    is_open = (distance > 0) & (torch.arange(full, device=q.device) > 0)
    weights = weights.masked_fill(~is_open, -torch.inf)
    last = past + (first.flatten() + size).clamp(max=q_len) - 1
    raw = mean_q @ k.repeat_interleave(group, 1).mT * scorer.scale
    key = torch.arange(kv_len, device=q.device)
    is_sink = (key < block) & (own > 0)[:, None]
    is_own = (key >= own[:, None] * block) & (key <= last[:, None])
    forced = raw.masked_fill(~(is_sink | is_own), -torch.inf).logsumexp(-1)
    total = torch.logaddexp(weights.logsumexp(-1), forced)
    shares = (weights - total[..., None]).unflatten(2, (num, rows))
    if shape.chooses_rows and rows % RUN_ROWS == 0:
        is_left = _farthest(mean_q, RUN_ROWS // shape.query_pool) & (first.flatten() < q_len)
        shares = shares.masked_fill(~is_left.unflatten(2, (num, rows))[..., None], -torch.inf)
    shares = shares.amax(3)
    return torch.nn.functional.pad(shares, (0, blocks - full), value=-torch.inf)


def _farthest(q: Tensor, num: int) -> Tensor:
    """Which rows of each run of q [B, Hq, R, D] are scored, [B, Hq, R]: one after the other."""
    is_left = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    for b, h, first in itertools.product(*map(range, q.shape[:2]), range(0, q.shape[2], RUN_ROWS)):
        run = q[b, h, first : first + RUN_ROWS]
        left = [0]
        while len(left) < num:
            left.append(int(torch.cdist(run, run[left]).amin(1).argmax()))
        is_left[b, h, [first + row for row in left]] = True
    return is_left


def _unrotated(x: Tensor, first: int, table: RotaryTable) -> Tensor:
    cos, sin = (part[first : first + x.shape[2]].double() for part in (table.cos, table.sin))
    half = x.shape[3] // 2
    size = cos * cos + sin * sin
    turned = torch.cat((x[..., half:], -x[..., :half]), -1)
    return (x * cos + turned * sin) / size


def _means(x: Tensor, tokens: Tensor, size: int) -> Tensor:
    return x[:, :, tokens].unflatten(2, (-1, size)).mean(3)


def _scores(scorer: BlockScorer, q: Tensor, plain_q: Tensor, k: Tensor, plain_k: Tensor) -> Tensor:
    """Logits of each pooled row against each pool, [B, Hq, R, P]."""
    group = q.shape[1] // k.shape[1]
    gain = scorer.log_gain.double().exp()[:, None, None]
    query_map, key_map = scorer.query_map.double(), scorer.key_map.double()
    step = (scorer.shape.head_dim * scorer.shape.rank) ** -0.5 if scorer.shape.is_residual else scorer.scale
    if not scorer.shape.is_residual:
        left = torch.cat((q, plain_q), -1) @ query_map * step * gain
        right = torch.cat((k, plain_k), -1) @ key_map
        return left @ right.repeat_interleave(group, 1).mT
    sized_q, sized_k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (plain_q, plain_k))
    learned = (sized_q @ query_map * step) @ (sized_k @ key_map).repeat_interleave(group, 1).mT
    return gain * scorer.scale * q @ k.repeat_interleave(group, 1).mT + learned
