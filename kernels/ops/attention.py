"""The two doors: sparse attention over a block mask, and the dense baseline it is measured against."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import MaskError, ShapeError
from sentei.kernels.ops.layouts import PackedMask
from sentei.kernels.ops.limits import DECODE_ROWS_MAX
from sentei.kernels.ops.registry import COMPILED_BACKENDS, Request, give_up_on, pick_backend
from sentei.kernels.ops.rules import Softmax


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention over the selected blocks, causal token by token: (out, lse or None).

    q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D]; out as q, lse [B, Hq, Tq] fp32 if asked for. A row with nothing
    selected gives zeros and an LSE of -inf. `window` keeps the last `window` keys of a row, its own included;
    `softcap` bends scores to softcap * tanh(s / softcap); `sinks` [Hq] adds a valueless logit to each row.
    Inference only: no gradient flows.
    """
    check_shapes(q, k, v, mask, window)
    how = Softmax(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, sinks)
    _check_extras(q, how)
    request = Request(
        q.device.type,
        q.dtype,
        q.shape[2],
        needs_lse=return_lse,
        block_k=mask.block_k,
        needs_softcap=softcap is not None,
        needs_sinks=sinks is not None,
    )
    with torch.no_grad():
        while True:
            chosen = pick_backend(request, backend).backend
            try:
                out, lse = chosen.load()(q, k, v, mask, how)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler can fail in any way; correctness must not depend on it
                if backend != "auto" or chosen.name not in COMPILED_BACKENDS:
                    raise
                give_up_on(chosen.name, error)
            else:
                return out, (lse if return_lse else None)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PackedMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same over sequences laid end to end: (out [Tq, Hq, Dv], lse [Hq, Tq]); one launch on a GPU.

    q [Tq, Hq, D], k and v [Tk, Hkv, D]. Elsewhere each sequence goes through `attend` in turn.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    request = Request(q.device.type, q.dtype, q.shape[0], needs_lse=True)
    if pick_backend(request, backend).backend.name == "triton":
        from sentei.kernels.ops.triton.prefill import attend_packed_triton

        with torch.no_grad():
            return attend_packed_triton(q, k, v, mask, Softmax(scale, window, softcap, sinks))
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), torch.empty(q.shape[1], q.shape[0], device=q.device)
    start_q = start_k = 0
    for part in mask.unpack():
        rows, keys = slice(start_q, start_q + part.q_len), slice(start_k, start_k + part.kv_len)
        one_q, one_k, one_v = (tensor.transpose(0, 1)[None] for tensor in (q[rows], k[keys], v[keys]))
        one, one_lse = attend(
            one_q,
            one_k,
            one_v,
            part,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            return_lse=True,
            backend=backend,
        )
        assert one_lse is not None
        out[rows], lse[:, rows] = one[0].transpose(0, 1), one_lse[0]
        start_q, start_k = rows.stop, keys.stop
    return out, lse


def dense_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    q_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Dense causal (or sliding-window) attention by the fastest means known here: the baseline to beat.

    `backend` is auto, sdpa, or one that `attend` knows. Row i sits at position `q_offset + i`. Auto takes
    SDPA for a few rows and the native program for a prompt (16384 tokens, 4:1 heads, 2 AVX2 cores: 1.07
    times faster than SDPA at head 64, 1.11 at 256). Without it SDPA takes a whole causal prompt, Flex a
    window or a chunk with a past, where SDPA would compute what it then masks.
    """
    mask = _causal_mask(q.shape[2], k.shape[2], q_offset, q.device)
    check_shapes(q, k, v, mask, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "sdpa" or (backend == "auto" and _is_for_sdpa(q, k, mask, window)):
        with torch.no_grad():
            return _dense_sdpa(q, k, v, scale=scale, window=window, q_offset=q_offset)
    return attend(q, k, v, mask, scale=scale, window=window, backend=backend)[0]


def _is_for_sdpa(q: Tensor, k: Tensor, mask: BlockMask, window: int | None) -> bool:
    if q.shape[2] <= DECODE_ROWS_MAX:
        return True
    is_whole = window is None and mask.q_offset == 0 and q.shape[2] == k.shape[2]
    request = Request(q.device.type, q.dtype, q.shape[2], block_k=mask.block_k)
    return is_whole and pick_backend(request).backend.name != "native"


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, window: int | None) -> None:
    """Raise ShapeError or MaskError, by name and value, where tensors, mask and window do not fit."""
    if (
        q.dim() != 4
        or k.dim() != 4
        or v.dim() != 4
        or k.shape[:3] != v.shape[:3]
        or q.shape[-1] != k.shape[-1]
    ):
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "pass q [B, Hq, Tq, D] and k, v [B, Hkv, Tk, D]"
        )
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if k.shape[0] != batch or q_heads % kv_heads:
        raise ShapeError(f"q has batch {batch} and {q_heads} heads, k has {k.shape[0]} and {kv_heads}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ShapeError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; pass one dtype")
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise MaskError(
            f"the mask is for {mask.q_len} x {mask.kv_len} tokens, the tensors have {q_len} x {kv_len}"
        )
    if mask.counts.shape[0] not in (1, batch) or mask.counts.shape[1] not in (1, kv_heads, q_heads):
        raise MaskError(
            f"the mask has batch {mask.counts.shape[0]} and {mask.counts.shape[1]} heads; "
            f"batch must be 1 or {batch}, heads 1, {kv_heads} or {q_heads}"
        )
    if window is not None and window < 1:
        raise ShapeError(f"window is {window}; pass at least 1, or None for no window")


def _check_extras(q: Tensor, how: Softmax) -> None:
    softcap, sinks = how.softcap, how.sinks
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"softcap is {softcap}; pass a positive number, or None for no cap")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ShapeError(
            f"sinks have shape {tuple(sinks.shape)}; pass one logit per query head: ({q.shape[1]},)"
        )


@lru_cache(maxsize=64)
def _causal_mask(q_len: int, kv_len: int, q_offset: int, device: torch.device) -> BlockMask:
    return BlockMask.causal(q_len, kv_len, q_offset=q_offset, device=device)


def _dense_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, q_offset: int
) -> Tensor:
    """SDPA: causal over a whole prompt, else over the visible keys with an explicit mask.

    With a mask each KV head's query heads are folded into its rows, so that keys and values are not repeated.
    """
    batch, q_heads, q_len, dim = q.shape
    kv_heads = k.shape[1]
    if window is None and q_len == k.shape[2] > DECODE_ROWS_MAX:
        k, v = (t[:, :, None].expand(-1, -1, q_heads // kv_heads, -1, -1).flatten(1, 2) for t in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    start = 0 if window is None else max(0, q_offset - window + 1)
    end = q_offset + q_len
    keys = torch.arange(start, end, device=q.device)
    position = (q_offset + torch.arange(q_len, device=q.device))[:, None]
    allowed = keys <= position
    if window is not None:
        allowed &= keys > position - window
    group = q_heads // kv_heads
    folded = q.reshape(batch, kv_heads, group * q_len, dim)
    attn_mask = None if q_len == 1 else allowed.repeat(group, 1)
    out = scaled_dot_product_attention(
        folded, k[:, :, start:end], v[:, :, start:end], attn_mask=attn_mask, scale=scale
    )
    return out.reshape(batch, q_heads, q_len, v.shape[-1])
