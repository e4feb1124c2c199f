"""The learned scorer of one layer: a query token against pooled keys, for prefill and decode alike.

    residual   gain * scale * q . mean(k)  +  (W_q norm(q')) . (W_k norm(mean(k')))  +  bias[distance]
    low_rank   gain * (W_q [q, q']) . mean(W_k [k, k'])  +  bias[distance]

q and k carry their rotation, q' and k' do not; the mean runs over a pool of tokens. `residual` starts as the
untrained score exactly: W_q, the bias and the log gain are zero. `low_rank` costs no more dimensions than its
rank, so that pools may be single tokens; it starts as the best approximation of q . k of that rank. Where
keys are single tokens, neighbouring queries may be scored as one by their mean (docs/adr/0014), or those that
differ most for the others (docs/adr/0030).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from sentei.errors import SenteiError
from sentei.kernels.scorer.rows import ROW_CHOICES

NUM_DISTANCES = 16
# Features of single keys are bytes where the processor multiplies these: 127 steps reach to so many standard
# deviations. With the largest value as the end SmolLM2's score misses half as many needles again
# (docs/measured/2026-11-27-scorer.md).
BYTE_RANGE = 4.0
Form = Literal["residual", "low_rank"]
Reduce = Literal["mean", "k_center"]


class ScorerError(SenteiError, RuntimeError):
    """A scorer that cannot be built or that gives numbers which are none."""


@dataclass(frozen=True, slots=True)
class ScorerShape:
    """Form and sizes of one layer's scorer."""

    query_heads: int
    kv_heads: int
    head_dim: int
    rank: int = 64
    pool_tokens: int = 16
    block_tokens: int = 64
    form: Form = "residual"
    query_pool: int = 1  # of so many neighbouring rows one is scored
    query_reduce: Reduce = "mean"  # their mean, or of each sixteen rows those that differ most

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ScorerError(f"form is {self.form!r}; it must be one of {', '.join(get_args(Form))}")
        if self.query_heads % self.kv_heads:
            raise ScorerError(
                f"query_heads is {self.query_heads}, not a multiple of kv_heads {self.kv_heads}; "
                "grouped heads must divide evenly"
            )
        if self.block_tokens % self.pool_tokens:
            raise ScorerError(
                f"block_tokens is {self.block_tokens}, not a multiple of pool_tokens {self.pool_tokens}"
            )
        if self.query_pool < 1 or (self.query_pool > 1 and self.pool_tokens > 1):
            raise ScorerError(
                f"query_pool is {self.query_pool} with pool_tokens {self.pool_tokens}; "
                "queries are pooled only where keys are single tokens"
            )
        if self.query_reduce not in get_args(Reduce):
            known = ", ".join(get_args(Reduce))
            raise ScorerError(f"query_reduce is {self.query_reduce!r}; it must be one of {known}")
        if self.chooses_rows and self.query_pool not in ROW_CHOICES:
            known = ", ".join(map(str, ROW_CHOICES))
            raise ScorerError(
                f"query_pool is {self.query_pool} with query_reduce k_center; it must be one of {known}"
            )

    @property
    def is_residual(self) -> bool:
        """Whether the untrained score is a part of the score."""
        return self.form == "residual"

    @property
    def is_single(self) -> bool:
        """Whether single tokens are scored, in few dimensions and nothing beside them."""
        return self.pool_tokens == 1 and not self.is_residual

    @property
    def chooses_rows(self) -> bool:
        """Whether some rows are scored for all, instead of a mean of them."""
        return self.query_reduce == "k_center" and self.query_pool > 1

    @property
    def row_tokens(self) -> int:
        """How many neighbouring queries a scored row is the mean of."""
        return 1 if self.chooses_rows else self.query_pool

    @property
    def map_rows(self) -> int:
        """What the learned maps read of a token: D, or 2 D with and without rotation."""
        return self.head_dim if self.is_residual else 2 * self.head_dim

    @property
    def num_features(self) -> int:
        """Dimensions of an encoded query or pool."""
        return self.rank + (self.head_dim if self.is_residual else 0)


class BlockScorer(nn.Module):
    """Scores query tokens against pooled keys; logsumexp over a block estimates its attention mass."""

    has_native_program = True  # whether the programs for CPUs and GPUs compute this score
    scores_per_pool = 1.0  # numbers that one query token and one pool make on the way

    query_map: nn.Parameter
    key_map: nn.Parameter
    log_gain: nn.Parameter
    distance_bias: nn.Parameter
    key_steps: torch.Tensor | None

    def __init__(self, shape: ScorerShape, scale: float, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        # One optimiser step moves all of query_map at once; this keeps its effect on a score near the step.
        self._step_scale = (shape.head_dim * shape.rank) ** -0.5 if shape.is_residual else scale
        generator = torch.Generator().manual_seed(seed)
        key_map = torch.randn(shape.kv_heads, shape.map_rows, shape.rank, generator=generator)
        self.key_map = nn.Parameter(key_map / shape.head_dim**0.5)
        self.query_map = nn.Parameter(torch.zeros(shape.query_heads, shape.map_rows, shape.rank))
        self.log_gain = nn.Parameter(torch.zeros(shape.query_heads))
        self.distance_bias = nn.Parameter(torch.zeros(shape.query_heads, NUM_DISTANCES))
        # What one step of a single key's bytes is, [Hkv, rank]: a weight as the others are, so that a key has
        # the same bytes in every text and behind every cut. Until keys are seen, as for unit variance.
        deviations = self.key_map.detach().square().sum(dim=1).sqrt()
        self.register_buffer("key_steps", BYTE_RANGE * deviations / 127.0 if shape.is_single else None)
        self._derived: dict[str, torch.Tensor] = {}
        self._stamp: tuple[tuple[int, int], ...] = ()

    def with_query_pool(self, size: int, reduce: Reduce = "mean") -> "BlockScorer":
        """Return a scorer with the same weights that scores one of so many queries."""
        other = BlockScorer(replace(self.shape, query_pool=size, query_reduce=reduce), self.scale)
        other.load_state_dict(self.state_dict())
        return other.train(self.training)

    def frozen(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what `make` derives from the weights; without gradients it is kept while these stay."""
        weights: list[torch.Tensor] = [self.query_map, self.key_map, self.log_gain, self.distance_bias]
        if self.key_steps is not None:
            weights.append(self.key_steps)
        if torch.is_grad_enabled() or any(weight.is_inference() for weight in weights):
            return make()
        stamp = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if stamp != self._stamp:
            self._derived, self._stamp = {}, stamp
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    @property
    def dims_per_token(self) -> float:
        """Multiply-adds of scoring one query token against one key token."""
        return self.shape.num_features / (self.shape.pool_tokens * self.shape.query_pool)

    @property
    def cost_per_pair(self) -> float:
        """What scoring one query token against one key token takes, beside others of the same head.

        In multiply-adds of 8 bits. The residual form has none of 8 bits: at heads of 64 and 8,192 tokens one
        of its own takes as long as three (33.0% and 22.5% of dense, docs/measured/2026-11-27-scorer.md).
        """
        return self.dims_per_token * (3.0 if self.shape.is_residual else 1.0)

    @property
    def share_of_dense(self) -> float:
        """What scoring costs, in dense attention of the same heads: so much density it is worth.

        Attention makes two multiply-adds of 16 bits for each dimension of a pair, each as dear as two of 8.
        """
        return self.cost_per_pair / (4 * self.shape.head_dim)

    def encode_queries(self, q: torch.Tensor, q_plain: torch.Tensor) -> torch.Tensor:
        """Return [B, Hq, T, features] from rotated and unrotated queries [B, Hq, T, D]."""
        maps = self.scaled_query_map().to(q.dtype)
        if not self.shape.is_residual:
            return torch.cat([q, q_plain], dim=-1) @ maps
        gain = self.query_gains()[:, None, None].to(q.dtype)
        return torch.cat([q * gain, _normalise(q_plain) @ maps], dim=-1)

    def scaled_query_map(self) -> torch.Tensor:
        """Return what queries are multiplied by, [Hq, map_rows, rank], with every factor in it."""
        scaled: torch.Tensor = self.query_map * self._step_scale
        return scaled if self.shape.is_residual else scaled * self.log_gain.exp()[:, None, None]

    def query_gains(self) -> torch.Tensor:
        """Return the factor of the untrained score, [Hq], the attention scale included."""
        return self.log_gain.exp() * self.scale

    def encode_keys(self, pooled: torch.Tensor, pooled_plain: torch.Tensor) -> torch.Tensor:
        """Return [B, Hkv, P, features] from pooled rotated and unrotated keys [B, Hkv, P, D]."""
        maps = self.frozen(f"key map {pooled.dtype}", lambda: self.key_map.to(pooled.dtype))
        if not self.shape.is_residual:
            return torch.cat([pooled, pooled_plain], dim=-1) @ maps
        return torch.cat([pooled, _normalise(pooled_plain) @ maps], dim=-1)

    @torch.no_grad()
    def fit_steps(self, encoded: torch.Tensor) -> None:
        """Let the bytes of keys reach as far as those with features [Hkv, N, rank] do (BYTE_RANGE)."""
        if self.key_steps is None:
            return  # means of keys are scored in floats
        means, deviations = encoded.float().mean(dim=1), encoded.float().std(dim=1, correction=0)
        self.key_steps.copy_((means.abs() + BYTE_RANGE * deviations).clamp_min(1e-20) / 127.0)

    @torch.no_grad()
    def start_from(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Start a low-rank scorer as the best approximation of scale * q . k on samples of rotated heads.

        q [Hq, N, D], k [Hkv, M, D]. Per KV head: with C = R R the second moments of keys, and those of its
        queries stacked, the singular vectors of R_q R_k keep the most of the score's variance (Eckart-Young).
        """
        shape = self.shape
        group, D = shape.query_heads // shape.kv_heads, shape.head_dim
        self.query_map[:, D:] = 0.0
        for h in range(shape.kv_heads):
            root, inverse = _root(k[h])
            stacked = torch.cat([_root(q[h * group + j])[0] @ root for j in range(group)])
            top = torch.linalg.svd(stacked, full_matrices=False).Vh[: shape.rank].T
            self.key_map[h, :D] = (inverse @ top).float()
            self.key_map[h, D:] = 0.0
            self.query_map[h * group : (h + 1) * group, :D] = (root @ top).float() * (
                self.scale / self._step_scale
            )
        self.fit_steps(k.float() @ self.key_map[:, :D])

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


def _root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric root of the second moments of x [N, D], and its inverse, in fp64."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / x.shape[0])
    values = values.clamp_min(values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
