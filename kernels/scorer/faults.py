"""Silent faults that can be planted, to show that the watch catches what raises no error."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

FaultKind = Literal["pooled_keys_off_by_one", "pooled_keys_lost"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A planted fault that strikes query blocks past `past_tokens`; nothing raises, and no value is NaN.

    `pooled_keys_off_by_one`: pooled keys sit one block off, so as many blocks are kept, but the wrong ones.
    `pooled_keys_lost`: the side cache was never written that far, so sink and diagonal alone are kept.
    """

    kind: FaultKind = "pooled_keys_off_by_one"
    past_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(
                f"fault kind is {self.kind!r}; it must be one of {', '.join(get_args(FaultKind))}"
            )
        if self.past_tokens < 0:
            raise ValueError(f"past_tokens is {self.past_tokens}; it must be at least 0")

    def shift(self, shares: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Return the shares [B, H, n, blocks] as the fault leaves them; `starts` [n] are token positions."""
        moved = torch.full_like(shares, float("-inf"))
        if self.kind == "pooled_keys_off_by_one":
            moved[..., :-1] = shares[..., 1:]
        is_hit = (starts >= self.past_tokens)[:, None]
        return torch.where(is_hit, moved, shares)
