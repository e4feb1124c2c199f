"""Seeded tensors of attention calls, and masks on another device."""

from __future__ import annotations

from dataclasses import replace

import torch

from sentei.kernels.ops.block_mask import BlockMask


def make_qkv(
    q_len: int,
    past: int = 0,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random q [B, Hq, Tq, D], k and v [B, Hkv, past + Tq, D] of one seed, the same on every device."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((heads[0], q_len), (heads[1], past + q_len), (heads[1], past + q_len))
    tensors = [torch.randn(batch, count, length, dim, generator=generator) for count, length in sizes]
    return [tensor.to(device, dtype) for tensor in tensors]


def move_mask(mask: BlockMask, device: str) -> BlockMask:
    """The same mask on a device."""
    return replace(mask, counts=mask.counts.to(device), indices=mask.indices.to(device))
