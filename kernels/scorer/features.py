"""What the scorer looks at: keys pooled over a few tokens, and queries and keys without their rotation."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of the model's rotary embedding for positions 0 to length - 1: [length, D]."""

    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def length(self) -> int:
        """How many positions the table covers."""
        return self.cos.shape[0]


def unrotate(x: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Undo the rotary embedding of x [..., T, D] at positions [T] or [..., T]."""
    cos, sin = table.cos[positions], table.sin[positions]
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
