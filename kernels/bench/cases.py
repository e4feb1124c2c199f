"""What is timed: shapes and densities, with random causal masks that keep sink and diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sentei.kernels.ops.block_mask import BlockMask


@dataclass(frozen=True, slots=True)
class Case:
    """One prefill shape at one density."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    density: float


def make_cases(tokens: tuple[int, ...], densities: tuple[float, ...]) -> tuple[Case, ...]:
    """Return grouped-query cases 4:1 at head 64 and head 256, block 64."""
    shapes = ((4, 1, 64), (4, 1, 256))
    return tuple(Case(n, *shape, 64, density) for n in tokens for shape in shapes for density in densities)


def make_tensors(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [1, Hq, T, D] and k, v [1, Hkv, T, D] in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, case.tokens, case.head_dim, generator=generator)

    return make(case.heads), make(case.kv_heads), make(case.kv_heads)


def make_mask(case: Case, seed: int = 0) -> BlockMask:
    """Return a random causal mask per query head; sink and diagonal are kept, which floors the density."""
    generator = torch.Generator().manual_seed(seed)
    num = -(-case.tokens // case.block)
    rows, columns = torch.arange(num)[:, None], torch.arange(num)
    keep = torch.rand(1, case.heads, num, num, generator=generator) < case.density
    keep = (keep | (columns == 0) | (columns == rows)) & (columns <= rows)
    return BlockMask.from_dense(
        keep, q_len=case.tokens, kv_len=case.tokens, block_q=case.block, block_k=case.block
    )
