"""The scorer over a CPU's paged KV cache: features beside each full page, prompts and steps over pages.

A page is one key block, so that a block table names blocks. A page's features are a function of its keys and
of where it sits in its sequence: sequences that share a prefix share its pages and its features. Only full
pages have any, because only they can be left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.ops.limits import DECODE_ROWS_MAX
from sentei.kernels.ops.native.calls import gather_bytes_native, has_byte_scores
from sentei.kernels.ops.native.paged import (
    LANES,
    PageFeatures,
    Pages,
    PageScorer,
    decode_pages_native,
    encode_pages_native,
    fits_pages,
    prefill_pages_native,
)
from sentei.kernels.ops.registry import is_native_usable
from sentei.kernels.scorer.byte_keys import EncodedKeys, inverse_steps
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerError
from sentei.kernels.scorer.selection import Thresholds, score_blocks, select_blocks


@dataclass(frozen=True, slots=True)
class FullPages:
    """Pages that have just become full: which they are [n], and which block of their sequence [n]; int64."""

    pages: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[Tensor, int, int]], block: int) -> FullPages:
        """Find them among new tokens: by sequence its table [W], the first position and one past the last."""
        tables, found = [], []
        for table, first, last in spans:
            blocks = torch.arange(first // block, last // block)
            found.append(blocks)
            tables.append(table[first // block : last // block].long())
        if not found:
            return cls(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
        return cls(torch.cat(tables), torch.cat(found).to(tables[0].device))


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Single query tokens of a step, [N, 4] int64: token of the batch, sequence of the tables, position, cut.

    A cut is a row of all thresholds that the pages were given, one for each of them and each length bin.
    """

    packed: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int]], bin_edges: Sequence[int]) -> DecodeRows:
        """Lay rows side by side: token, sequence, position, which of the thresholds, all of these edges."""
        bins = len(bin_edges) + 1
        packed = [(token, at, pos, i * bins + bisect_right(bin_edges, pos)) for token, at, pos, i in rows]
        return cls(torch.tensor(packed, dtype=torch.long).reshape(-1, 4))


class CpuScorerPages:
    """One layer's scorer, and the features of all pages of its KV cache.

    Features are floats, `pooled` [P, Hkv, pools, E] fp32, or where scorer and processor allow it bytes:
    `cells` [P, Hkv, E / 4, block] int32, with `flaws` [P, Hkv], NaN where a feature is no number. Decode rows
    name one of `thresholds`.
    """

    def __init__(
        self,
        scorer: BlockScorer,
        rotary: RotaryTable,
        num_pages: int,
        *,
        thresholds: Sequence[Thresholds] = (),
    ) -> None:
        shape, device = scorer.shape, rotary.cos.device
        self.scorer = scorer
        self.rotary = rotary
        self.block = shape.block_tokens
        self._thresholds = tuple(thresholds)
        self._pools = shape.block_tokens // shape.pool_tokens
        self._columns = -(-shape.rank // LANES) * LANES
        self._width = self._columns + (shape.head_dim if shape.is_residual else 0)
        self._has_bytes = shape.is_single and has_byte_scores(shape.rank)
        heads, num_bytes = shape.kv_heads, num_pages if self._has_bytes else 0
        sizes = (num_pages - num_bytes, heads, self._pools, self._width)
        self.pooled = torch.zeros(sizes, device=device)
        cells = torch.zeros(num_bytes, heads, self._columns, self.block, dtype=torch.uint8, device=device)
        self.cells = cells.view(torch.int32).view(num_bytes, heads, self._columns // 4, self.block)
        self.flaws = torch.zeros(num_bytes, heads, device=device)
        self._program: PageScorer | None = None

    @torch.no_grad()
    def update(self, keys: Tensor, full: FullPages) -> None:
        """Encode pages that have become full; keys [P, Hkv, block, D] already hold their tokens."""
        self._check_pages(keys)
        if not full.pages.numel():
            return
        if self.scorer.has_native_program and self._is_packed(keys):
            encode_pages_native(
                keys.transpose(2, 3), full.pages, full.blocks, self._features(), self._native()
            )
            return
        near = keys[full.pages].float()  # [n, Hkv, block, D]
        encoded = self._encode_keys(near, full.blocks, keys.dtype)
        if self._has_bytes:
            self._put_bytes(full.pages, encoded.float())
        else:
            self.pooled[full.pages, ..., : encoded.shape[3]] = encoded.to(self.pooled.dtype)

    def read(self, table: Tensor, kv_len: int) -> EncodedKeys:
        """Return one sequence's features of full pages, [1, Hkv, P, E], or as bytes that a prompt reads."""
        pages = table[: kv_len // self.block]
        if not self._has_bytes:
            found = self.pooled[pages.long()].transpose(0, 1).flatten(1, 2)[None]
            return found[..., : self.scorer.shape.num_features].contiguous()
        if is_native_usable(self.cells.device.type, self.block):
            return gather_bytes_native(
                pages.int().contiguous(), self.cells, self.flaws, self.scorer.shape.rank
            )
        return self._floats_of_bytes(pages.long())

    @torch.no_grad()
    def decode(
        self, q: Tensor, rows: DecodeRows, cache: PagedCache, out: Tensor, *, fault: Fault | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from tokens of q [T, Hq, D], each up to its position in a sequence of `cache`, into out.

        Returns how many blocks each head read, [N, Hq] int32, and the LSE over them, [N, Hq]; -1, and NaN for
        LSE and output, where a score is NaN.
        """
        self._check_pages(cache.keys)
        if fault is None and self.has_native_decode(cache):
            pages = Pages(cache.keys.transpose(2, 3), cache.values)
            return decode_pages_native(
                q, rows.packed, cache.page_table, pages, self._features(), self._native(), out
            )
        return self.decode_one_by_one(q, rows, cache, out, fault)

    def decode_one_by_one(
        self, q: Tensor, rows: DecodeRows, cache: PagedCache, out: Tensor, fault: Fault | None = None
    ) -> tuple[Tensor, Tensor]:
        """The definition: each row through the operations that a prefill uses."""
        kept = torch.empty(len(rows.packed), q.shape[1], dtype=torch.int32, device=q.device)
        lse = torch.full(kept.shape, torch.nan, device=q.device)
        num_bins = len(self._thresholds[0].bin_edges) + 1
        for i, (token, sequence, position, cut) in enumerate(rows.packed.tolist()):
            one, length = q[token][None, :, None], position + 1
            k, v = (part[:, :, :length] for part in cache.read(sequence))
            pooled = self.read(cache.page_table[sequence], length)
            try:
                shares, starts = self.score_prompt(one, k, pooled, self.block)
            except ScorerError:
                out[token], kept[i] = torch.nan, -1
                continue
            shares = shares if fault is None else fault.shift(shares, starts)
            mask = select_blocks(
                shares, self._thresholds[cut // num_bins], starts=starts, q_len=1, kv_len=length,
                q_offset=length - 1, block_q=self.block, block_k=self.block,
            )  # fmt: skip
            found, sums = attend(one, k, v, mask, scale=self.scorer.scale, return_lse=True)
            assert sums is not None
            out[token], lse[i], kept[i] = found[0, :, 0], sums[0, :, 0], mask.counts[0, :, 0]
        return kept, lse

    @torch.no_grad()
    def attend_prompt(self, q: Tensor, cache: PagedCache, mask: BlockMask, out: Tensor) -> Tensor:
        """Attend from q [Tq, Hq, D], the newest rows of the one sequence in `cache`, over a mask into out.

        Returns the LSE over what each row read, [Hq, Tq].
        """
        is_long = q.shape[0] > DECODE_ROWS_MAX and q.stride(-1) == 1 and out.stride(-1) == 1
        if is_long and self._has_packed_pages(cache):
            pages = Pages(cache.keys.transpose(2, 3), cache.values)
            return prefill_pages_native(q, pages, cache.page_table[0], mask, self.scorer.scale, out)
        by_head, lse = attend(
            q.transpose(0, 1)[None], *cache.read(0), mask, scale=self.scorer.scale, return_lse=True
        )
        assert lse is not None
        out.copy_(by_head[0].transpose(0, 1))
        return lse[0]

    def score_prompt(self, q: Tensor, k: Tensor, pooled: EncodedKeys, block_q: int) -> tuple[Tensor, Tensor]:
        """Do what `score_blocks` does from the features that `read` gave."""
        return score_blocks(self.scorer, q, k, pooled, table=self.rotary, block_q=block_q)

    def has_native_decode(self, cache: PagedCache) -> bool:
        """Whether all decode rows run in one call of the CPU program."""
        return self.scorer.has_native_program and self._has_packed_pages(cache)

    def _has_packed_pages(self, cache: PagedCache) -> bool:
        return self._is_packed(cache.keys) and cache.values.stride()[2:] == (cache.values.shape[3], 1)

    def _is_packed(self, keys: Tensor) -> bool:
        """Whether keys [P, Hkv, block, D] lie as the programs read them."""
        dim, is_fit = keys.shape[3], keys.stride()[2:] == (1, self.block)
        return is_fit and is_native_usable(keys.device.type, self.block) and fits_pages(dim, self.block)

    def _features(self) -> PageFeatures:
        return PageFeatures(self.pooled, self.cells, self.flaws)

    def _native(self) -> PageScorer:
        if self._program is None:
            query_maps = self.scorer.scaled_query_map().detach().float()
            inverse = torch.empty(0)
            if self._has_bytes:
                group = self.scorer.shape.query_heads // self.scorer.shape.kv_heads
                query_maps = query_maps * self._key_steps().repeat_interleave(group, dim=0)[:, None]
                inverse = self._pad(inverse_steps(self.scorer))
            maps, key_maps = self._pad(query_maps), self._pad(self.scorer.key_map.detach().float())
            blocks = torch.arange(self.rotary.length // self.block + 2)
            self._program = PageScorer(
                maps,
                key_maps,
                self.scorer.query_gains().detach().float().contiguous(),
                self.scorer.bias(blocks).detach().float().contiguous(),
                self.rotary.cos.float().contiguous(),
                self.rotary.sin.float().contiguous(),
                torch.cat([self._cuts(one) for one in self._thresholds] or [torch.empty(0)]),
                inverse,
                self.scorer.scale,
                self.scorer.shape.pool_tokens,
            )
        return self._program

    def _pad(self, part: Tensor) -> Tensor:
        """The last axis, of dimensions, filled up with zeros to whole vectors."""
        return torch.nn.functional.pad(part, (0, self._columns - part.shape[-1])).contiguous()

    def _cuts(self, thresholds: Thresholds) -> Tensor:
        """One row for each length bin, one column for each query head."""
        shares = thresholds.log_share.float()
        bins = torch.arange(len(thresholds.bin_edges) + 1).clamp_max(shares.shape[1] - 1)
        heads = self.scorer.shape.query_heads
        return shares[:, bins].repeat_interleave(heads // shares.shape[0], dim=0).T.contiguous()

    def _encode_keys(self, near: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Features [n, Hkv, pools, features] of full pages' keys [n, Hkv, block, D], in `dtype`."""
        shape = self.scorer.shape
        num, heads = near.shape[:2]
        by_head = near.transpose(0, 1)  # [Hkv, n, block, D]
        positions = blocks[:, None] * self.block + torch.arange(self.block, device=blocks.device)
        plain = unrotate(by_head, positions, self.rotary)
        # As beside a cache of one sequence: means are rounded on their way, single keys are not.
        between = torch.float32 if shape.is_single else dtype
        pooled, plain = (
            pool_tokens(part, shape.pool_tokens).reshape(1, heads, num * self._pools, -1).to(between)
            for part in (by_head, plain)
        )
        encoded = self.scorer.encode_keys(pooled, plain).to(dtype)
        return encoded.view(heads, num, self._pools, -1).transpose(0, 1)

    def _put_bytes(self, pages: Tensor, encoded: Tensor) -> None:
        """Keep features [n, Hkv, block, rank] as bytes, in the scorer's steps."""
        units = encoded * inverse_steps(self.scorer)[:, None]
        self.flaws[pages] = torch.where(units.isfinite().all(dim=3).all(dim=2), 0.0, torch.nan)
        whole = units.nan_to_num_(0.0).round_().clamp_(-127.0, 127.0).add_(128.0)
        whole = torch.nn.functional.pad(whole, (0, self._columns - whole.shape[3]), value=128.0)
        cells = whole.to(torch.uint8).view(*whole.shape[:3], -1, 4)
        self.cells[pages] = cells.transpose(2, 3).contiguous().view(torch.int32)[..., 0]

    def _floats_of_bytes(self, pages: Tensor) -> Tensor:
        """What bytes stand for, where the program that reads them has been given up: [1, Hkv, P, rank]."""
        cells = self.cells[pages].transpose(0, 1)  # [Hkv, W, cells, block]
        units = cells.contiguous()[..., None].view(torch.uint8).float() - 128.0
        features = units.permute(0, 1, 3, 2, 4).flatten(3) + self.flaws[pages].T[:, :, None, None]
        features = features[..., : self.scorer.shape.rank] * self._key_steps()[:, None, None]
        return features.flatten(1, 2)[None]

    def _key_steps(self) -> Tensor:
        assert self.scorer.key_steps is not None
        return self.scorer.key_steps.float()

    def _check_pages(self, keys: Tensor) -> None:
        if keys.shape[2] != self.block:
            raise ShapeError(
                f"pages hold {keys.shape[2]} tokens, the scorer's blocks {self.block}; they must be equal"
            )
