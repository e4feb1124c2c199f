"""Sentei's own CPU programs behind tensors: attention over a block mask, mass, scores, selection."""

from __future__ import annotations

import ctypes
import math
from ctypes import byref, c_float, c_int, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.limits import DECODE_ROWS_MAX
from sentei.kernels.ops.native.build import load_native


def _fields(names: str) -> list[tuple[str, type[c_int64]]]:
    return [(name, c_int64) for name in names.split()]


DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Shape(ctypes.Structure):
    """`Prefill` of programs.cpp, field by field."""

    _fields_ = _fields(
        "B Hq Hkv Tq Tk D Dv q_b q_h q_t k_b k_h k_t v_b v_h v_t o_b o_h o_t "
        "mask_b mask_h num_q width block_q block_k q_offset window"
    )


class _Scores(ctypes.Structure):
    """`Scores` of programs.cpp, field by field."""

    _fields_ = _fields(
        "H Hkv n rows num_rows D rank is_residual pools blocks block q_h q_t k_h k_t T first "
        "out_blocks num_bias pooled_h"
    )


def attend_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over selected blocks: (out [B, Hq, Tq, D] in q's dtype, lse [B, Hq, Tq] fp32).

    A prompt packs its keys and values once; a few rows read the selected ones where they lie.
    """
    if softcap is not None or sinks is not None:
        raise BackendError("the native program has no softcap and no sinks; backend='auto' picks another")
    program = "decode" if q.shape[2] <= DECODE_ROWS_MAX else "prefill"
    return _run(program, q, k, v, mask, scale, window)


def _run(
    program: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    mask = mask.within(window)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    counts, indices = mask.counts.contiguous(), mask.indices.contiguous()
    batch, q_heads, q_len, dim = q.shape
    v_dim = v.shape[-1]
    out = q.new_empty(batch, q_len, q_heads, v_dim).transpose(1, 2)
    lse = torch.empty(batch, q_heads, q_len)
    shape = _Shape(
        batch, q_heads, k.shape[1], q_len, k.shape[2], dim, v_dim,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *counts.shape, indices.shape[3], mask.block_q, mask.block_k, mask.q_offset, window or 0,
    )  # fmt: skip
    call = getattr(load_native(), f"sentei_{program}_{DTYPES[q.dtype]}")
    call(
        byref(shape), *map(_pointer, (q, k, v, counts, indices, out, lse)), c_float(scale), c_int(_threads())
    )
    return out, lse


def block_mass_native(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, block_k: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention mass per key block of rows q [Hq, R, D] at `positions` [R], keys [Hkv, T, D]: (lse, mass)."""
    heads, rows, dim = q.shape
    q, k, positions = (q.float() * scale).contiguous(), k.float().contiguous(), positions.contiguous()
    lse = torch.empty(heads, rows)
    mass = torch.zeros(heads, rows, num_blocks(k.shape[1], block_k))
    sizes = (heads, k.shape[0], rows, k.shape[1], dim, block_k, window or 0)
    load_native().sentei_block_mass(
        *map(_pointer, (q, k, positions, lse, mass)), *map(c_int64, sizes), c_int(_threads())
    )
    return lse, mass


@dataclass(frozen=True, slots=True)
class ScorerWeights:
    """One layer's scorer as the native program takes it, all fp32 and contiguous.

    maps [Hq, D or 2 D, rank] scaled, gains [Hq] with the attention scale in them, bias [Hq, distances],
    cos and sin [positions, D]. Maps of 2 D rows read a query with and without its rotation, and nothing
    stands beside them; maps of D rows stand beside the untrained score.
    """

    maps: Tensor
    gains: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    scale: float
    block: int
    pool_tokens: int


def best_shares_native(
    q: Tensor, k: Tensor, pooled: Tensor, weights: ScorerWeights, out: Tensor, block_q: int
) -> None:
    """Fill `out` [Hq, n, blocks] with the log share of the neediest of `block_q` rows, of each open block.

    q [Hq, R, D] are the newest rows, k [Hkv, T, D] all keys, pooled [Hkv, P, features] what stands for them.
    """
    q, k, pooled = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, pooled.to(q.dtype)))
    if q.dtype not in DTYPES:
        q, k, pooled = q.float(), k.float(), pooled.float()
    pools = weights.block // weights.pool_tokens
    blocks = pooled.shape[1] // pools
    if pooled.stride(1) != pooled.shape[2]:
        pooled = pooled.contiguous()
    rows = min(block_q, q.shape[1])
    is_residual = weights.maps.shape[1] == q.shape[2]
    shape = _Scores(
        q.shape[0], k.shape[0], out.shape[1], rows, q.shape[1], q.shape[2], weights.maps.shape[2],
        is_residual, pools, blocks, weights.block, *q.stride()[:2], *k.stride()[:2], k.shape[1],
        k.shape[1] - q.shape[1],
        out.shape[2], weights.bias.shape[1], pooled.stride(0),
    )  # fmt: skip
    tables = (weights.cos, weights.sin, weights.maps, weights.gains, weights.bias)
    call = getattr(load_native(), f"sentei_scores_{DTYPES[q.dtype]}")
    call(
        byref(shape),
        *map(_pointer, (q, k, pooled, *tables)),
        c_float(weights.scale),
        c_float(math.log(weights.pool_tokens)),
        _pointer(out),
        c_int(_threads()),
    )


def pool_native(k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean of each full run of `size` keys, with and without rotation: [B, Hkv, T, D] to [B, Hkv, P, D].

    `cos` and `sin` [T, D] are fp32 and contiguous, and start at the first key's position.
    """
    k = k.float() if k.stride(-1) == 1 else k.float().contiguous()
    batch, heads, tokens, dim = k.shape
    pooled, plain = (torch.empty(batch, heads, tokens // size, dim) for _ in range(2))
    for b in range(batch):
        load_native().sentei_pool(
            _pointer(k[b]), *map(c_int64, k.stride()[1:3]),
            *map(_pointer, (cos, sin, pooled[b], plain[b])),
            *map(c_int64, (heads, tokens, dim, size)), c_int(_threads()),
        )  # fmt: skip
    return pooled, plain


def select_native(
    shares: Tensor, thresholds: Tensor, *, start: int, block_q: int, block_k: int, q_end: int
) -> tuple[Tensor, Tensor]:
    """Blocks whose share [H, n, blocks] passes its threshold [H, n], sink and diagonal: counts, indices."""
    heads, rows, blocks = shares.shape
    shares, thresholds = shares.contiguous(), thresholds.float().contiguous()
    counts = torch.empty(heads, rows, dtype=torch.int32)
    indices = torch.empty(heads, rows, blocks, dtype=torch.int32)
    sizes = (heads, rows, blocks, start, block_q, block_k, q_end)
    load_native().sentei_select(
        *map(_pointer, (shares, thresholds, counts, indices)), *map(c_int64, sizes), c_int(_threads())
    )
    return counts, indices


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _threads() -> int:
    return torch.get_num_threads()
