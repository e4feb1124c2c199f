"""How vLLM lays out its KV cache on the CPU, and its own kernel over some of a batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from sentei.kernels.ops.layouts import PagedCache
from sentei.serving.errors import ConfigError

ISA = "vec"  # plain rows and columns; "amx" packs pairs of keys


@dataclass(frozen=True, slots=True)
class CpuPages:
    """A layer's cache as views: keys and values [P, Hkv, page, D], a page's keys stored [D, page]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, kv_cache: Tensor, isa: str) -> CpuPages:
        """View vLLM's tensor [P, Hkv, page, 2 D]."""
        if isa != ISA:
            raise ConfigError(
                f"vLLM lays out its KV cache for {isa!r} here, and the plugin reads {ISA!r}: "
                "run in float32, or serve dense"
            )
        pages, heads, size, double = kv_cache.shape
        flat = kv_cache.view(pages, heads, 2, size * double // 2)
        dim, strides = double // 2, flat.stride()[:2]
        keys = flat[:, :, 0].as_strided((pages, heads, size, dim), (*strides, 1, size))
        values = flat[:, :, 1].as_strided((pages, heads, size, dim), (*strides, dim, 1))
        return cls(keys, values)

    def batch(self, tables: Tensor, lengths: Tensor) -> PagedCache:
        """Return rows of a batch as our operations take them; lengths are int32."""
        return PagedCache(self.keys, self.values, tables, lengths)

    def near_keys(self, table: Tensor, new: Tensor, first: int) -> Tensor:
        """Return the keys that a scorer measures exactly: the first page, and from the page of `first` on.

        [1, Hkv, T, D] from the step's own keys new [Hkv, n, D], which sit on `first` to T - 1; what lies
        between is not written, and a scorer does not read it.
        """
        if first == 0:
            return new[None]
        heads, num, dim = new.shape
        page = self.keys.shape[2]
        found = new.new_empty(1, heads, first + num, dim)
        begin = first // page * page
        found[0, :, :page] = self.keys[int(table[0])][:, : first + num]
        found[0, :, begin:first] = self.keys[int(table[first // page])][:, : first - begin]
        found[0, :, first:] = new
        return found


@dataclass(slots=True)
class DenseRows:
    """Which rows of a batch run through vLLM's kernel, and what it wants to know of them."""

    tokens: Tensor  # into the batch's tokens
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    dtype: torch.dtype
    _scheduled: Tensor | None = None

    def schedule(self, impl: Any, layer: Any) -> Tensor:
        """Return how the kernel shares out the work; made once for the layers of a step, which are alike."""
        if self._scheduled is None:
            self._scheduled = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.lengths),
                num_heads=impl.num_heads,
                num_kv_heads=impl.num_kv_heads,
                head_dim=impl.head_size,
                seq_lens=self.lengths,
                dtype=self.dtype,
                query_start_loc=self.starts,
                causal=True,
                sliding_window_size=-1,
                isa=layer.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                dynamic_causal=None,
                kv_cache_dtype=impl.kv_cache_dtype,
            )
        return self._scheduled


def pick_rows(spans: Sequence[tuple[int, int, int, int]], tables: Tensor, dtype: torch.dtype) -> DenseRows:
    """Gather rows (index, first token, tokens, length with the newest token) of a batch."""
    tokens = torch.cat([torch.arange(first, first + num) for _, first, num, _ in spans])
    counts = torch.tensor([0, *(num for _, _, num, _ in spans)], dtype=torch.int32)
    lengths = torch.tensor([length for *_, length in spans], dtype=torch.int32)
    picked = tables[torch.tensor([index for index, *_ in spans])].contiguous()
    return DenseRows(tokens, counts.cumsum(0, dtype=torch.int32), lengths, picked, dtype)


def attend_dense(
    impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, rows: DenseRows, output: Tensor
) -> None:
    """Run vLLM's kernel over some rows of a batch; the others' output is not touched."""
    pages, heads, size, _ = kv_cache.shape
    keys, values = kv_cache.view(pages, heads, size * 2, -1).chunk(2, dim=2)
    part = query[rows.tokens]
    out = torch.empty_like(part)
    ops.cpu_attention_with_kv_cache(
        query=part,
        key_cache=keys,
        value_cache=values,
        output=out,
        query_start_loc=rows.starts,
        seq_lens=rows.lengths,
        scale=impl.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=rows.tables,
        softcap=impl.logits_soft_cap,
        scheduler_metadata=rows.schedule(impl, layer),
        s_aux=None,
        dynamic_causal=None,
        k_scale=layer._k_scale_float,
        v_scale=layer._v_scale_float,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    output[rows.tokens] = out
