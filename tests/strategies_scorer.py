"""Scorers that learned nothing, a rotary table, and pages as vLLM lays them."""

from __future__ import annotations

import torch

from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, Form, ScorerShape


def make_scorer(heads: tuple[int, int], dim: int, *, form: Form, pool: int, rank: int = 24) -> BlockScorer:
    """A scorer with weights that were not learned, but none of them zero."""
    scorer = BlockScorer(ScorerShape(*heads, dim, rank, pool, 64, form), dim**-0.5, seed=3)
    generator = torch.Generator().manual_seed(4)
    for weight in (scorer.query_map, scorer.distance_bias):
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return scorer.requires_grad_(False)


def make_rotary(dim: int, length: int = 1024) -> RotaryTable:
    """The default embedding."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], dim=-1)
    return RotaryTable(angles.cos(), angles.sin())


def lay_as_vllm(cache: PagedCache) -> PagedCache:
    """The same pages with each block's keys stored [D, block]."""
    keys = cache.keys.transpose(2, 3).contiguous().transpose(2, 3)
    return PagedCache(keys, cache.values, cache.page_table, cache.lengths)
