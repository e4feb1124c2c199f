"""Silent faults that can be planted, to show that the watch catches what raises no error."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Fault:
    """A planted fault: past `past_tokens`, pooled keys sit one block off, so the wrong blocks are kept.

    The same number of blocks is kept, nothing raises, and no value is NaN; sink and diagonal stay.
    """

    kind: Literal["pooled_keys_off_by_one"] = "pooled_keys_off_by_one"
    past_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.kind != "pooled_keys_off_by_one":
            raise ValueError(f"fault kind is {self.kind!r}; the only one is 'pooled_keys_off_by_one'")
        if self.past_tokens < 0:
            raise ValueError(f"past_tokens is {self.past_tokens}; it must be at least 0")

    def shift(self, shares: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Move the shares [B, H, n, blocks] of query blocks past the length to the next older block."""
        moved = torch.full_like(shares, float("-inf"))
        moved[..., :-1] = shares[..., 1:]
        is_hit = (starts >= self.past_tokens)[:, None]
        return torch.where(is_hit, moved, shares)
