"""What the Triton kernels share: a launch is a value, to be run here or compiled for a GPU elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.rules import Softmax

LOG2_E = 1.4426950408889634
Arguments = dict[str, Tensor | float | None]


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, its arguments and everything that is compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Start it on the device of its tensors."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages
            )


def softmax_arguments(how: Softmax) -> Arguments:
    """What `scaled_scores` takes, so that scores come out times log2(e), and the window."""
    if how.softcap is None:
        return {"scale": how.scale * LOG2_E, "cap": None, "window": how.window}
    return {"scale": how.scale / how.softcap, "cap": how.softcap * LOG2_E, "window": how.window}


def stride_arguments(axes: str, **tensors: Tensor) -> Arguments:
    """Strides of the leading axes by argument, as stride_qb for axis b of q."""
    return {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, tensor in tensors.items()
        for i, axis in enumerate(axes)
    }


def head_constants(q_heads: int, kv_heads: int, mask_heads: int, room: int) -> dict[str, int]:
    """How query heads fall to programs: up to `room` of a KV group, if they share a list, to one."""
    group = q_heads // kv_heads
    heads = 1 if mask_heads > kv_heads else min(triton.next_power_of_2(group), max(1, room))
    return {
        "GROUP": group,
        "MASK_GROUP": q_heads // mask_heads,
        "TILES_PER_GROUP": num_blocks(group, heads),
        "HEADS": heads,
    }


def size_constants(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head sizes of queries and values, and of the tiles that hold them."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    return {
        "HEAD_DIM": dim,
        "VALUE_DIM": value_dim,
        "DIM_QK": tile_size(dim),
        "DIM_V": tile_size(value_dim),
    }


def pick_target(device: torch.device) -> str:
    """The target (compile.TARGETS) whose tiles suit this device; the smallest where none is known."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def pick_precision(dtype: torch.dtype, target: str) -> str:
    """How fp32 products are made: three tf32 products on NVIDIA, fp32 itself elsewhere; moot below fp32.

    With fp32 arithmetic on NVIDIA the prefill kernel at head 256 spilled 33 kB a thread (ptxas, sm_90).
    """
    if triton.knobs.runtime.interpret:
        return "widened"
    return "ieee" if target == "gfx942" or dtype != torch.float32 else "tf32x3"


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """A matrix product, added to `acc` if there is one. The interpreter multiplies bf16 only once widened."""
    if PRECISION == "widened":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Round to `dtype`. The interpreter would cut fp32 off to bf16; devices round to nearest even."""
    if PRECISION == "widened" and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def largest(x, axis: tl.constexpr, PRECISION: tl.constexpr):
    """The largest along an axis, NaN passed over, as devices do; the interpreter warns where all are NaN."""
    if PRECISION == "widened":
        x = tl.where(x == x, x, float("-inf"))
    return tl.max(x, axis)


@triton.jit
def first_slot(listed, count, target):
    """Index of the first entry at or past `target` in an ascending list."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(listed + middle) < target
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def scaled_scores(queries, keys_t, scale, cap, PRECISION: tl.constexpr):
    """Scaled scores times log2(e), through tanh where there is a cap; exact at both ends of it."""
    scores = product(queries, keys_t, None, PRECISION) * scale
    if cap is not None:
        decay = tl.exp2(tl.abs(scores) * -2.8853900817779268)
        size = (1.0 - decay) / (1.0 + decay)
        scores = cap * tl.where(scores < 0, -size, size)
    return scores


def tile_size(number: int) -> int:
    """The smallest power of two that holds `number`, and 16 at least: what a matrix instruction takes."""
    return max(16, 1 << (number - 1).bit_length())


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis lies side by side in memory, else a copy that does."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
