"""The learned scorer of one layer: a query token against pooled keys, for prefill and decode alike.

    score = gain * scale * q . mean(k)  +  (W_q norm(q')) . (W_k norm(mean(k')))  +  bias[distance]

q and k carry their rotation, q' and k' do not. W_q, the bias and the log gain start at zero, so that the
start is the untrained score exactly and training can only move away from it where that helps.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

NUM_DISTANCES = 16


class ScorerError(RuntimeError):
    """A scorer that cannot be built or that gives numbers which are none."""


@dataclass(frozen=True, slots=True)
class ScorerShape:
    """Sizes of one layer's scorer."""

    query_heads: int
    kv_heads: int
    head_dim: int
    rank: int = 64
    pool_tokens: int = 16
    block_tokens: int = 64

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise ScorerError(
                f"query_heads is {self.query_heads}, not a multiple of kv_heads {self.kv_heads}; "
                "grouped heads must divide evenly"
            )
        if self.block_tokens % self.pool_tokens:
            raise ScorerError(
                f"block_tokens is {self.block_tokens}, not a multiple of pool_tokens {self.pool_tokens}"
            )


class BlockScorer(nn.Module):
    """Scores query tokens against pooled keys; logsumexp over a block estimates its attention mass."""

    query_map: nn.Parameter
    key_map: nn.Parameter
    log_gain: nn.Parameter
    distance_bias: nn.Parameter

    def __init__(self, shape: ScorerShape, scale: float, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        # One optimiser step moves all of query_map at once; this keeps its effect on a score near the step.
        self._step_scale = (shape.head_dim * shape.rank) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        key_map = torch.randn(shape.kv_heads, shape.head_dim, shape.rank, generator=generator)
        self.key_map = nn.Parameter(key_map / shape.head_dim**0.5)
        self.query_map = nn.Parameter(torch.zeros(shape.query_heads, shape.head_dim, shape.rank))
        self.log_gain = nn.Parameter(torch.zeros(shape.query_heads))
        self.distance_bias = nn.Parameter(torch.zeros(shape.query_heads, NUM_DISTANCES))

    def encode_queries(self, q: torch.Tensor, q_plain: torch.Tensor) -> torch.Tensor:
        """Return [B, Hq, T, D + rank] from rotated and unrotated queries [B, Hq, T, D]."""
        gain = (self.log_gain.exp() * self.scale)[:, None, None].to(q.dtype)
        learned = _normalise(q_plain) @ self.scaled_query_map().to(q.dtype)
        return torch.cat([q * gain, learned], dim=-1)

    def scaled_query_map(self) -> torch.Tensor:
        """Return what unrotated, normalised queries are multiplied by, [Hq, D, rank]."""
        scaled: torch.Tensor = self.query_map * self._step_scale
        return scaled

    def encode_keys(self, pooled: torch.Tensor, pooled_plain: torch.Tensor) -> torch.Tensor:
        """Return [B, Hkv, P, D + rank] from pooled rotated and unrotated keys [B, Hkv, P, D]."""
        return torch.cat([pooled, _normalise(pooled_plain) @ self.key_map.to(pooled.dtype)], dim=-1)

    def block_logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return log mass of each full block before normalisation, [B, Hq, T, blocks], without the bias."""
        B, Hkv, _, _ = keys.shape
        pools = self.shape.block_tokens // self.shape.pool_tokens
        num = keys.shape[2] // pools
        # Pools of one block lie `num` apart, so that the reduction runs over an outer, contiguous axis.
        spread = keys[:, :, : num * pools].reshape(B, Hkv, num, pools, -1).transpose(2, 3).flatten(2, 3)
        grouped = queries.reshape(B, Hkv, -1, queries.shape[-1])
        scores = grouped @ spread.transpose(-1, -2)
        per_block = torch.logsumexp(scores.view(B, Hkv, -1, pools, num).float(), dim=-2)
        per_block = per_block + math.log(self.shape.pool_tokens)
        return per_block.reshape(B, self.shape.query_heads, -1, num)

    def bias(self, distances: torch.Tensor) -> torch.Tensor:
        """Return the learned bias [Hq, ...] for distances in blocks [...]."""
        bins = torch.log2(distances.clamp_min(1).float()).mul(2).long().clamp_max(NUM_DISTANCES - 1)
        return self.distance_bias[:, bins]


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
