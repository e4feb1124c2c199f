"""From queries or keys to the scorer's features in Triton: unrotated, pooled and mapped in one pass.

The same program serves both sides. For queries it also measures the sink and the rows' own blocks exactly,
while their means are at hand: what a row may choose is weighed against that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.triton.launch import (
    LOG2_E,
    Arguments,
    Launch,
    largest,
    narrow,
    pick_precision,
    pick_target,
    product,
    stride_arguments,
    tile_size,
    with_unit_stride,
)


@dataclass(frozen=True, eq=False)
class Encoding:
    """How one side is encoded: maps [H, 2 D, rank] of the low-rank form, [H, D, rank] of the residual one.

    `gains` [H] fp32 is what the residual form multiplies pooled tokens by (None: 1); cos and sin [length, D]
    are the rotation that is undone; `pool` neighbouring tokens become one row, by their mean.
    """

    maps: Tensor
    cos: Tensor
    sin: Tensor
    pool: int = 1
    gains: Tensor | None = None

    def num_features(self, dim: int) -> int:
        """Features of a row whose heads have `dim` dimensions."""
        return self.maps.shape[2] + (dim if self.maps.shape[1] == dim else 0)


@dataclass(frozen=True, eq=False)
class Near:
    """The keys that rows always read, and the blocks that say which: keys [B, Hkv, T, D].

    With a page table [B, W] they are pages of one block each, [P, Hkv, block_k, D].
    """

    keys: Tensor
    scale: float
    block_q: int
    block_k: int
    page_table: Tensor | None = None


def encode_keys_triton(k: Tensor, how: Encoding, *, first: int | Tensor) -> Tensor:
    """Features [B, Hkv, T // pool, F] of full pools of k [B, Hkv, T, D]; `first` as in `encode_launch`."""
    out = k.new_empty(*k.shape[:2], k.shape[2] // how.pool, how.num_features(k.shape[3]))
    if out.numel():
        encode_launch(k, how, out, first=first).run()
    return out


def encode_queries_triton(
    q: Tensor, how: Encoding, near: Near, *, first: int | Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Features of pooled rows [B, Hq, R, F], and the exact log weight of sink and own blocks [B, Hq, R].

    Each query block has as many rows; where its tokens end, copies of the last one follow. Features are of
    q's dtype, or of another that their counterparts are kept in.
    """
    block_rows = min(near.block_q, q.shape[2])
    rows = num_blocks(q.shape[2], block_rows) * num_blocks(block_rows, how.pool)
    out = q.new_empty(*q.shape[:2], rows, how.num_features(q.shape[3]), dtype=dtype or q.dtype)
    forced = torch.empty(*q.shape[:2], rows, device=q.device)
    encode_launch(q, how, out, first=first, near=near, forced=forced).run()
    return out, forced


def encode_launch(
    x: Tensor,
    how: Encoding,
    out: Tensor,
    *,
    first: int | Tensor,
    near: Near | None = None,
    forced: Tensor | None = None,
    target: str | None = None,
) -> Launch:
    """The launch that fills `out` [B, H, R, F] and `forced` [B, H, R], contiguous.

    `first` is the position of x's first token, or how many tokens each sequence has [B]: x holds its newest.
    """
    target = target or pick_target(x.device)
    x = with_unit_stride(x)
    dim, rank = x.shape[3], how.maps.shape[2]
    is_paged = near is not None and near.page_table is not None
    lengths = first if isinstance(first, Tensor) else None
    keys = x if near is None else with_unit_stride(near.keys)
    arguments: Arguments = {
        "x": x,
        "cos": with_unit_stride(how.cos),
        "sin": with_unit_stride(how.sin),
        "maps": how.maps.contiguous(),
        "gains": how.gains,
        "out": out,
        "lengths": lengths,
        "k": None if near is None else keys,
        "page_table": near.page_table if near is not None and is_paged else None,
        "forced": forced,
        "first": 0 if isinstance(first, Tensor) else first,
        "num_tokens": x.shape[2],
        "num_rows": out.shape[2],
        "num_angles": how.cos.shape[0],
        "scale": LOG2_E * (1.0 if near is None else near.scale),
        "stride_cl": how.cos.stride(0),
        "stride_sl": how.sin.stride(0),
        "stride_tb": near.page_table.stride(0) if near is not None and near.page_table is not None else 0,
        **stride_arguments("bht", x=x, k=keys),
    }
    block_q, block_k = (16, 16) if near is None else (near.block_q, near.block_k)
    half = tile_size(num_blocks(dim, 2))
    rows, keys_tile = _pick_tile(half, x.dtype, target)
    rows = min(tile_size(out.shape[2]), rows)
    constants = {
        "GROUP": x.shape[1] // keys.shape[1],
        "HEAD_DIM": dim,
        "HALF": half,
        "RANK": rank,
        "RANK_TILE": tile_size(rank),
        "IS_RESIDUAL": how.maps.shape[1] == dim,
        "POOL": how.pool,
        "ROWS": rows,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "KEYS": min(tile_size(block_k), keys_tile),
        "PRECISION": pick_precision(x.dtype, target),
    }
    grid = (num_blocks(out.shape[2], rows), x.shape[1], x.shape[0])
    return Launch(_encode_kernel, grid, arguments, constants, num_warps=4, num_stages=1)


def _pick_tile(half: int, dtype: torch.dtype, target: str) -> tuple[int, int]:
    """Rows and keys of a tile: on gfx942 more keys spilled scalar registers, and more rows vector ones."""
    if target == "gfx942":
        return (32 if half <= 32 else 16), 16 if half > 64 else 32
    rows = 64 if half <= 32 and dtype != torch.float32 else 32 if half <= 64 else 16
    return rows, 64 if half <= 64 and dtype != torch.float32 else 32


@triton.jit
def _load_half(base, dims, half, is_row):
    return tl.load(base + dims[None, :], mask=is_row[:, None] & (dims < half)[None, :], other=0.0)


@triton.jit
def _pooled_means(
    x, cos, sin, row, is_row, first, num_tokens, num_angles, stride_xt, stride_cl, stride_sl,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means over each row's tokens of both halves of a head, as they are and unrotated, fp32."""
    MIDDLE: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HALF)
    low = tl.zeros([ROWS, HALF], dtype=tl.float32)
    high = tl.zeros([ROWS, HALF], dtype=tl.float32)
    plain_low = tl.zeros([ROWS, HALF], dtype=tl.float32)
    plain_high = tl.zeros([ROWS, HALF], dtype=tl.float32)
    for j in tl.range(0, POOL):
        token = tl.minimum(row * POOL + j, num_tokens - 1)
        place = x + token.to(tl.int64)[:, None] * stride_xt
        a = _load_half(place, dims, MIDDLE, is_row).to(tl.float32)
        b = _load_half(place + MIDDLE, dims, MIDDLE, is_row).to(tl.float32)
        position = tl.minimum(tl.maximum(first + token, 0), num_angles - 1).to(tl.int64)[:, None]
        low += a
        high += b
        c = _load_half(cos + position * stride_cl, dims, MIDDLE, is_row).to(tl.float32)
        s = _load_half(sin + position * stride_sl, dims, MIDDLE, is_row).to(tl.float32)
        plain_low += (a * c + b * s) / tl.maximum(c * c + s * s, 1e-6)
        c = _load_half(cos + position * stride_cl + MIDDLE, dims, MIDDLE, is_row).to(tl.float32)
        s = _load_half(sin + position * stride_sl + MIDDLE, dims, MIDDLE, is_row).to(tl.float32)
        plain_high += (b * c - a * s) / tl.maximum(c * c + s * s, 1e-6)
    return low / POOL, high / POOL, plain_low / POOL, plain_high / POOL


@triton.jit
def _map_half(part, maps, first, acc, MIDDLE: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
              RANK_TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the product of half a head with its rows of the map."""
    dims = tl.arange(0, HALF)
    ranks = tl.arange(0, RANK_TILE)
    weights = tl.load(
        maps + (first + dims)[:, None] * RANK + ranks[None, :],
        mask=(dims < MIDDLE)[:, None] & (ranks < RANK)[None, :],
        other=0.0,
    )
    return product(narrow(part, weights.dtype, PRECISION), weights, acc, PRECISION)


@triton.jit(do_not_specialize=["first", "num_tokens", "num_rows", "num_angles"])
def _encode_kernel(
    x, cos, sin, maps, gains, out, lengths, k, page_table, forced, first, num_tokens, num_rows, num_angles,
    scale, stride_cl, stride_sl, stride_tb, stride_xb, stride_xh, stride_xt, stride_kb, stride_kh, stride_kt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
    RANK_TILE: tl.constexpr, IS_RESIDUAL: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    if lengths is not None:
        first = tl.load(lengths + batch) - num_tokens
    MIDDLE: tl.constexpr = HEAD_DIM // 2
    x += batch * stride_xb + head.to(tl.int64) * stride_xh
    low, high, plain_low, plain_high = _pooled_means(
        x, cos, sin, row, is_row, first, num_tokens, num_angles, stride_xt, stride_cl, stride_sl,
        HEAD_DIM, HALF, POOL, ROWS,
    )  # fmt: skip

    place = (batch * tl.num_programs(1) + head) * num_rows + row
    dims = tl.arange(0, HALF)
    ranks = tl.arange(0, RANK_TILE)
    features = tl.zeros([ROWS, RANK_TILE], dtype=tl.float32)
    if IS_RESIDUAL:
        maps += head * HEAD_DIM * RANK
        gain = 1.0
        if gains is not None:
            gain = tl.load(gains + head)
        is_place = is_row[:, None] & (dims < MIDDLE)[None, :]
        target = out + place[:, None] * (HEAD_DIM + RANK)
        tl.store(target + dims[None, :], narrow(low * gain, out.dtype.element_ty, PRECISION), mask=is_place)
        tl.store(
            target + MIDDLE + dims[None, :],
            narrow(high * gain, out.dtype.element_ty, PRECISION),
            mask=is_place,
        )
        target += HEAD_DIM
        square = tl.sum(plain_low * plain_low, 1) + tl.sum(plain_high * plain_high, 1)
        size = 1.0 / tl.sqrt(square / HEAD_DIM + 1e-6)[:, None]
        plain_low *= size
        plain_high *= size
    else:
        maps += head * 2 * HEAD_DIM * RANK
        features = _map_half(low, maps, 0, features, MIDDLE, HALF, RANK, RANK_TILE, PRECISION)
        features = _map_half(high, maps, MIDDLE, features, MIDDLE, HALF, RANK, RANK_TILE, PRECISION)
        maps += HEAD_DIM * RANK
        target = out + place[:, None] * RANK
    features = _map_half(plain_low, maps, 0, features, MIDDLE, HALF, RANK, RANK_TILE, PRECISION)
    features = _map_half(plain_high, maps, MIDDLE, features, MIDDLE, HALF, RANK, RANK_TILE, PRECISION)
    tl.store(
        target + ranks[None, :],
        narrow(features, out.dtype.element_ty, PRECISION),
        mask=is_row[:, None] & (ranks < RANK)[None, :],
    )

    if forced is not None:
        # The sink first, for rows whose own block is another; then own blocks, up to where each row sits.
        low_q = narrow(low, x.dtype.element_ty, PRECISION)
        high_q = narrow(high, x.dtype.element_ty, PRECISION)
        start = tl.maximum(first, 0)  # an empty slot of a batch has no token: its rows see nothing
        own = (start + row * POOL // BLOCK_Q * BLOCK_Q) // BLOCK_K
        position = tl.where(is_row, first + tl.minimum((row + 1) * POOL, num_tokens) - 1, -1)
        first_block = (start + tl.program_id(0) * ROWS * POOL // BLOCK_Q * BLOCK_Q) // BLOCK_K
        last = tl.max(position, 0)
        k += (head // GROUP).to(tl.int64) * stride_kh
        if page_table is None:
            k += batch * stride_kb
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        PARTS: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
        for i in tl.range(0, (tl.maximum(last, 0) // BLOCK_K - first_block + 2) * PARTS):
            is_sink = i < PARTS
            block = tl.where(is_sink, 0, first_block + i // PARTS - 1)
            in_block = (i % PARTS) * KEYS + tl.arange(0, KEYS)
            key = block * BLOCK_K + in_block
            is_key = (in_block < BLOCK_K) & (key <= last)
            if page_table is None:
                k_tile = k + key.to(tl.int64)[None, :] * stride_kt
            else:
                page = tl.load(page_table + batch * stride_tb + block).to(tl.int64)
                k_tile = k + page * stride_kb + in_block[None, :] * stride_kt
            is_read = is_key[None, :] & (dims < MIDDLE)[:, None]
            keys_low = tl.load(k_tile + dims[:, None], mask=is_read, other=0.0)
            keys_high = tl.load(k_tile + MIDDLE + dims[:, None], mask=is_read, other=0.0)
            scores = product(low_q, keys_low, None, PRECISION)
            scores = product(high_q, keys_high, scores, PRECISION) * scale
            is_own = (key[None, :] >= own[:, None] * BLOCK_K) & (key[None, :] <= position[:, None])
            is_seen = is_key[None, :] & tl.where(is_sink, (own > 0)[:, None], is_own)
            scores = tl.where(is_seen, scores, float("-inf"))
            new_peak = tl.maximum(peak, largest(scores, 1, PRECISION))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            peak = new_peak
        is_empty = total == 0.0
        log_weight = tl.where(is_empty, float("-inf"), peak + tl.log2(tl.where(is_empty, 1.0, total)))
        tl.store(forced + place, log_weight * 0.6931471805599453, mask=is_row)
