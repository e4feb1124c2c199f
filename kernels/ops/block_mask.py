"""The block selection: compact lists of key blocks, one list per query block.

Query row i sits at position `q_offset + i`; key j sits at position j. Query blocks are counted from row 0,
key blocks from key 0. A mask never looks ahead: no listed block starts after its query block's last row.
Inside the listed blocks attention stays causal token by token; that is the operations' job, not the mask's.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Masks of sequences laid end to end: `counts` [H, N], `indices` [H, N, K] over all their query blocks.

    Sequence s owns query rows cu_q[s] to cu_q[s + 1] and keys cu_k[s] to cu_k[s + 1], both int32; its rows
    sit on its last keys, so that a cached prefix is a longer key range. Blocks count from its own first key.
    """

    counts: Tensor
    indices: Tensor
    cu_q: Tensor
    cu_k: Tensor
    block_q: int = DEFAULT_BLOCK
    block_k: int = DEFAULT_BLOCK

    def block_tables(self) -> tuple[Tensor, Tensor]:
        """Each sequence's first query block [B + 1], each query block's sequence [N]: int32, no host sync."""
        lengths = (self.cu_q[1:] - self.cu_q[:-1] + self.block_q - 1) // self.block_q
        first_blocks = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        blocks = torch.arange(self.counts.shape[1], dtype=torch.int32, device=self.cu_q.device)
        seq_of_block = torch.searchsorted(first_blocks, blocks, right=True, out_int32=True) - 1
        return first_blocks, seq_of_block

    def unpack(self) -> list[BlockMask]:
        """Each sequence's own mask (reads the lengths on the host)."""
        first_blocks = self.block_tables()[0].tolist()
        ends_q, ends_k = self.cu_q.tolist(), self.cu_k.tolist()
        masks = []
        for i_seq in range(len(ends_q) - 1):
            part = slice(first_blocks[i_seq], first_blocks[i_seq + 1])
            q_len, kv_len = ends_q[i_seq + 1] - ends_q[i_seq], ends_k[i_seq + 1] - ends_k[i_seq]
            lists = (self.counts[None, :, part], self.indices[None, :, part])
            masks.append(BlockMask(*lists, q_len, kv_len, self.block_q, self.block_k, kv_len - q_len))
        return masks

    @classmethod
    def pack(cls, masks: Sequence[BlockMask]) -> PackedMask:
        """Lay masks of batch 1 end to end; MaskError where they do not fit together."""
        first = masks[0]
        shape = (1, first.counts.shape[1], first.block_q, first.block_k)
        for mask in masks:
            if (*mask.counts.shape[:2], mask.block_q, mask.block_k) != shape:
                raise MaskError("packed masks need batch 1, equal heads and equal block sizes")
            if mask.q_offset + mask.q_len != mask.kv_len:
                raise MaskError("the rows of a packed sequence sit on its last keys")
        width = max(mask.indices.shape[3] for mask in masks)
        padded = [
            torch.nn.functional.pad(mask.indices[0], (0, width - mask.indices.shape[3]), value=-1)
            for mask in masks
        ]
        ends_q, ends_k = (
            torch.tensor([0, *lengths], device=first.counts.device).cumsum(0).to(torch.int32)
            for lengths in ([mask.q_len for mask in masks], [mask.kv_len for mask in masks])
        )
        counts = torch.cat([mask.counts[0] for mask in masks], 1)
        return cls(counts, torch.cat(padded, 1), ends_q, ends_k, first.block_q, first.block_k)


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
