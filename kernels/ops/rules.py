"""What an operation is asked for beside its tensors: how scores weigh, which blocks stay, for which grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """How products of queries and keys become weights: times `scale`, then bent, bounded and summed.

    `window` keeps the last `window` keys of a row, its own included; `softcap` bends scores s to
    softcap * tanh(s / softcap); `sinks` [Hq] adds to each row one more logit that carries no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


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
