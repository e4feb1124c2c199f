"""Attention over the pages of a KV cache by the CPU program: a prompt's rows, or all of a decode step's."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.native.build import load_native
from sentei.kernels.ops.native.calls import DTYPES
from sentei.kernels.ops.native.structs import fill_struct, struct_fields

LANES = 16  # the program's widest vector; features are padded to whole ones
HEAD_DIM_MAX = 256


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's KV cache as the program reads it; a page is one key block.

    keys [P, Hkv, D, block] (lanes are tokens), values [P, Hkv, block, D].
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PageFeatures:
    """What full pages are scored by: `pooled` [P, Hkv, pools, E] fp32, or bytes where there are cells.

    cells [P, Hkv, E / 4, block] int32 hold four dimensions each, in steps that the scorer says; flaws
    [P, Hkv] fp32 are NaN where a feature is no number. E is a multiple of LANES.
    """

    pooled: Tensor
    cells: Tensor
    flaws: Tensor

    @property
    def num_cells(self) -> int:
        """Cells of one token; 0 where features are floats."""
        return self.cells.shape[2] if self.cells.numel() else 0


@dataclass(frozen=True, slots=True)
class PageScorer:
    """One layer's scorer as the program takes it, all fp32 and contiguous.

    maps [Hq, D or 2 D, columns] scaled, and where features are bytes times their steps, key_maps [Hkv, D or
    2 D, columns], gains [Hq], bias [Hq, distances] from distance 0 on, cos and sin [positions, D], cuts
    [thresholds, Hq], inverse_steps [Hkv, E] where features are bytes. E is columns, or D + columns where the
    untrained score is a part.
    """

    maps: Tensor
    key_maps: Tensor
    gains: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    cuts: Tensor
    inverse_steps: Tensor
    scale: float
    pool_tokens: int

    @property
    def is_residual(self) -> bool:
        """Whether the untrained score is a part of the score."""
        return self.maps.shape[1] == self.cos.shape[1]


def fits_pages(head_dim: int, block: int) -> bool:
    """Whether the programs have loops for these sizes."""
    return head_dim % (2 * LANES) == 0 and head_dim <= HEAD_DIM_MAX and block % (2 * LANES) == 0


def encode_pages_native(
    keys: Tensor, pages: Tensor, blocks: Tensor, features: PageFeatures, scorer: PageScorer
) -> None:
    """Fill the features of full pages [n] of keys [P, Hkv, D, block]; blocks [n] are their places, int64."""
    heads, dim, block = keys.shape[1:]
    columns = scorer.key_maps.shape[2]
    shape = _fill_paged(
        Hkv=heads,
        D=dim,
        E=columns + (dim if scorer.is_residual else 0),
        is_residual=scorer.is_residual,
        block=block,
        pools=block // scorer.pool_tokens,
        cells=features.num_cells,
        k_page=keys.stride(0),
        k_h=keys.stride(1),
    )
    getattr(load_native(), f"sentei_encode_pages_{DTYPES[keys.dtype]}")(
        shape,
        c_int64(len(pages)),
        *map(_pointer, (pages, blocks, keys, scorer.key_maps, scorer.cos, scorer.sin, scorer.inverse_steps)),
        *map(_pointer, (features.pooled, features.cells, features.flaws)),
        # A page takes some tens of microseconds, as long as a second thread needs to begin.
        c_int(torch.get_num_threads() if len(pages) * heads > 8 else 1),
    )


def decode_pages_native(
    q: Tensor,
    rows: Tensor,
    tables: Tensor,
    pages: Pages,
    features: PageFeatures,
    scorer: PageScorer,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill some tokens of out [T, Hq, D] from the same of q; return what each head read of its sequence.

    That is the number of blocks [N, Hq] int32, and the LSE over them [N, Hq].

    rows [N, 4] int64 say for each row its token in q, its sequence in tables [B, W] int32, its position, and
    its row of cuts. A row with a score of NaN counts -1 and gives NaN.
    """
    num, q_heads, dim = rows.shape[0], q.shape[1], q.shape[2]
    kept, lse = torch.empty(num, q_heads, dtype=torch.int32), torch.empty(num, q_heads)
    shape = _fill_paged(
        rows=num,
        Hq=q_heads,
        Hkv=pages.keys.shape[1],
        D=dim,
        E=scorer.maps.shape[2] + (dim if scorer.is_residual else 0),
        is_residual=scorer.is_residual,
        block=pages.keys.shape[3],
        pools=pages.keys.shape[3] // scorer.pool_tokens,
        cells=features.num_cells,
        table_width=tables.shape[1],
        num_bias=scorer.bias.shape[1],
        q_t=q.stride(0),
        q_h=q.stride(1),
        k_page=pages.keys.stride(0),
        k_h=pages.keys.stride(1),
        v_page=pages.values.stride(0),
        v_h=pages.values.stride(1),
        o_t=out.stride(0),
        o_h=out.stride(1),
    )
    tensors = (
        rows, q, pages.keys, pages.values, features.pooled, features.cells, features.flaws, tables,
        scorer.cuts, scorer.maps, scorer.gains, scorer.cos, scorer.sin, scorer.bias, out, lse, kept,
    )  # fmt: skip
    getattr(load_native(), f"sentei_decode_pages_{DTYPES[q.dtype]}")(
        shape,
        *map(_pointer, tensors),
        c_float(scorer.scale),
        c_float(math.log(scorer.pool_tokens)),
        c_int(torch.get_num_threads()),
    )
    return kept, lse


def prefill_pages_native(
    q: Tensor, pages: Pages, table: Tensor, mask: BlockMask, scale: float, out: Tensor
) -> Tensor:
    """Fill out [Tq, Hq, D] from q [Tq, Hq, D], the newest rows of the sequence with the pages `table` [W].

    Returns the LSE over what each row read, [Hq, Tq].
    """
    dim, block, heads = q.shape[2], pages.keys.shape[3], q.shape[1]
    counts, indices = mask.counts.contiguous(), mask.indices.contiguous()
    lse = torch.empty(heads, q.shape[0])
    shape = fill_struct(
        "Prefill",
        B=1,
        Hq=heads,
        Hkv=pages.keys.shape[1],
        Tq=q.shape[0],
        Tk=mask.kv_len,
        D=dim,
        Dv=dim,
        q_b=0,
        q_h=q.stride(1),
        q_t=q.stride(0),
        k_b=pages.keys.stride(0),
        k_h=pages.keys.stride(1),
        k_t=1,
        v_b=pages.values.stride(0),
        v_h=pages.values.stride(1),
        v_t=dim,
        o_b=0,
        o_h=out.stride(1),
        o_t=out.stride(0),
        mask_b=1,
        mask_h=counts.shape[1],
        num_q=counts.shape[2],
        width=indices.shape[3],
        block_q=mask.block_q,
        block_k=block,
        q_offset=mask.q_offset,
        window=0,
    )
    getattr(load_native(), f"sentei_prefill_pages_{DTYPES[q.dtype]}")(
        shape,
        *map(_pointer, (q, pages.keys, pages.values, table, counts, indices, out, lse)),
        c_float(scale),
        c_int(torch.get_num_threads()),
    )
    return lse


def _fill_paged(**values: int) -> ctypes.Array[c_int64]:
    """The struct Paged; encoding needs a few of its fields alone."""
    return fill_struct("Paged", **{**dict.fromkeys(struct_fields("Paged"), 0), **values})


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
