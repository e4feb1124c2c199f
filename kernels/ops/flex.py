"""Block-sparse attention on torch's FlexAttention, compiled: the CPU's fast path, and a peer on GPUs.

One compiled program per `Signature` serves every length, offset and batch: it is compiled once on a small
example whose sizes all differ (equal sizes would be compiled in as "always equal"), with `dynamic=True`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import flex_attention

from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.rules import Softmax

_NO_WINDOW = 1 << 40
# Programs per signature before torch gives up: one is expected, the rest is room for strides it tells apart.
_RECOMPILE_LIMIT = 8

Program = Callable[..., Tensor]


@dataclass(frozen=True)
class FlexLists:
    """The lists FlexAttention reads: blocks that need the token mask, and blocks that do not."""

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


@dataclass(frozen=True)
class Signature:
    """Everything that is compiled in."""

    dtype: torch.dtype
    device: str
    dims: tuple[int, int]
    heads: tuple[int, int, int]
    blocks: tuple[int, int]
    scale: float
    is_batched: bool
    is_mask_batched: bool
    is_inference: bool
    layouts: tuple[str, str, str]
    threads: int


_programs: dict[Signature, Program] = {}
_compile_lock = threading.Lock()


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax) -> tuple[Tensor, None]:
    """Attention by compiled FlexAttention: (out [B, Hq, Tq, D], None), as the CPU's program has no LSE."""
    if how.softcap is not None or how.sinks is not None:
        raise ShapeError("flex computes neither softcap nor sinks; pass backend='auto' to attend")
    dtype = q.dtype
    q, k, v = (_prepare(tensor) for tensor in (q, k, v))
    signature = _signature(q, k, v, mask, how.scale)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        program = _programs.get(signature) or _compile(signature)
        lists = to_flex_lists(mask, how.window)
        out = program(q, k, v, *_arguments(lists, mask.q_offset, how.window, q.device))
    return out.to(dtype), None


def num_programs() -> int:
    """Compiled signatures so far in this process."""
    return len(_programs)


def to_flex_lists(mask: BlockMask, window: int | None = None) -> FlexLists:
    """Split the compact lists at the diagonal and at the window's edge, without a loop or a dense matrix.

    Each ascending list falls into four: out of the window, across its edge, full, across the diagonal.
    """
    mask = mask.within(window)
    listed = mask.indices >= 0
    rows = torch.arange(mask.counts.shape[2], device=mask.indices.device, dtype=torch.int32)
    first = (mask.q_offset + rows * mask.block_q)[:, None]
    end_full = (listed & (mask.indices < (first + 1) // mask.block_k)).sum(-1)
    if window is None:
        num_low = torch.zeros_like(end_full)
    else:
        last = (first + mask.block_q).clamp(max=mask.q_offset + mask.q_len) - 1
        num_low = (listed & (mask.indices * mask.block_k < last - window + 1)).sum(-1)
        end_full = torch.maximum(end_full, num_low)
    slots = torch.arange(_partial_width(mask, window), device=mask.indices.device)
    places = torch.where(slots < num_low[..., None], slots, (end_full - num_low)[..., None] + slots)
    partial = _take(mask, places)
    full = mask.indices
    if window is not None:
        full = _take(mask, num_low[..., None] + torch.arange(mask.indices.shape[3], device=full.device))
    return FlexLists(
        _widen(num_low + mask.counts - end_full, mask),
        _widen(partial, mask),
        _widen(end_full - num_low, mask),
        _widen(full, mask),
    )


def _partial_width(mask: BlockMask, window: int | None) -> int:
    crossing = -(-mask.block_q // mask.block_k) + 1
    return min(mask.indices.shape[3], crossing if window is None else 2 * crossing)


def _take(mask: BlockMask, places: Tensor) -> Tensor:
    return mask.indices.gather(-1, places.clamp(max=mask.indices.shape[3] - 1))


def _widen(lists: Tensor, mask: BlockMask) -> Tensor:
    """Copy into the size FlexAttention wants: all key blocks wide, and no size of 1, which is compiled in."""
    size = [*lists.shape[:2], max(2, mask.num_q_blocks)]
    if lists.dim() == 4:
        size.append(max(2, mask.num_k_blocks))
    wide = torch.zeros(size, dtype=torch.int32, device=lists.device)
    wide[:, :, : lists.shape[2], ...].narrow(-1, 0, lists.shape[-1]).copy_(lists.clamp(min=0))
    return wide


def _arguments(
    lists: FlexLists, q_offset: int, window: int | None, device: torch.device
) -> tuple[Tensor, ...]:
    reach = _NO_WINDOW if window is None else window
    return (
        lists.partial_counts,
        lists.partial_indices,
        lists.full_counts,
        lists.full_indices,
        torch.tensor(q_offset, device=device),
        torch.tensor(reach, device=device),
    )


def _signature(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Signature:
    return Signature(
        dtype=q.dtype,
        device=q.device.type,
        dims=(q.shape[-1], v.shape[-1]),
        heads=(q.shape[1], k.shape[1], mask.counts.shape[1]),
        blocks=(mask.block_q, mask.block_k),
        scale=scale,
        is_batched=q.shape[0] > 1,
        is_mask_batched=mask.counts.shape[0] > 1,
        is_inference=torch.is_inference_mode_enabled(),
        layouts=(_layout(q), _layout(k), _layout(v)),
        threads=torch.get_num_threads(),
    )


def _compile(signature: Signature) -> Program:
    with _compile_lock:
        if signature not in _programs:
            # torch's overloads lag behind its signature: they lack the last two options.
            program: Program = torch.compile(  # type: ignore[call-overload]
                _program_of(signature),
                dynamic=True,
                fullgraph=True,
                isolate_recompiles=True,
                recompile_limit=_RECOMPILE_LIMIT,
            )
            program(*_example(signature))
            _programs[signature] = program
        return _programs[signature]


def _program_of(signature: Signature) -> Program:
    scale, blocks = signature.scale, signature.blocks

    def block_sparse(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        partial_counts: Tensor,
        partial_indices: Tensor,
        full_counts: Tensor,
        full_indices: Tensor,
        q_offset: Tensor,
        window: Tensor,
    ) -> Tensor:
        def is_visible(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            position = row + q_offset
            return (key <= position) & (key > position - window)

        torch_mask = TorchBlockMask.from_kv_blocks(
            partial_counts,
            partial_indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=blocks,
            mask_mod=is_visible,
            seq_lengths=(q.size(2), k.size(2)),
            compute_q_blocks=False,
        )
        return flex_attention(q, k, v, block_mask=torch_mask, scale=scale, enable_gqa=True)

    return block_sparse


def _example(signature: Signature) -> tuple[Tensor, ...]:
    """Small inputs of this signature whose free sizes all differ from each other and from the fixed ones."""
    q_heads, kv_heads, mask_heads = signature.heads
    block_q, block_k = signature.blocks
    taken = {*signature.dims, *signature.heads, *signature.blocks, 0, 1}
    batch = _fresh_size(2, taken) if signature.is_batched else 1
    num_q_blocks = _fresh_size(2, taken)
    q_len = _fresh_size((num_q_blocks - 1) * block_q + 1, taken)
    num_k_blocks = _fresh_size(num_blocks(q_len, block_k) + 1, taken)
    kv_len = _fresh_size((num_k_blocks - 1) * block_k + 2, taken)
    device = torch.device(signature.device)
    q, k, v = (
        _laid_out((batch, heads, length, dim), layout, signature.dtype, device)
        for heads, length, dim, layout in (
            (q_heads, q_len, signature.dims[0], signature.layouts[0]),
            (kv_heads, kv_len, signature.dims[0], signature.layouts[1]),
            (kv_heads, kv_len, signature.dims[1], signature.layouts[2]),
        )
    )
    offset = kv_len - q_len
    mask = BlockMask.causal(q_len, kv_len, block_q=block_q, block_k=block_k, q_offset=offset, device=device)
    lists = to_flex_lists(mask)
    mask_batch = batch if signature.is_mask_batched else 1
    repeated = [
        tensor.repeat(mask_batch, mask_heads, *[1] * (tensor.dim() - 2))
        for tensor in (lists.partial_counts, lists.partial_indices, lists.full_counts, lists.full_indices)
    ]
    return (q, k, v, *_arguments(FlexLists(*repeated), offset, None, device))


def _fresh_size(at_least: int, taken: set[int]) -> int:
    while at_least in taken:
        at_least += 1
    taken.add(at_least)
    return at_least


def _laid_out(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    batch, heads, length, dim = shape
    if layout == "BTHD":
        return torch.zeros(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    spare = 0 if layout == "BHTD" else 13
    return torch.zeros(batch, heads, length + spare, dim, dtype=dtype, device=device)[:, :, :length]


def _layout(tensor: Tensor) -> str:
    """Name the memory order: torch compiles strides in where they follow from the sizes."""
    if tensor.is_contiguous():
        return "BHTD"
    return "BTHD" if tensor.transpose(1, 2).is_contiguous() else "strided"


def _prepare(tensor: Tensor) -> Tensor:
    """Detached, with its last dimension dense, and in fp32 on the CPU.

    Compiled for the CPU, fp32 beats bf16 by 1.6 to 1.8 times with AVX2 at head sizes 32 and 256 (4096 tokens,
    2 cores: 88 against 49 GF/s at 256), and was faster with AVX512-BF16 at 256 too; the casts take 2%.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
