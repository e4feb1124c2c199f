"""The attention backend: vLLM's own for sliding layers and dense rows, ours for rows that a rung thins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from sentei.kernels.hf.ladder import Rung
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.scorer.byte_keys import EncodedKeys
from sentei.kernels.scorer.cpu_pages import CpuScorerPages, DecodeRows, FullPages
from sentei.kernels.scorer.page_mass import dropped_over_pages
from sentei.kernels.scorer.selection import keep_before, select_blocks
from sentei.serving.vllm.layout import CpuPages, DenseRows, attend_dense, pick_rows
from sentei.serving.vllm.plan import Part, StepPlan, measured_rows, plan_step
from sentei.serving.vllm.rows import NOBODY
from sentei.serving.vllm.state import WorkerState, find_state

CPU = torch.device("cpu")


@dataclass
class StepLayout:
    """A plan with the tensors that say where its rows lie; made once for all layers that share it."""

    plan: StepPlan
    block_table: Tensor
    lengths: Tensor
    dtype: torch.dtype
    state: WorkerState

    @cached_property
    def dense_rows(self) -> DenseRows:
        """The dense parts as vLLM's kernel takes them."""
        spans = [(part.index, part.token, part.num_tokens, part.last) for part in self.plan.dense]
        return pick_rows(spans, self.block_table, self.dtype)

    @cached_property
    def full_pages(self) -> FullPages:
        """Pages whose last token comes with this step."""
        spans = [(self.block_table[part.index], part.first, part.last) for part in self.plan.fed]
        return FullPages.of(spans, self.state.block_tokens)

    @cached_property
    def singles(self) -> DecodeRows:
        """Tokens that choose alone, of all rungs."""
        rows = [
            (part.token, part.index, part.first, self.state.rung_index(part.rung))
            for part in self.plan.singles
        ]
        return DecodeRows.of(rows, self.state.ladder.bin_edges_tokens)

    @cached_property
    def weights(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """How the time of features, of dense rows and of single tokens is shared out."""
        plan = self.plan
        return (
            _weights(plan.fed, lambda part: part.num_tokens),
            _weights(plan.dense, lambda part: part.num_tokens * part.last),
            _weights(plan.singles, lambda part: part.last),
        )

    @cached_property
    def causal(self) -> dict[str, list[tuple[str, float, bool]]]:
        """Blocks in sight of dense rows and of single tokens, of requests that asked for a rung."""
        block_q, block_k = self.state.ladder.query_block_tokens, self.state.block_tokens
        return {
            "dense": causal_blocks(self.plan.dense, block_q, block_k),
            "singles": causal_blocks(self.plan.singles, 1, block_k),
        }


@dataclass
class SenteiMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the step's rows; none where nobody asked for a rung."""

    parts: tuple[Part, ...] = ()
    prompt_ends: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    layouts: dict[frozenset[str], StepLayout] = field(default_factory=dict)

    @cached_property
    def rungs(self) -> list[Rung]:
        """The rungs that were asked for."""
        return list({part.rung.id: part.rung for part in self.parts if not part.rung.is_dense}.values())

    def layout(self, state: WorkerState, layer: int) -> StepLayout:
        """Return the step's layout in a layer; layers that the same rungs thin share it."""
        thinning = frozenset(rung.id for rung in self.rungs if state.thins(rung, layer))
        if thinning not in self.layouts:
            block_q = state.ladder.query_block_tokens
            plan = plan_step(self.parts, self.prompt_ends, thinning, block_q=block_q)
            table = self.block_table.contiguous()
            self.layouts[thinning] = StepLayout(plan, table, self.seq_lens, self.dtype, state)
        return self.layouts[thinning]


class SenteiBuilder(CPUAttentionMetadataBuilder):
    """Adds the plan to a step's metadata."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._state = find_state(vllm_config, CPU)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build vLLM's metadata, then ours."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._state is None:
            return stock
        parts, ends = self._read_rows(common_attn_metadata)
        self._state.meter.set_rows({part.ticket: part.num_tokens for part in parts if part.ticket})
        if all(part.rung.is_dense for part in parts):
            return stock
        return SenteiMetadata(
            **vars(stock),
            parts=tuple(parts),
            prompt_ends=tuple(ends),
            dtype=self.dtype,
        )

    def _read_rows(self, common: Any) -> tuple[list[Part], list[int]]:
        assert self._state is not None
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        parts, ends = [], []
        for index in range(common.num_reqs):
            row = self._state.rows.get(index, NOBODY)
            num = starts[index + 1] - starts[index]
            rung = self._state.ladder.find(row.asked.rung)
            first, last, end = lengths[index] - num, lengths[index], row.user_prompt_tokens
            self._state.ends[index] = last
            measured: tuple[int, ...] = ()
            if row.asked.forced and not rung.is_dense:
                closing = rung.last_from(end, self._state.ladder.query_block_tokens)
                served = len(row.asked.forced)
                measured = measured_rows(first, last, closing=closing, end=end, served=served)
            parts.append(Part(index, row.asked.ticket, rung, starts[index], first, last, measured))
            ends.append(end)
        return parts, ends


class SenteiImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = find_state(get_current_vllm_config(), CPU)
        self._layer: int | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *scales: Tensor | None, **named_scales: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend; keys and values of this step are in the cache already."""
        state, index = self._state, self._index(layer)
        is_ours = isinstance(attn_metadata, SenteiMetadata) and self.sliding_window == -1
        if state is None or not is_ours or index not in state.scorers:
            return self._stock(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales
            )
        layout = attn_metadata.layout(state, index)
        if layout.full_pages.pages.numel() or not layout.plan.thins_nothing:
            call = LayerCall(self, state, layer, index, CpuPages.of(kv_cache, layer.isa), layout)
            call.feed(kv_cache)
            if not layout.plan.thins_nothing:
                call.run(query, key, kv_cache, output.view(-1, self.num_heads, self.head_size))
                return output
        note_dense(state, index, layout, self.num_heads)
        return self._stock(layer, query, key, value, kv_cache, attn_metadata, output)

    def _index(self, layer: Any) -> int:
        if self._layer is None:
            self._layer = layer_index(layer.layer_name)
        return self._layer

    def _stock(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = super().forward(*args, **kwargs)
        return found


class SenteiBackend(CPUAttentionBackend):
    """What the registry hands to vLLM."""

    @staticmethod
    def get_impl_cls() -> type[SenteiImpl]:
        """Return the layer's class."""
        return SenteiImpl

    @staticmethod
    def get_builder_cls() -> type[SenteiBuilder]:
        """Return the metadata's builder."""
        return SenteiBuilder


def layer_index(name: str) -> int:
    """Return the number in a layer's name, such as model.layers.7.self_attn.attn."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def causal_blocks(parts: Sequence[Part], block_q: int, block_k: int) -> list[tuple[str, float, bool]]:
    """Say whose rows have how many blocks in sight, of requests with a rung, and whether it is one row."""
    return [
        (part.ticket, part.causal_blocks(block_q, block_k), part.num_tokens == 1)
        for part in parts
        if not part.rung.is_dense
    ]


def note_dense(state: WorkerState, layer: int, layout: StepLayout, heads: int) -> None:
    """Count the rows of a layer that keep everything, and that measured ones among them drop nothing."""
    state.meter.note_dense(layer, layout.causal["dense"])
    for part in layout.plan.dense:
        if part.measured:
            state.meter.note_dropped(part.ticket, [0.0] * (len(part.measured) * heads))


@dataclass(slots=True)
class LayerCall:
    """One attention call of one layer in which some rows are thinned, now or once they are longer."""

    impl: SenteiImpl
    state: WorkerState
    layer: Any
    index: int
    pages: CpuPages
    layout: StepLayout

    def feed(self, kv_cache: Tensor) -> None:
        """Keep the features of pages that this step fills, also of rows too short to be thinned yet."""
        full = self.layout.full_pages
        if full.pages.numel():
            with self.state.meter.attention(self.layout.weights[0]):
                self.state.pages(self.index, kv_cache).update(self.pages.keys, full)

    def run(self, query: Tensor, key: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        """Fill output [tokens, Hq, D]."""
        meter, layout, plan = self.state.meter, self.layout, self.layout.plan
        scorer = self.state.pages(self.index, kv_cache)
        if plan.dense:
            with meter.attention(layout.weights[1]):
                attend_dense(self.impl, self.layer, query, kv_cache, layout.dense_rows, output)
            note_dense(self.state, self.index, layout, self.impl.num_heads)
        for part in plan.prompts:
            table = layout.block_table[part.index : part.index + 1]
            cache = self.pages.batch(table, torch.tensor([part.last], dtype=torch.int32))
            with meter.attention({part.ticket: 1.0}):
                lse = self._attend_prompt(scorer, part, cache, query, key, output)
            self._measure(part, query, lse.T, cache, 0)
        if plan.singles:
            with meter.attention(layout.weights[2]):
                cache = self.pages.batch(layout.block_table, layout.lengths)
                kept, lse = scorer.decode(query, layout.singles, cache, output, fault=self.state.fault)
            for i, part in enumerate(plan.singles):
                self._measure(part, query, lse[i : i + 1], cache, part.index)
            heads = kept.shape[1]
            for (ticket, causal, _), blocks in zip(
                layout.causal["singles"], kept.clamp_min(0).sum(dim=1).tolist(), strict=True
            ):
                meter.note_blocks(ticket, self.index, kept=blocks / heads, causal=causal, is_single=True)

    def _attend_prompt(
        self,
        scorer: CpuScorerPages,
        part: Part,
        cache: PagedCache,
        query: Tensor,
        key: Tensor,
        output: Tensor,
    ) -> Tensor:
        tokens, table = slice(part.token, part.token + part.num_tokens), cache.page_table[0]
        keys = self.pages.near_keys(table, key[tokens].transpose(0, 1), part.first)
        q = query[tokens]
        mask = self._choose(scorer, part, q.transpose(0, 1)[None], keys, scorer.read(table, part.last))
        lse = scorer.attend_prompt(q, cache, mask, output[tokens])
        kept, causal = float(mask.counts.sum()) / mask.counts.shape[1], float(mask.limits().sum())
        self.state.meter.note_blocks(part.ticket, self.index, kept=kept, causal=causal, is_single=False)
        return lse

    def _measure(self, part: Part, query: Tensor, lse: Tensor, cache: PagedCache, sequence: int) -> None:
        """Note what measured rows of a part dropped; lse [n, Hq] is of all its rows."""
        if not part.measured:
            return
        with self.state.meter.unpaid():
            positions = torch.tensor(part.measured)
            rows = positions - part.first
            dropped = dropped_over_pages(
                query[part.token + rows], lse[rows], positions, cache, sequence, self.impl.scale
            )
            self.state.meter.note_dropped(part.ticket, dropped.flatten().tolist())

    def _choose(
        self, scorer: CpuScorerPages, part: Part, q: Tensor, k: Tensor, pooled: EncodedKeys
    ) -> BlockMask:
        block_q = self.state.ladder.query_block_tokens
        shares, starts = scorer.score_prompt(q, k, pooled, block_q)
        if self.state.fault is not None:
            shares = self.state.fault.shift(shares, starts)
        shares = keep_before(shares, starts, part.rung.break_even_tokens)
        if part.num_tokens % block_q == 1:  # the prompt's last row alone chooses as a decode step does
            last = keep_before(shares[:, :, -1:], starts[-1:], part.rung.step_break_even_tokens())
            shares = torch.cat((shares[:, :, :-1], last), dim=2)
        thresholds = self.state.thresholds(part.rung, self.index)
        return select_blocks(
            shares, thresholds, starts=starts, q_len=part.num_tokens, kv_len=part.last, q_offset=part.first,
            block_q=block_q, block_k=scorer.block,
        )  # fmt: skip


def _weights(parts: Sequence[Part], weigh: Callable[[Part], int]) -> dict[str, float]:
    """Sum a weight of parts by ticket."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.ticket] = found.get(part.ticket, 0.0) + float(weigh(part))
    return found
