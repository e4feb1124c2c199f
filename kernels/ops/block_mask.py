"""The block selection: compact lists of key blocks, one list per query block.

Query row i sits at position `q_offset + i`; key j sits at position j. Query blocks are counted from row 0,
key blocks from key 0. A mask never looks ahead: no listed block starts after its query block's last row.
Inside the listed blocks attention stays causal token by token; that is the operations' job, not the mask's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sentei.kernels.ops.errors import MaskError

DEFAULT_BLOCK = 64
BLOCK_MIN, BLOCK_MAX = 16, 128


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which key blocks each query block reads: `counts` [B, H, Q], `indices` [B, H, Q, K], both int32.

    `indices` ascend and are padded with -1 past `counts`. H is 1, the number of KV heads, or of query heads.
    """

    counts: Tensor
    indices: Tensor
    q_len: int
    kv_len: int
    block_q: int = DEFAULT_BLOCK
    block_k: int = DEFAULT_BLOCK
    q_offset: int = 0

    @property
    def num_q_blocks(self) -> int:
        """Query blocks, the ragged last one included."""
        return num_blocks(self.q_len, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        """Key blocks, the ragged last one included."""
        return num_blocks(self.kv_len, self.block_k)

    def limits(self) -> Tensor:
        """Causal blocks of each query block, [Q] int64: the highest allowed index plus one."""
        return causal_limits(self.q_len, self.block_q, self.block_k, self.q_offset, self.counts.device)

    def density(self) -> float:
        """Kept blocks over causal blocks, over all batches and heads."""
        batch, heads, _ = self.counts.shape
        causal = int(self.limits().sum()) * batch * heads
        return float(self.counts.sum()) / causal

    def validate(self) -> BlockMask:
        """Return the mask itself, or raise MaskError naming the broken rule."""
        _check_layout(self)
        _check_lists(self)
        return self

    def to_dense(self) -> Tensor:
        """The same selection as bool [B, H, Q, Kb]: for tests, training, pictures; not for the hot path."""
        batch, heads, rows, width = self.indices.shape
        dense = torch.zeros(
            batch, heads, rows, self.num_k_blocks + 1, dtype=torch.bool, device=self.indices.device
        )
        slots = torch.arange(width, device=self.indices.device)
        kept = slots < self.counts[..., None]
        target = torch.where(kept, self.indices, self.num_k_blocks).long()
        return dense.scatter_(-1, target, True)[..., :-1]

    def within(self, window: int | None) -> BlockMask:
        """The mask without the blocks that lie wholly before the window of all rows of their query block."""
        if window is None:
            return self
        rows = torch.arange(self.counts.shape[2], device=self.indices.device)
        oldest = (self.q_offset + rows * self.block_q - window + 1)[:, None]
        is_gone = (self.indices >= 0) & ((self.indices + 1) * self.block_k <= oldest)
        num_gone = is_gone.sum(-1, dtype=torch.int32)
        counts = self.counts - num_gone
        width = max(1, int(counts.max()))
        slots = torch.arange(width, device=self.indices.device)
        places = (num_gone[..., None] + slots).clamp(max=self.indices.shape[3] - 1)
        indices = torch.where(slots < counts[..., None], self.indices.gather(-1, places), -1)
        return replace(self, counts=counts, indices=indices)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        *,
        q_len: int,
        kv_len: int,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
        q_offset: int = 0,
    ) -> BlockMask:
        """Compact a bool [B, H, Q, Kb]; raises MaskError where it selects a block ahead of its rows."""
        if dense.dtype != torch.bool or dense.dim() != 4:
            raise MaskError(f"dense is {dense.dtype} with {dense.dim()} dims; pass a bool [B, H, Q, Kb]")
        expected = (num_blocks(q_len, block_q), num_blocks(kv_len, block_k))
        if tuple(dense.shape[2:]) != expected:
            raise MaskError(f"dense has {tuple(dense.shape[2:])} blocks; these lengths need {expected}")
        counts = dense.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        order = torch.argsort(dense, dim=-1, descending=True, stable=True)[..., :width].to(torch.int32)
        slots = torch.arange(width, device=dense.device)
        indices = torch.where(slots < counts[..., None], order, -1).to(torch.int32)
        return cls(counts, indices, q_len, kv_len, block_q, block_k, q_offset).validate()

    @classmethod
    def causal(
        cls,
        q_len: int,
        kv_len: int | None = None,
        *,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
        q_offset: int = 0,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Every causal block, [1, 1, Q, Kb]: dense attention in the mask's own words."""
        kv_len = q_offset + q_len if kv_len is None else kv_len
        limits = causal_limits(q_len, block_q, block_k, q_offset, device)
        slots = torch.arange(num_blocks(kv_len, block_k), device=device)
        indices = torch.where(slots < limits[:, None], slots, -1).to(torch.int32)
        return cls(
            limits.to(torch.int32)[None, None], indices[None, None], q_len, kv_len, block_q, block_k, q_offset
        )


def num_blocks(length: int, block: int) -> int:
    """Blocks that cover `length` tokens."""
    return -(-length // block)


def causal_limits(
    q_len: int, block_q: int, block_k: int, q_offset: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Key blocks at or before the last row of each query block, [Q] int64."""
    ends = torch.arange(1, num_blocks(q_len, block_q) + 1, device=device) * block_q
    last_position = q_offset + ends.clamp(max=q_len) - 1
    return last_position // block_k + 1


def _check_layout(mask: BlockMask) -> None:
    for name, block in (("block_q", mask.block_q), ("block_k", mask.block_k)):
        if not BLOCK_MIN <= block <= BLOCK_MAX:
            raise MaskError(f"{name} is {block}; choose {BLOCK_MIN} to {BLOCK_MAX}")
    if mask.q_len < 1 or mask.q_offset < 0 or mask.q_offset + mask.q_len > mask.kv_len:
        raise MaskError(
            f"q_offset {mask.q_offset} + q_len {mask.q_len} must lie within kv_len {mask.kv_len}, "
            "with at least one row: every row sits on a key of its own"
        )
    if mask.counts.dtype != torch.int32 or mask.indices.dtype != torch.int32:
        raise MaskError(f"counts are {mask.counts.dtype}, indices {mask.indices.dtype}; both must be int32")
    if mask.indices.dim() != 4 or mask.counts.shape != mask.indices.shape[:3]:
        raise MaskError(
            f"counts {tuple(mask.counts.shape)} and indices {tuple(mask.indices.shape)} do not match; "
            "pass [B, H, Q] and [B, H, Q, K]"
        )
    if mask.counts.shape[2] != mask.num_q_blocks:
        raise MaskError(
            f"counts have {mask.counts.shape[2]} query blocks; q_len {mask.q_len} has {mask.num_q_blocks} "
            f"of {mask.block_q} rows"
        )


def _check_lists(mask: BlockMask) -> None:
    width = mask.indices.shape[3]
    if int(mask.counts.min()) < 0 or int(mask.counts.max()) > width:
        raise MaskError(
            f"counts must lie in 0..{width}, found {int(mask.counts.min())}..{int(mask.counts.max())}"
        )
    listed = torch.arange(width, device=mask.indices.device) < mask.counts[..., None]
    if bool(((mask.indices != -1) & ~listed).any()):
        raise MaskError("indices past their count must be -1")
    if bool(((mask.indices < 0) & listed).any()):
        raise MaskError("a listed index is negative")
    if bool(((mask.indices >= mask.limits()[:, None]) & listed).any()):
        raise MaskError("the mask looks ahead: a listed block starts after the last row of its query block")
    steps = mask.indices[..., 1:] - mask.indices[..., :-1]
    if bool(((steps <= 0) & listed[..., 1:]).any()):
        raise MaskError("indices must ascend without repeats")
