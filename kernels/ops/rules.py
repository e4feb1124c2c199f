"""The rules by which blocks are kept, and the grid of tokens and blocks that a selection is for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Threshold:
    """Keep blocks whose score is above `log_share`, which is as [B, H, Q] or broadcasts to it."""

    log_share: Tensor


@dataclass(frozen=True)
class TopP:
    """Drop the lowest blocks while the exponentials of what is dropped sum to at most 1 - `share`.

    Equal scores stay or go together.
    """

    share: float


@dataclass(frozen=True)
class TopK:
    """Keep `blocks` in all, forced ones (which always stay) included; of equals, the first."""

    blocks: int


Rule = Threshold | TopP | TopK


@dataclass(frozen=True)
class Grid:
    """The tokens and blocks that a mask is for, as in BlockMask."""

    q_len: int
    kv_len: int
    block_q: int
    block_k: int
    q_offset: int = 0
