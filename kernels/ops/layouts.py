"""Where a batch's sequences lie: laid end to end with packed masks, or in the pages of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import DEFAULT_BLOCK, BlockMask
from sentei.kernels.ops.errors import MaskError


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


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Keys [P, Hkv, page, D] and values [P, Hkv, page, Dv] in pages, and who owns which.

    Token t of sequence b lies in page `page_table[b, t // page]` at `t % page`; it has `lengths[b]` tokens.
    Table and lengths are int32. A sequence of length 0 is an empty slot of the batch.
    """

    keys: Tensor
    values: Tensor
    page_table: Tensor
    lengths: Tensor

    def read(self, i_seq: int) -> tuple[Tensor, Tensor]:
        """One sequence's keys [1, Hkv, T, D] and values, copied side by side (a host sync)."""
        length, page = int(self.lengths[i_seq]), self.keys.shape[2]
        pages = self.page_table[i_seq, : -(-length // page)].long()
        keys, values = (
            pool[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for pool in (self.keys, self.values)
        )
        return keys, values


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Blocks that each sequence's newest tokens read: `counts` [B, H], rising `indices` [B, H, K], int32."""

    counts: Tensor
    indices: Tensor
    block_k: int = DEFAULT_BLOCK
