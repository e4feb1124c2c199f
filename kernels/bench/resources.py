"""What each Triton kernel takes on each target by default, read from the compilers' output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.layouts import BlockLists, PagedCache
from sentei.kernels.ops.registry import why_no_triton
from sentei.kernels.ops.rules import Grid, Softmax, TopK

if TYPE_CHECKING:
    from sentei.kernels.ops.triton.launch import Launch

TARGET_NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = ("prefill", "prefill_per_head", "decode", "merge", "mass", "select")
HEAD_DIMS = (64, 128, 256)
# The case: bf16, 32 query heads on 8 KV heads, 32k tokens, blocks of 64, lists per KV group, 8 splits, pages
# of 16 tokens.
HEADS, KV_HEADS, TOKENS, BLOCK, PAGE, SPLITS, BATCH = 32, 8, 32768, 64, 16, 8, 16
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel at one head size on one target."""

    kernel: str
    head_dim: int
    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_resources(head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Row]:
    """Compile every kernel for every target; `select` does not know heads and comes once."""
    refusal = why_no_triton("cuda")
    if refusal is not None:
        raise RuntimeError(f"nothing to compile with: {refusal}")
    from sentei.kernels.ops.triton.compile import compile_launch

    for kernel in KERNELS:
        for head_dim in head_dims if kernel != "select" else head_dims[:1]:
            for target in TARGET_NAMES:
                taken = asdict(compile_launch(make_launch(kernel, head_dim, target), target))
                yield Row(kernel, head_dim if kernel != "select" else 0, **taken)


def make_launch(kernel: str, head_dim: int, target: str) -> Launch:
    """Build the launch of the case on tensors without memory."""
    if kernel == "prefill":
        return _prefill(head_dim, target, mask_heads=KV_HEADS)
    if kernel == "prefill_per_head":
        return _prefill(head_dim, target, mask_heads=HEADS)
    if kernel == "mass":
        return _mass(head_dim, target)
    if kernel == "select":
        return _select()
    return _decode(head_dim, target, is_merge=kernel == "merge")


def to_markdown(rows: list[Row]) -> str:
    """Return the table for docs/kernels.md."""
    lines = ["| kernel | head | " + " | ".join(TARGET_NAMES) + " |", "|---|---|" + "---|" * len(TARGET_NAMES)]
    cells: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        spills = f", **{row.spills} spilled**" if row.spills else ""
        cell = f"{row.registers} / {row.shared_bytes / 1024:.0f} KiB / {row.num_warps}{spills}"
        cells.setdefault((row.kernel, row.head_dim), []).append(cell)
    for (kernel, head_dim), values in cells.items():
        lines.append(f"| {kernel} | {head_dim or '-'} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def put_table(text: str, rows: list[Row]) -> str:
    """Return the page with the table between its two marks replaced."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the page needs the marks {BEGIN} and {END}, one line each")
    return re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{to_markdown(rows)}\n{END}", text, flags=re.DOTALL)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _prefill(head_dim: int, target: str, *, mask_heads: int) -> Launch:
    from sentei.kernels.ops.triton.prefill import prefill_launch

    q, k = _empty(1, HEADS, TOKENS, head_dim), _empty(1, KV_HEADS, TOKENS, head_dim)
    num = TOKENS // BLOCK
    lists = (
        _empty(1, mask_heads, num, dtype=torch.int32),
        _empty(1, mask_heads, num, num, dtype=torch.int32),
    )
    mask = BlockMask(*lists, TOKENS, TOKENS, BLOCK, BLOCK)
    lse = _empty(1, HEADS, TOKENS, dtype=torch.float32)
    return prefill_launch((q, k, k), mask, Softmax(1.0), q, lse, target=target)


def _decode(head_dim: int, target: str, *, is_merge: bool) -> Launch:
    from sentei.kernels.ops.triton.decode import decode_launch, merge_launch

    q = _empty(BATCH, HEADS, 1, head_dim)
    parts = _empty(SPLITS, *q.shape, dtype=torch.float32)
    part_lse = _empty(SPLITS, *q.shape[:3], dtype=torch.float32)
    if is_merge:
        return merge_launch(parts, part_lse, q, _empty(*q.shape[:3], dtype=torch.float32), None)
    pages = _empty(BATCH * TOKENS // PAGE, KV_HEADS, PAGE, head_dim)
    table = _empty(BATCH, TOKENS // PAGE, dtype=torch.int32)
    cache = PagedCache(pages, pages, table, _empty(BATCH, dtype=torch.int32))
    counts = _empty(BATCH, KV_HEADS, dtype=torch.int32)
    lists = BlockLists(counts, _empty(BATCH, KV_HEADS, TOKENS // BLOCK, dtype=torch.int32), BLOCK)
    return decode_launch(q, cache, lists, Softmax(1.0), (parts, part_lse), target=target)


def _mass(head_dim: int, target: str) -> Launch:
    from sentei.kernels.ops.triton.mass import mass_launch

    q, k = _empty(1, HEADS, TOKENS, head_dim), _empty(1, KV_HEADS, TOKENS, head_dim)
    lse = _empty(1, HEADS, TOKENS, dtype=torch.float32)
    mass = _empty(1, HEADS, TOKENS, TOKENS // BLOCK, dtype=torch.float32)
    options: dict[str, Any] = {"scale": 1.0, "block_k": BLOCK, "q_offset": 0, "window": None}
    return mass_launch(q, k, _empty(TOKENS, dtype=torch.int64), lse, mass, target=target, **options)


def _select() -> Launch:
    from sentei.kernels.ops.triton.select import select_launch

    num = TOKENS // BLOCK
    scores = _empty(1, HEADS, num, num, dtype=torch.float32)
    lists = (_empty(1, HEADS, num, dtype=torch.int32), _empty(1, HEADS, num, num, dtype=torch.int32))
    return select_launch(scores, TopK(num // 10), Grid(TOKENS, TOKENS, BLOCK, BLOCK), *lists)
