"""Sentei's own CPU programs behind tensors: attention over a block mask, mass, scores, selection."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.limits import DECODE_ROWS_MAX
from sentei.kernels.ops.native.build import load_native
from sentei.kernels.ops.native.structs import fill_struct
from sentei.kernels.ops.rules import Softmax

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def attend_native(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax) -> tuple[Tensor, Tensor]:
    """Attention over selected blocks: (out [B, Hq, Tq, D] in q's dtype, lse [B, Hq, Tq] fp32).

    A prompt packs its keys and values once; a few rows read the selected ones where they lie.
    """
    if how.softcap is not None or how.sinks is not None:
        raise BackendError("the native program has no softcap and no sinks; backend='auto' picks another")
    program = "decode" if q.shape[2] <= DECODE_ROWS_MAX else "prefill"
    mask = mask.within(how.window)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    counts, indices = mask.counts.contiguous(), mask.indices.contiguous()
    batch, q_heads, q_len, dim = q.shape
    v_dim = v.shape[-1]
    out = q.new_empty(batch, q_len, q_heads, v_dim).transpose(1, 2)
    lse = torch.empty(batch, q_heads, q_len)
    shape = fill_struct(
        "Prefill",
        B=batch,
        Hq=q_heads,
        Hkv=k.shape[1],
        Tq=q_len,
        Tk=k.shape[2],
        D=dim,
        Dv=v_dim,
        **_strides("bht", q=q, k=k, v=v, o=out),
        mask_b=counts.shape[0],
        mask_h=counts.shape[1],
        num_q=counts.shape[2],
        width=indices.shape[3],
        block_q=mask.block_q,
        block_k=mask.block_k,
        q_offset=mask.q_offset,
        window=how.window or 0,
    )
    call = getattr(load_native(), f"sentei_{program}_{DTYPES[q.dtype]}")
    call(shape, *map(_pointer, (q, k, v, counts, indices, out, lse)), c_float(how.scale), c_int(_threads()))
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
    query_pool: int = 1

    @property
    def is_residual(self) -> bool:
        """Whether the untrained score is a part of the score."""
        return self.maps.shape[1] == self.cos.shape[1]


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
    if pooled.stride(1) != pooled.shape[2]:
        pooled = pooled.contiguous()
    row_tokens = min(weights.query_pool, block_q, q.shape[1])
    rows = -(-min(block_q, q.shape[1]) // row_tokens)
    shape = fill_struct(
        "Scores",
        H=q.shape[0],
        Hkv=k.shape[0],
        n=out.shape[1],
        rows=rows,
        row_tokens=row_tokens,
        num_rows=q.shape[1],
        D=q.shape[2],
        rank=weights.maps.shape[2],
        is_residual=weights.is_residual,
        pools=pools,
        blocks=pooled.shape[1] // pools,
        block=weights.block,
        **_strides("ht", q=q, k=k),
        T=k.shape[1],
        first=k.shape[1] - q.shape[1],
        out_blocks=out.shape[2],
        num_bias=weights.bias.shape[1],
        pooled_h=pooled.stride(0),
    )
    tables = (weights.cos, weights.sin, weights.maps, weights.gains, weights.bias)
    program = "byte_scores" if _fit_bytes(weights) else "scores"
    call = getattr(load_native(), f"sentei_{program}_{DTYPES[q.dtype]}")
    call(
        shape,
        *map(_pointer, (q, k, pooled, *tables)),
        c_float(weights.scale),
        c_float(math.log(weights.pool_tokens)),
        _pointer(out),
        c_int(_threads()),
    )


def _fit_bytes(weights: ScorerWeights) -> bool:
    """Whether features are scored in 8 bits: single tokens in few dimensions, if there is VNNI."""
    rank = weights.maps.shape[2]
    is_single = weights.pool_tokens == 1 and not weights.is_residual
    return is_single and has_byte_scores(rank)


def has_byte_scores(rank: int) -> bool:
    """Whether this processor scores features of so many dimensions in 8 bits."""
    return bool(load_native().sentei_has_byte_scores(c_int64(rank)))


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


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """Strides by field, as q_h for axis h of q; the last axis, which is contiguous, has none."""
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(axes, tensor.stride()[:-1], strict=True)
    }


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _threads() -> int:
    return torch.get_num_threads()
