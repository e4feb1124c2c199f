"""Untrained scores of others, in our terms, so that a trained scorer has them to beat.

Both read single keys (`pool_tokens` 1) and have no weights. What they share with the trained forms is all the
rest: sink and diagonal are measured exactly, a row's scores become shares, the neediest row of a query block
decides. Where a paper sums over rows instead, this serves it better (docs/adr/0003).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from sentei.kernels.scorer.network import BlockScorer, ScorerError, ScorerShape

PAGE_TOKENS = 16  # Quest's pages
STRIDE_TOKENS = 8  # XAttention's stride: the finest that its authors report


class UntrainedScorer(BlockScorer):
    """A score of raw queries and keys; subclasses say how."""

    has_native_program = False

    def __init__(self, shape: ScorerShape, scale: float) -> None:
        super().__init__(replace(shape, form="residual", pool_tokens=1, query_pool=1, rank=1), scale)

    def encode_queries(self, q: torch.Tensor, q_plain: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return [B, Hq, T, D], scaled; the plain queries are not looked at."""
        return q * self.scale

    def encode_keys(self, pooled: torch.Tensor, pooled_plain: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the keys as they are, [B, Hkv, T, D]."""
        return pooled


class MinMaxScorer(UntrainedScorer):
    """An upper bound of every logit in a page, from the least and largest key per dimension.

    Quest (Tang et al., 2024, section 3.2): the sum over dimensions of max(q m, q M), of the best page.
    """

    scores_per_pool = 1 / PAGE_TOKENS

    @property
    def dims_per_token(self) -> float:
        """Two products for each page."""
        return 2 * self.shape.head_dim / PAGE_TOKENS

    def block_logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the bound of each full block, [B, Hq, T, blocks]."""
        block = self.shape.block_tokens
        page = min(PAGE_TOKENS, block)
        B, Hkv, T, D = keys.shape
        num = T // block
        pages = keys[:, :, : num * block].reshape(B, Hkv, num * block // page, page, D)
        low, high = pages.amin(dim=3), pages.amax(dim=3)
        grouped = queries.reshape(B, Hkv, -1, D)
        bounds = grouped.clamp_min(0) @ high.transpose(-1, -2) + grouped.clamp_max(0) @ low.transpose(-1, -2)
        best = bounds.view(B, Hkv, -1, num, block // page).amax(dim=-1)
        return best.float().reshape(B, self.shape.query_heads, -1, num)


class AntidiagonalScorer(UntrainedScorer):
    """The mean logit along each antidiagonal of small tiles, every pair of tokens touched once in `stride`.

    XAttention (Xu et al., 2025, section 2.1): in tiles of stride by stride, queries meet keys in reverse.
    """

    scores_per_pool = 1 / STRIDE_TOKENS**2

    def __init__(self, shape: ScorerShape, scale: float) -> None:
        super().__init__(shape, scale)
        if shape.block_tokens % STRIDE_TOKENS:
            raise ScorerError(
                f"block_tokens is {shape.block_tokens}, not a multiple of the antidiagonals' "
                f"stride {STRIDE_TOKENS}"
            )

    @property
    def dims_per_token(self) -> float:
        """One product for each `stride` pairs."""
        return self.shape.head_dim / STRIDE_TOKENS

    def block_logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return log mass of each full block, [B, Hq, T, blocks]; the rows of a tile share their score."""
        stride, block = STRIDE_TOKENS, self.shape.block_tokens
        B, Hkv, T, D = keys.shape
        num, rows = T // block, queries.shape[2]
        if rows % stride:
            raise ScorerError(f"{rows} query rows are not a multiple of the antidiagonals' stride {stride}")
        tiles = keys[:, :, : num * block].reshape(B, Hkv, -1, stride, D).flip(3).flatten(3)
        grouped = queries.reshape(B, Hkv, -1, stride * D)
        scores = (grouped @ tiles.transpose(-1, -2)).float() / stride
        per_block = torch.logsumexp(scores.view(B, Hkv, -1, num, block // stride), dim=-1) + math.log(stride)
        return per_block.repeat_interleave(stride, dim=2).reshape(B, self.shape.query_heads, rows, num)


def _means(pool_tokens: int) -> Callable[[ScorerShape, float], BlockScorer]:
    return lambda shape, scale: BlockScorer(
        replace(shape, form="residual", pool_tokens=pool_tokens, query_pool=1), scale
    )


# By the name that tables and JSON give them; each takes a layer's shape and its attention scale.
UNTRAINED: Mapping[str, Callable[[ScorerShape, float], BlockScorer]] = {
    "means_4": _means(4),
    "means_16": _means(16),
    f"min_max_{PAGE_TOKENS}": MinMaxScorer,
    f"antidiagonal_{STRIDE_TOKENS}": AntidiagonalScorer,
}
