"""The scorer over a paged KV cache on GPUs, and its definition: decode that reads only what it chooses.

CPUs have a program of their own for pages (cpu_pages.py).

A page is one key block, so that a block table names blocks. A page's features are a function of its keys and
of where it sits in its sequence: sequences that share a prefix share its pages and its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.native.paged import LANES
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.registry import takes_triton
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerError
from sentei.kernels.scorer.pooled_cache import pool_keys
from sentei.kernels.scorer.selection import Thresholds, per_head_thresholds, score_blocks, select_blocks


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: positions `first` to `last` - 1, whose pages `table` [W] names."""

    table: Tensor
    first: int
    last: int


class ScorerPages:
    """One layer's scorer and the features of all pages: [P, Hkv, pools, features], padded for the program."""

    def __init__(
        self,
        scorer: BlockScorer,
        rotary: RotaryTable,
        num_pages: int,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        """`dtype` is that of the features; None: fp32 on a CPU, bf16 on a GPU."""
        shape = scorer.shape
        self.scorer = scorer
        self._backend = backend
        self.rotary = rotary
        self.block = shape.block_tokens
        self._pools = shape.block_tokens // shape.pool_tokens
        device = scorer.distance_bias.device
        distances = torch.arange(rotary.length // self.block + 2, device=device)
        self._bias = scorer.bias(distances).detach().float().contiguous()
        padded = -(-shape.num_features // LANES) * LANES
        if dtype is None:
            dtype = torch.float32 if rotary.cos.device.type == "cpu" else torch.bfloat16
        # One page more than there are: empty slots of a batch write there.
        room = (num_pages + 1, shape.kv_heads, self._pools, padded)
        self._room = torch.zeros(room, device=rotary.cos.device, dtype=dtype)
        self.pooled = self._room[:num_pages]

    @torch.no_grad()
    def update(self, keys: Tensor, spans: Sequence[Span]) -> None:
        """Encode the pools that these tokens complete; keys [P, Hkv, block, D] already hold the tokens."""
        self._check_pages(keys)
        singles = [span for span in spans if span.last - span.first == 1]
        for span in spans:
            if span.last - span.first > 1:
                self._update_span(keys, span)
        self._update_singles(keys, singles)

    def read(self, table: Tensor, kv_len: int) -> Tensor:
        """Return one sequence's features of full pools, [1, Hkv, P, E]."""
        num = kv_len // self.scorer.shape.pool_tokens
        pages = table[: -(-num // self._pools)].long()
        found = self.pooled[pages].transpose(0, 1).flatten(1, 2)[None, :, :num]
        return found[..., : self.scorer.shape.num_features].contiguous()

    @torch.no_grad()
    def decode(
        self,
        q: Tensor,
        cache: PagedCache,
        thresholds: Thresholds,
        out: Tensor,
        *,
        fault: Fault | None = None,
    ) -> Tensor:
        """Attend from single tokens q [N, Hq, D], each the newest of its sequence in `cache`, into out.

        Returns how many blocks each head read, [N, Hq] int32; -1 and an output of NaN where a score is NaN.
        """
        self._check_pages(cache.keys)
        positions = cache.lengths.long() - 1
        cut = per_head_thresholds(thresholds, positions, q.shape[1])[..., 0].T
        if fault is None and self._takes_triton(q):
            return self._decode_in_triton(q, cache, cut, out)
        if q.device.type != "cpu":
            return self.decode_together(q, cache, cut, out, fault)
        return self._decode_one_by_one(q, cache, thresholds, out, fault)

    @torch.no_grad()
    def update_step(self, keys: Tensor, page_table: Tensor, lengths: Tensor) -> None:
        """Encode the pool of each sequence's newest token; page_table [N, W], lengths [N]: no host sync.

        A pool that is not full yet is written all the same: it lies in the newest block, which nobody scores,
        and is written again. Empty slots of the batch change nothing.
        """
        self._check_pages(keys)
        size = self.scorer.shape.pool_tokens
        pool = (lengths.long() - 1).clamp_min(0) // size
        pages = page_table.long().gather(1, pool[:, None] // self._pools)[:, 0].clamp_min(0)
        tokens = pool[:, None] * size % self.block + torch.arange(size, device=keys.device)
        newest = keys[pages[:, None], :, tokens].transpose(1, 2)  # [N, Hkv, size, D]
        if self._takes_triton(keys):
            from sentei.kernels.scorer.launches import encode_pools

            encoded = encode_pools(self.scorer, newest, (pool + 1) * size, self.rotary)[:, :, 0]
        else:
            positions = pool[:, None] * size + torch.arange(size, device=keys.device)
            by_head = newest.float().transpose(0, 1)  # [Hkv, N, size, D]
            plain = unrotate(by_head, positions.clamp_max(self.rotary.length - 1), self.rotary)
            pooled, plain = (pool_tokens(part, size)[:, :, 0][None] for part in (by_head, plain))
            encoded = self.scorer.encode_keys(pooled, plain)[0].transpose(0, 1)
        pages = torch.where(lengths > 0, pages, self.pooled.shape[0])
        self._put(pages, pool % self._pools, encoded)

    def _decode_in_triton(self, q: Tensor, cache: PagedCache, cut: Tensor, out: Tensor) -> Tensor:
        """All rows at once, a list for each KV group, thresholds `cut` [N, Hq]; the host reads nothing."""
        from sentei.kernels.scorer.launches import choose_step

        tokens = q[:, :, None]
        lists, is_odd = choose_step(self.scorer, tokens, cache, self.pooled, self.rotary, cut)
        found, _ = attend_paged(tokens, cache, lists, scale=self.scorer.scale, backend=self._backend)
        group = q.shape[1] // lists.counts.shape[1]
        is_broken = is_odd.repeat_interleave(group, dim=1) > 0
        out.copy_(found[:, :, 0].masked_fill(is_broken[..., None], torch.nan))
        return lists.counts.repeat_interleave(group, dim=1).masked_fill(is_broken, -1)

    @torch.no_grad()
    def decode_together(
        self, q: Tensor, cache: PagedCache, cut: Tensor, out: Tensor, fault: Fault | None = None
    ) -> Tensor:
        """The same in torch for a GPU, a list for each head: all rows at once; the host reads nothing.

        `cut` [N, Hq] are the thresholds. For faults, scores without a kernel, and where Triton is missing.
        """
        positions = cache.lengths.long() - 1
        shares = self._shares_together(q, cache, positions)  # [N, Hq, W]
        is_broken = torch.isnan(shares).any(dim=2).any(dim=1) & (positions >= 0)
        if fault is not None:
            shares = fault.shift(shares.transpose(0, 1)[None], positions)[0].transpose(0, 1)
        index = torch.arange(shares.shape[2], device=q.device)
        own = (positions // self.block)[:, None, None]
        keep = ((shares > cut[..., None]) | (index == 0) | (index == own)) & (index <= own)
        counts = keep.sum(dim=2, dtype=torch.int32)
        order = torch.argsort(keep.to(torch.int8), dim=2, descending=True, stable=True).to(torch.int32)
        lists = BlockLists(counts, order.masked_fill(index >= counts[..., None], -1), self.block)
        found, _ = attend_paged(q[:, :, None], cache, lists, scale=self.scorer.scale)
        out.copy_(found[:, :, 0].masked_fill(is_broken[:, None, None], torch.nan))
        return counts.masked_fill(is_broken[:, None], -1)

    def _shares_together(self, q: Tensor, cache: PagedCache, positions: Tensor) -> Tensor:
        """Log shares of single tokens, [N, Hq, W]: -inf for sink, own block and what lies ahead."""
        table, rows = cache.page_table.clamp_min(0).long(), len(q)
        kv_heads, group = cache.keys.shape[1], q.shape[1] // cache.keys.shape[1]
        features = self._encode(q, positions.clamp_min(0))[:, :, None]
        pooled = self.pooled[table].float().transpose(1, 2).flatten(2, 3)  # [N, Hkv, W * pools, features]
        logits = self.scorer.block_logits(features, pooled)[:, :, 0]
        own = (positions // self.block).clamp_min(0)
        index = torch.arange(logits.shape[2], device=q.device)
        distances = own[:, None] - index
        bias = self._bias[:, distances.clamp(0, self._bias.shape[1] - 1)].transpose(0, 1)
        is_closed = ((index < 1) | (distances < 1))[:, None]
        logits = (logits + bias).masked_fill(is_closed, -torch.inf)
        by_group = q.view(rows, kv_heads, group, -1)
        in_page = torch.arange(self.block, device=q.device)

        def weigh(pages: Tensor, last: Tensor) -> Tensor:
            """LSE of the tokens 0 to `last` [N] of a page each [N]: [N, Hq]."""
            scores = (by_group @ cache.keys[pages].transpose(2, 3)).float() * self.scorer.scale
            is_ahead = (in_page > last[:, None])[:, None, None]
            return scores.masked_fill(is_ahead, -torch.inf).logsumexp(dim=3).flatten(1, 2)

        near = weigh(table.gather(1, own[:, None])[:, 0], positions % self.block)
        sink = weigh(table[:, 0], torch.full_like(positions, self.block - 1))
        forced = torch.where(own[:, None] > 0, torch.logaddexp(near, sink), near)
        return logits - torch.logaddexp(logits.logsumexp(dim=2), forced)[..., None]

    def _decode_one_by_one(
        self, q: Tensor, cache: PagedCache, thresholds: Thresholds, out: Tensor, fault: Fault | None
    ) -> Tensor:
        """The definition: each row through the operations that a prefill uses."""
        kept = torch.empty(q.shape[:2], dtype=torch.int32, device=q.device)
        for i, length in enumerate(cache.lengths.tolist()):
            one = q[i][None, :, None]
            k, v = cache.read(i)
            pooled = self.read(cache.page_table[i], length)
            try:
                shares, starts = score_blocks(
                    self.scorer, one, k, pooled, table=self.rotary, block_q=self.block
                )
            except ScorerError:
                out[i], kept[i] = torch.nan, -1
                continue
            shares = shares if fault is None else fault.shift(shares, starts)
            mask = select_blocks(
                shares, thresholds, starts=starts, q_len=1, kv_len=length, q_offset=length - 1,
                block_q=self.block, block_k=self.block,
            )  # fmt: skip
            out[i] = attend(one, k, v, mask, scale=self.scorer.scale)[0][0, :, 0]
            kept[i] = mask.counts[0, :, 0]
        return kept

    def _encode(self, q: Tensor, positions: Tensor) -> Tensor:
        """Features of single tokens, [N, Hq, padded]."""
        by_head = q.float().transpose(0, 1)[None]
        plain = unrotate(by_head, positions, self.rotary)
        found = self.scorer.encode_queries(by_head, plain)[0].transpose(0, 1)
        return torch.nn.functional.pad(found, (0, self.pooled.shape[3] - found.shape[2]))

    def _update_span(self, keys: Tensor, span: Span) -> None:
        size = self.scorer.shape.pool_tokens
        first, last = span.first // size * size, span.last // size * size
        if last <= first:
            return
        page0 = first // self.block
        pages = span.table[page0 : -(-last // self.block)].long()
        near = keys[pages].transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, tokens, D]
        near = near[:, :, first - page0 * self.block : last - page0 * self.block].float().contiguous()
        pooled, plain = pool_keys(near, first, self.rotary, self.scorer.shape)
        encoded = self.scorer.encode_keys(pooled, plain)[0].transpose(0, 1)  # [pools, Hkv, E]
        pools = torch.arange(first // size, last // size, device=keys.device)
        self._put(span.table[pools // self._pools].long(), pools % self._pools, encoded)

    def _update_singles(self, keys: Tensor, spans: Sequence[Span]) -> None:
        size = self.scorer.shape.pool_tokens
        done = [span for span in spans if span.last % size == 0]
        if not done:
            return
        ends = torch.tensor([span.last for span in done], device=keys.device)
        pages = torch.stack([span.table[(span.last - 1) // self.block] for span in done]).long()
        positions = ends[:, None] - size + torch.arange(size, device=keys.device)  # [n, size]
        tokens = keys[pages[:, None], :, positions % self.block].float()  # [n, size, Hkv, D]
        by_head = tokens.permute(2, 0, 1, 3)  # [Hkv, n, size, D]
        plain = unrotate(by_head, positions, self.rotary)
        pooled, plain = (pool_tokens(part, size)[:, :, 0][None] for part in (by_head, plain))
        encoded = self.scorer.encode_keys(pooled, plain)[0].transpose(0, 1)
        self._put(pages, (ends - 1) % self.block // size, encoded)

    def _put(self, pages: Tensor, pools: Tensor, encoded: Tensor) -> None:
        self._room[pages, :, pools, : encoded.shape[-1]] = encoded.to(self.pooled.dtype)

    def _takes_triton(self, tensor: Tensor) -> bool:
        return self.scorer.has_native_program and takes_triton(self._backend, tensor.device)

    def _check_pages(self, keys: Tensor) -> None:
        if keys.shape[2] != self.block:
            raise ShapeError(
                f"pages hold {keys.shape[2]} tokens, the scorer's blocks {self.block}; they must be equal"
            )
