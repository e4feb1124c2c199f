"""Decode over pages in one call of the CPU program: scores, choice and attention of all rows of a step."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.native.build import load_native
from sentei.kernels.ops.native.calls import DTYPES
from sentei.kernels.ops.native.structs import fill_struct

LANES = 16  # the program's widest vector; features are padded to whole ones


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's KV cache as the program reads it; a page is one key block.

    keys [P, Hkv, D, block] (lanes are tokens), values [P, Hkv, block, D], pooled [P, Hkv, pools, E] fp32, E a
    multiple of LANES.
    """

    keys: Tensor
    values: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Query tokens of a decode step: q [N, Hq, D], features [N, Hq, E] fp32, table [N, W] int32.

    positions [N] int64 and cut [N, Hq] fp32: where each token sits, and the log share worth keeping there.
    """

    q: Tensor
    features: Tensor
    table: Tensor
    positions: Tensor
    cut: Tensor


def can_decode_pages(head_dim: int, block: int) -> bool:
    """Whether the program has a loop for these sizes."""
    return head_dim % (2 * LANES) == 0 and block % LANES == 0


def decode_pages_native(
    rows: Rows, pages: Pages, bias: Tensor, out: Tensor, *, scale: float, pool_tokens: int
) -> Tensor:
    """Fill out [N, Hq, D] and return how many blocks each head read, [N, Hq] int32; -1 where a score is NaN.

    bias [Hq, distances] in blocks, distance 0 included, reaches at least as far as the longest row.
    """
    q, features, table = rows.q, rows.features.contiguous(), rows.table.contiguous()
    num, q_heads, dim = q.shape
    kept = torch.empty(num, q_heads, dtype=torch.int32)
    bias, cut = bias.float().contiguous(), rows.cut.float().contiguous()
    strides = {"q_row": q, "f_row": features, "k_page": pages.keys, "v_page": pages.values}
    strides |= {"p_page": pages.pooled, "o_row": out}
    shape = fill_struct(
        "Paged",
        rows=num,
        Hq=q_heads,
        Hkv=pages.keys.shape[1],
        D=dim,
        E=features.shape[2],
        block=pages.keys.shape[3],
        pools=pages.pooled.shape[2],
        table_width=table.shape[1],
        num_bias=bias.shape[1],
        **{field: tensor.stride(0) for field, tensor in strides.items()},
        **{f"{field[0]}_h": tensor.stride(1) for field, tensor in strides.items()},
    )
    call = getattr(load_native(), f"sentei_decode_pages_{DTYPES[q.dtype]}")
    tensors = (
        q, features, pages.keys, pages.values, pages.pooled, table, rows.positions, cut, bias, out, kept
    )  # fmt: skip
    call(
        shape,
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        c_float(scale),
        c_float(math.log(pool_tokens)),
        c_int(torch.get_num_threads()),
    )
    return kept
