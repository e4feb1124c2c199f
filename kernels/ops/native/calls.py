"""Sentei's own CPU programs behind tensors: attention over a block mask, mass, scores, selection."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_int64
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.limits import DECODE_ROWS_MAX
from sentei.kernels.ops.native.build import load_native
from sentei.kernels.ops.native.structs import fill_struct, struct_fields
from sentei.kernels.ops.rules import Softmax

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# So little work is done before a second thread has started, and a busy machine lets it wait: a step at 8,192
# tokens of 4 sequences, heads 9:3 of 64, two cores at a load of 6, pooled its keys in 37 ms with two threads
# and in 0.3 ms with one, scored in 66 and 0.4 ms, selected in 12 and 0.2 ms.
_FEW_KEYS = 256  # to pool
_FEW_SCORES = 1 << 16  # tokens of all KV heads and query blocks
_FEW_SHARES = 1 << 16  # to select from
_SHARE = 8  # panels that grow get room for one more in so many


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
    cos and sin [Tq, D] of the query rows. Maps of 2 D rows read a query with and without its rotation, and
    nothing stands beside them; maps of D rows stand beside the untrained score. A row is the mean of
    `row_tokens` neighbouring queries, and one in `one_in` is scored: those that differ most.
    """

    maps: Tensor
    gains: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    scale: float
    block: int
    pool_tokens: int
    row_tokens: int = 1
    one_in: int = 1

    @property
    def is_residual(self) -> bool:
        """Whether the untrained score is a part of the score."""
        return self.maps.shape[1] == self.cos.shape[1]


@dataclass(frozen=True, slots=True)
class BytePanels:
    """Features of the keys of full blocks in 8 bits, where the processor `has_byte_scores` of their rank.

    cells [B, Hkv, size] int32, of which the first are taken; flaws [B, Hkv] fp32, NaN where a feature is no
    number, else 0.
    """

    blocks: int
    cells: Tensor
    flaws: Tensor


def best_shares_native(
    q: Tensor, k: Tensor, pooled: Tensor, weights: ScorerWeights, out: Tensor, block_q: int
) -> bool:
    """Fill `out` [B, Hq, n, blocks] with the log share of the neediest of `block_q` rows; is any of it NaN?

    Blocks that no row may choose have -inf. q [B, Hq, R, D] are the newest rows, k [B, Hkv, T, D] all keys,
    pooled [B, Hkv, P, features] what stands for them.
    """
    q, k, pooled = _as_native(q), _as_native(k), _as_rows(pooled, q.dtype)
    blocks = pooled.shape[2] * weights.pool_tokens // weights.block
    shape = _scores_shape(q, k, weights, out, block_q, blocks=blocks, pooled_h=pooled.stride(1))
    tables = [_pointer(t) for t in (weights.cos, weights.sin, weights.maps, weights.gains, weights.bias)]
    call = getattr(load_native(), f"sentei_scores_{DTYPES[q.dtype]}")
    found = [
        call(
            shape,
            *map(_pointer, (q[b], k[b], pooled[b])),
            *tables,
            c_float(weights.scale),
            c_float(math.log(weights.pool_tokens)),
            _pointer(out[b]),
            c_int(_threads()),
        )
        for b in range(q.shape[0])
    ]
    return any(found)


def pack_bytes_native(
    pooled: Tensor, dtype: torch.dtype, inverse_steps: Tensor, block: int, before: BytePanels | None = None
) -> BytePanels:
    """Pack the features [B, Hkv, P, rank] of the full blocks, rounded to `dtype`, for byte_shares_native.

    inverse_steps [Hkv, rank] fp32 say how many bytes a feature of 1 is. The blocks come behind those of
    `before`, which gives its tensors where they have room.
    """
    pooled = _as_rows(pooled, dtype)
    batch, kv_heads, tokens, rank = pooled.shape
    first = 0 if before is None else before.blocks
    panels = _room_for(before, batch, kv_heads, rank, block, first + tokens // block)
    shape = _fill_scores(
        Hkv=kv_heads,
        rank=rank,
        block=block,
        blocks=panels.blocks,
        pooled_h=pooled.stride(1),
        panel_h=panels.cells.shape[2],
        from_block=first,
    )
    call = getattr(load_native(), f"sentei_pack_bytes_{DTYPES[pooled.dtype]}")
    for b in range(batch):
        pointers = map(_pointer, (pooled[b], inverse_steps, panels.cells[b], panels.flaws[b]))
        call(shape, *pointers, c_int(_threads_for(kv_heads * tokens, _FEW_KEYS)))
    return panels


def gather_bytes_native(table: Tensor, cells: Tensor, flaws: Tensor, rank: int) -> BytePanels:
    """Do the same for the full pages `table` [W] int32 of one sequence.

    cells [P, Hkv, width / 4, block] int32, the rank filled up to whole vectors, and flaws [P, Hkv] are what
    encode_pages_native made of all pages.
    """
    kv_heads, block = cells.shape[1], cells.shape[3]
    panels = _room_for(None, 1, kv_heads, rank, block, len(table))
    shape = _fill_scores(
        Hkv=kv_heads, rank=rank, block=block, blocks=panels.blocks, panel_h=panels.cells.shape[2]
    )
    load_native().sentei_gather_bytes(
        shape, *map(_pointer, (table, cells, flaws, panels.cells, panels.flaws)), c_int(_threads())
    )
    return panels


def _room_for(
    before: BytePanels | None, batch: int, kv_heads: int, rank: int, block: int, blocks: int
) -> BytePanels:
    """Return panels for so many blocks, those of `before` in them: its own tensors while there is room."""
    library = load_native()
    library.sentei_byte_panel_size.restype = c_int64

    def size(blocks: int) -> int:
        return int(library.sentei_byte_panel_size(_fill_scores(rank=rank, block=block, blocks=blocks)))

    if before is not None and size(blocks) <= before.cells.shape[2]:
        return replace(before, blocks=blocks)
    room = size(blocks if before is None else blocks + blocks // _SHARE)
    cells, flaws = torch.empty(batch, kv_heads, room, dtype=torch.int32), torch.empty(batch, kv_heads)
    if before is not None:
        taken = size(before.blocks)
        cells[..., :taken] = before.cells[..., :taken]
        flaws.copy_(before.flaws)
    return BytePanels(blocks, cells, flaws)


def pack_byte_maps_native(maps: Tensor, steps: Tensor) -> Tensor:
    """Pack query maps [Hq, 2 D, rank], times the steps [Hkv, rank] of the bytes that they meet."""
    heads, rows, rank = maps.shape
    shape = _fill_scores(H=heads, Hkv=steps.shape[0], D=rows // 2, rank=rank)
    library = load_native()
    library.sentei_byte_map_size.restype = c_int64
    packed = torch.empty(heads, library.sentei_byte_map_size(shape))
    library.sentei_pack_byte_maps(shape, *map(_pointer, (maps, steps, packed)))
    return packed


def byte_shares_native(
    q: Tensor,
    k: Tensor,
    panels: BytePanels,
    byte_maps: Tensor,
    weights: ScorerWeights,
    out: Tensor,
    block_q: int,
) -> bool:
    """Do what best_shares_native does, in 8 bits, from the packed features of the full blocks of k."""
    q, k = _as_native(q), _as_native(k)
    sizes = {"blocks": panels.blocks, "panel_h": panels.cells.shape[2]}
    shape = _scores_shape(q, k, weights, out, block_q, **sizes)
    tables = (panels.cells, panels.flaws, byte_maps, weights.cos, weights.sin, weights.bias)
    is_odd = getattr(load_native(), f"sentei_byte_scores_{DTYPES[q.dtype]}")(
        shape,
        c_int64(q.shape[0]),
        _pointer(q),
        c_int64(q.stride(0)),
        _pointer(k),
        c_int64(k.stride(0)),
        *map(_pointer, tables),
        c_float(weights.scale),
        _pointer(out),
        c_int(_threads_for(q.shape[0] * k.shape[1] * k.shape[2] * out.shape[2], _FEW_SCORES)),
    )
    return bool(is_odd)


def _as_native(x: Tensor) -> Tensor:
    """The tensor in a dtype of the programs, its last axis contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dtype in DTYPES else x.float()


def _as_rows(pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """Features [B, Hkv, P, E] as rows that lie one behind the other within a head."""
    pooled = _as_native(pooled.to(dtype))
    return pooled if pooled.stride(2) == pooled.shape[3] else pooled.contiguous()


def _scores_shape(
    q: Tensor, k: Tensor, weights: ScorerWeights, out: Tensor, block_q: int, **keys: int
) -> ctypes.Array[c_int64]:
    tokens = q.shape[2]
    row_tokens = min(weights.row_tokens, block_q, tokens)
    return _fill_scores(
        H=q.shape[1],
        Hkv=k.shape[1],
        n=out.shape[2],
        rows=-(-min(block_q, tokens) // row_tokens),
        row_tokens=row_tokens,
        one_in=weights.one_in,
        num_rows=tokens,
        D=q.shape[3],
        rank=weights.maps.shape[2],
        is_residual=weights.is_residual,
        pools=weights.block // weights.pool_tokens,
        block=weights.block,
        q_h=q.stride(1),
        q_t=q.stride(2),
        k_h=k.stride(1),
        k_t=k.stride(2),
        T=k.shape[2],
        first=k.shape[2] - tokens,
        out_blocks=out.shape[3],
        num_bias=weights.bias.shape[1],
        **keys,
    )


def _fill_scores(**values: int) -> ctypes.Array[c_int64]:
    """The struct Scores; most calls need some of its fields alone."""
    return fill_struct("Scores", **{**dict.fromkeys(struct_fields("Scores"), 0), **values})


def has_byte_scores(rank: int) -> bool:
    """Whether this processor scores features of so many dimensions in 8 bits."""
    return bool(load_native().sentei_has_byte_scores(c_int64(rank)))


def pool_native(k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean of each full run of `size` keys, with and without rotation: [B, Hkv, T, D] to [B, Hkv, P, D].

    `cos` and `sin` [T, D] are fp32 and contiguous, and start at the first key's position.
    """
    batch, heads, tokens, dim = k.shape
    k = k.float() if k.stride(-1) == 1 else k.float().contiguous()
    k = k.flatten(0, 1)  # a copy only where sequences do not lie a whole number of heads apart
    pooled, plain = (torch.empty(batch, heads, tokens // size, dim) for _ in range(2))
    threads = _threads_for(batch * heads * tokens, _FEW_KEYS)
    load_native().sentei_pool(
        _pointer(k), *map(c_int64, k.stride()[:2]),
        *map(_pointer, (cos, sin, pooled, plain)),
        *map(c_int64, (batch * heads, tokens, dim, size)), c_int(threads),
    )  # fmt: skip
    return pooled, plain


def encode_native(k: Tensor, cos: Tensor, sin: Tensor, maps: Tensor) -> Tensor:
    """Features of single keys, [k, k without its rotation] @ maps: [B, Hkv, T, D] to [B, Hkv, T, rank].

    `cos` and `sin` [T, D] as for pool_native; maps [Hkv, 2 D, rank] fp32 and contiguous. In the dtype of k.
    """
    batch, heads, tokens, dim = k.shape
    k = _as_native(k).flatten(0, 1)
    features = torch.empty(batch, heads, tokens, maps.shape[2], dtype=k.dtype)
    threads = _threads_for(batch * heads * tokens, _FEW_KEYS)
    getattr(load_native(), f"sentei_encode_{DTYPES[k.dtype]}")(
        _pointer(k), *map(c_int64, k.stride()[:2]),
        *map(_pointer, (cos, sin, maps)), c_int64(heads), _pointer(features),
        *map(c_int64, (batch * heads, tokens, dim, maps.shape[2])), c_int(threads),
    )  # fmt: skip
    return features


def select_native(
    shares: Tensor, thresholds: Tensor, *, start: int, block_q: int, block_k: int, q_end: int
) -> tuple[Tensor, Tensor]:
    """Blocks whose share [H, n, blocks] passes its threshold [H, n], sink and diagonal: counts, indices."""
    heads, rows, blocks = shares.shape
    shares, thresholds = shares.contiguous(), thresholds.float().contiguous()
    counts = torch.empty(heads, rows, dtype=torch.int32)
    sizes = (heads, rows, blocks, start, block_q, block_k, q_end)
    threads = c_int(_threads_for(shares.numel(), _FEW_SHARES))
    library, given = load_native(), (shares, thresholds, counts)
    library.sentei_count(*map(_pointer, given), *map(c_int64, sizes), threads)
    # Lists as wide as the longest: of all blocks they would be several times what is read.
    indices = torch.empty(heads, rows, int(counts.max()), dtype=torch.int32)
    width = c_int64(indices.shape[2])
    library.sentei_list(*map(_pointer, (*given, indices)), width, *map(c_int64, sizes), threads)
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


def _threads_for(size: int, few: int) -> int:
    """All threads, or one where there are at most `few` items of work."""
    return _threads() if size > few else 1
