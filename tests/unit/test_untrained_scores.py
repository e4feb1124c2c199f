"""The untrained scores of others, against the logits that they stand for."""

import pytest
import torch

from sentei.kernels.scorer.features import RotaryTable, pool_tokens
from sentei.kernels.scorer.network import ScorerError, ScorerShape
from sentei.kernels.scorer.selection import score_blocks
from sentei.kernels.scorer.untrained import (
    PAGE_TOKENS,
    STRIDE_TOKENS,
    UNTRAINED,
    AntidiagonalScorer,
    MinMaxScorer,
)

B, HQ, HKV, T, D, BLOCK, SCALE = 2, 4, 2, 256, 8, 32, 0.3
SHAPE = ScorerShape(HQ, HKV, D, pool_tokens=4, block_tokens=BLOCK)


def make_heads(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [B, Hq, T, D] and keys [B, Hkv, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, HQ, T, D, generator=generator), torch.randn(B, HKV, T, D, generator=generator)


def true_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return scaled logits by block: [B, Hq, T, blocks, BLOCK]."""
    keys = k.repeat_interleave(HQ // HKV, dim=1)
    return (q @ keys.transpose(-1, -2) * SCALE).view(B, HQ, T, T // BLOCK, BLOCK)


def test_the_min_max_score_bounds_every_logit_of_a_block() -> None:
    """No key of a block has a larger logit than its bound, and pages of equal keys meet it."""
    scorer, (q, k) = MinMaxScorer(SHAPE, SCALE), make_heads()
    flat = k[:, :, ::PAGE_TOKENS].repeat_interleave(PAGE_TOKENS, dim=2)

    for keys in (k, flat):
        bounds = scorer.block_logits(scorer.encode_queries(q, q), scorer.encode_keys(keys, keys))
        best = true_logits(q, keys).amax(dim=-1)
        assert (bounds >= best - 1e-5).all()
    assert torch.allclose(bounds, best, atol=1e-5)


def test_the_antidiagonal_score_is_the_mean_of_the_logits_it_touches() -> None:
    """One tile of queries and one block of keys, spelled out pair by pair."""
    scorer, (q, k) = AntidiagonalScorer(SHAPE, SCALE), make_heads(1)
    found = scorer.block_logits(scorer.encode_queries(q, q), scorer.encode_keys(k, k))
    tile, block, head = 5, 3, 2
    queries = q[0, head, tile * STRIDE_TOKENS : (tile + 1) * STRIDE_TOKENS]
    means = []
    for first in range(block * BLOCK, (block + 1) * BLOCK, STRIDE_TOKENS):
        pairs = [
            queries[i] @ k[0, head // 2, first + STRIDE_TOKENS - 1 - i] * SCALE for i in range(STRIDE_TOKENS)
        ]
        means.append(torch.stack(pairs).mean())
    expected = torch.logsumexp(torch.stack(means), dim=0) + torch.tensor(float(STRIDE_TOKENS)).log()

    rows = found[0, head, tile * STRIDE_TOKENS : (tile + 1) * STRIDE_TOKENS, block]
    assert torch.allclose(rows, expected.expand(STRIDE_TOKENS), atol=1e-5)


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_untrained_score_gives_shares_below_one(name: str) -> None:
    """Through the usual selection: a share for each block that may be chosen, none above 1."""
    scorer, (q, k) = UNTRAINED[name](SHAPE, SCALE), make_heads(2)
    table = RotaryTable(torch.ones(T, D), torch.zeros(T, D))
    pooled = pool_tokens(k, scorer.shape.pool_tokens)
    with torch.no_grad():
        shares, starts = score_blocks(scorer, q, k, scorer.encode_keys(pooled, pooled), table=table)

    is_open = torch.zeros(T // BLOCK, T // BLOCK, dtype=torch.bool)
    for i in range(T // BLOCK):
        is_open[i, 1:i] = True
    assert starts.tolist() == list(range(0, T, BLOCK))
    assert (torch.isfinite(shares) == is_open).all()
    assert (shares[..., is_open] <= 1e-5).all()


def test_blocks_that_hold_no_whole_tile_are_refused() -> None:
    """The message names the block size and the stride."""
    with pytest.raises(ScorerError, match=r"block_tokens is 4, not a multiple .* stride 8"):
        AntidiagonalScorer(ScorerShape(HQ, HKV, D, pool_tokens=4, block_tokens=4), SCALE)
