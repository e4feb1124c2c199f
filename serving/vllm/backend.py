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

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.selection import keep_before, score_blocks, select_blocks
from sentei.serving.vllm.layout import CpuPages, DenseRows, attend_dense, pick_rows
from sentei.serving.vllm.plan import Part, StepPlan, plan_step
from sentei.serving.vllm.rows import NOBODY
from sentei.serving.vllm.state import WorkerState, find_state

CPU = torch.device("cpu")


@dataclass
class StepLayout:
    """A plan with the tensors that say where its rows lie; made once for all layers that share it."""

    plan: StepPlan
    block_table: Tensor
    dtype: torch.dtype

    @cached_property
    def dense_rows(self) -> DenseRows:
        """The dense parts as vLLM's kernel takes them."""
        spans = [(part.index, part.token, part.num_tokens, part.last) for part in self.plan.dense]
        return pick_rows(spans, self.block_table, self.dtype)

    @cached_property
    def spans(self) -> list[Span]:
        """The rows whose features are kept."""
        return [Span(self.block_table[part.index], part.first, part.last) for part in self.plan.fed]

    @cached_property
    def singles_by_rung(self) -> list[tuple[tuple[Part, ...], Tensor, Tensor]]:
        """Tokens that choose alone, by rung: the parts, where they lie in the batch, their block tables."""
        by_rung: dict[str, list[Part]] = {}
        for part in self.plan.singles:
            by_rung.setdefault(part.rung.id, []).append(part)
        return [
            (
                tuple(parts),
                torch.tensor([part.token for part in parts]),
                self.block_table[torch.tensor([part.index for part in parts])].contiguous(),
            )
            for parts in by_rung.values()
        ]


@dataclass
class SenteiMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the step's rows; none where nobody asked for a rung."""

    parts: tuple[Part, ...] = ()
    prompt_ends: tuple[int, ...] = ()
    block_q: int = 0
    dtype: torch.dtype = torch.float32
    layouts: dict[frozenset[str], StepLayout] = field(default_factory=dict)

    def layout(self, thinning: frozenset[str]) -> StepLayout:
        """Return the step's layout in layers that these rungs thin."""
        if thinning not in self.layouts:
            plan = plan_step(self.parts, self.prompt_ends, thinning, block_q=self.block_q)
            self.layouts[thinning] = StepLayout(plan, self.block_table, self.dtype)
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
            block_q=self._state.ladder.query_block_tokens,
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
            first = lengths[index] - num
            self._state.ends[index] = lengths[index]
            parts.append(Part(index, row.asked.ticket, rung, starts[index], first, lengths[index]))
            ends.append(row.user_prompt_tokens)
        return parts, ends


class SenteiImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = find_state(get_current_vllm_config(), CPU)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *scales: Tensor | None, **named_scales: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend; keys and values of this step are in the cache already."""
        parts: tuple[Part, ...] = getattr(attn_metadata, "parts", ())
        state, index = self._state, layer_index(layer.layer_name)
        is_ours = state is not None and parts and self.sliding_window == -1 and index in state.scorers
        if state is None or not is_ours:
            return self._stock(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales
            )
        thinning = frozenset(part.rung.id for part in parts if state.thins(part.rung, index))
        if not thinning:
            note_dense(state, index, parts)
            return self._stock(layer, query, key, value, kv_cache, attn_metadata, output)
        pages = CpuPages.of(kv_cache, layer.isa)
        call = LayerCall(self, state, layer, index, pages, attn_metadata.layout(thinning))
        call.feed(kv_cache.shape[0])
        if call.layout.plan.thins_nothing:
            note_dense(state, index, parts)
            return self._stock(layer, query, key, value, kv_cache, attn_metadata, output)
        call.run(query, key, value, kv_cache, output.view(-1, self.num_heads, self.head_size))
        return output

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


def note_dense(state: WorkerState, index: int, parts: Sequence[Part]) -> None:
    """Count calls that kept everything, of requests that asked for a rung."""
    block_q, block_k = state.ladder.query_block_tokens, state.scorers[index].shape.block_tokens
    for part in parts:
        if not part.rung.is_dense:
            causal = part.causal_blocks(block_q, block_k)
            state.meter.note_dense(part.ticket, index, causal=causal, is_single=part.num_tokens == 1)


@dataclass(slots=True)
class LayerCall:
    """One attention call of one layer in which some rows are thinned."""

    impl: SenteiImpl
    state: WorkerState
    layer: Any
    index: int
    pages: CpuPages
    layout: StepLayout

    def feed(self, num_pages: int) -> None:
        """Keep the features of the step's keys, also of rows that are too short to be thinned yet."""
        plan = self.layout.plan
        with self.state.meter.attention(_weights(plan.fed, lambda part: part.num_tokens)):
            self.state.pages(self.index, num_pages).update(self.pages.keys, self.layout.spans)

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        """Fill output [tokens, Hq, D]."""
        meter, plan = self.state.meter, self.layout.plan
        scorer = self.state.pages(self.index, kv_cache.shape[0])
        if plan.dense:
            with meter.attention(_weights(plan.dense, lambda part: part.num_tokens * part.last)):
                attend_dense(self.impl, self.layer, query, kv_cache, self.layout.dense_rows, output)
            note_dense(self.state, self.index, plan.dense)
        for part in plan.prompts:
            with meter.attention({part.ticket: 1.0}):
                self._attend_prompt(scorer, part, query, key, value, output)
        for parts, tokens, tables in self.layout.singles_by_rung:
            with meter.attention(_weights(parts, lambda part: part.last)):
                kept = self._attend_singles(scorer, parts, query, tokens, tables, output)
            for part, mean in zip(parts, kept.float().mean(dim=1).tolist(), strict=True):
                causal = part.causal_blocks(1, scorer.block)
                meter.note_blocks(part.ticket, self.index, kept=mean, causal=causal, is_single=True)

    def _attend_prompt(
        self, scorer: ScorerPages, part: Part, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        tokens = slice(part.token, part.token + part.num_tokens)
        table = self.layout.block_table[part.index]
        q = query[tokens].transpose(0, 1)[None]
        if part.first == 0:  # the whole past is at hand
            k, v = (t[tokens].transpose(0, 1)[None] for t in (key, value))
        else:
            k, v = self.pages.sequence(table, part.last)
        mask = self._choose(scorer, part, q, k, scorer.read(table, part.last))
        out, _ = attend(q, k, v, mask, scale=self.impl.scale)
        output[tokens] = out[0].transpose(0, 1)
        kept, causal = float(mask.counts.sum()) / mask.counts.shape[1], float(mask.limits().sum())
        self.state.meter.note_blocks(part.ticket, self.index, kept=kept, causal=causal, is_single=False)

    def _choose(self, scorer: ScorerPages, part: Part, q: Tensor, k: Tensor, pooled: Tensor) -> BlockMask:
        block_q = self.state.ladder.query_block_tokens
        shares, starts = score_blocks(scorer.scorer, q, k, pooled, table=scorer.rotary, block_q=block_q)
        if self.state.fault is not None:
            shares = self.state.fault.shift(shares, starts)
        shares = keep_before(shares, starts, part.rung.break_even_tokens)
        thresholds = self.state.thresholds(part.rung, self.index)
        return select_blocks(
            shares, thresholds, starts=starts, q_len=part.num_tokens, kv_len=part.last, q_offset=part.first,
            block_q=block_q, block_k=scorer.block,
        )  # fmt: skip

    def _attend_singles(
        self, scorer: ScorerPages, parts: Sequence[Part], query: Tensor, tokens: Tensor, tables: Tensor,
        output: Tensor,
    ) -> Tensor:  # fmt: skip
        q = query[tokens]
        out = torch.empty_like(q)
        cache = self.pages.batch(tables, [part.last for part in parts])
        thresholds = self.state.thresholds(parts[0].rung, self.index)
        kept = scorer.decode(q, cache, thresholds, out, fault=self.state.fault)
        output[tokens] = out
        return kept


def _weights(parts: Sequence[Part], weigh: Callable[[Part], int]) -> dict[str, float]:
    """Sum a weight of parts by ticket."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.ticket] = found.get(part.ticket, 0.0) + float(weigh(part))
    return found
