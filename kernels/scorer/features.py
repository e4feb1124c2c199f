"""What the scorer looks at: keys pooled over a few tokens, and queries and keys without their rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Rotary(Protocol):
    """What knows a model's rotary embedding at every position, whole or piece by piece."""

    def between(self, first: int, last: int) -> RotaryTable:
        """Return a table of at least the positions `first` to `last` - 1."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of a model's rotary embedding, [n, D], at the positions from `first` on."""

    cos: torch.Tensor
    sin: torch.Tensor
    first: int = 0

    @property
    def length(self) -> int:
        """How many positions there are before the table ends."""
        return self.first + self.cos.shape[0]

    def between(self, first: int, last: int) -> RotaryTable:
        """Return itself; an IndexError where it is not of these positions."""
        if first < self.first or last > self.length:
            have = f"{self.first} to {self.length - 1}"
            raise IndexError(f"a rotary table of positions {have} was asked for {first} to {last - 1}")
        return self

    def rows(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of the positions `first` to `last` - 1: [last - first, D], fp32, contiguous."""
        part = slice(first - self.first, last - self.first)
        return self.cos[part].float().contiguous(), self.sin[part].float().contiguous()


def unrotate(x: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Undo the rotary embedding of x [..., T, D] at positions [T] or [..., T]."""
    rows = positions - table.first
    cos, sin = table.cos[rows], table.sin[rows]
    # A scaled embedding (YaRN) multiplies by a constant; cos^2 + sin^2 takes it out again.
    size = (cos.square() + sin.square()).clamp_min(1e-6)
    cos, sin = (cos / size).to(x.dtype), (sin / size).to(x.dtype)
    half = x.shape[-1] // 2
    plain = x * cos
    plain[..., :half].addcmul_(x[..., half:], sin[..., :half])
    plain[..., half:].addcmul_(x[..., :half], sin[..., half:], value=-1)
    return plain


def pool_tokens(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return the mean over each full run of `size` tokens: [B, H, T, D] to [B, H, T // size, D]."""
    B, H, T, D = x.shape
    num = T // size
    return x[:, :, : num * size].reshape(B, H, num, size, D).mean(dim=3)
