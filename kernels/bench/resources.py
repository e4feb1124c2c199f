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
KERNELS = (
    "prefill",
    "prefill_per_head",
    "decode",
    "merge",
    "mass",
    "select",
    "encode",
    "encode_residual",
    "scores",
    "scores_residual",
    "step_scores",
    "step_scores_residual",
    "select_step",
)
# These do not know the size of a head: they come once.
HEADLESS = ("select", "scores", "step_scores", "select_step")
HEAD_DIMS = (64, 128, 256)
# The case: bf16, 32 query heads on 8 KV heads, 32k tokens, blocks of 64, lists per KV group, 8 splits, pages
# of 16 tokens.
HEADS, KV_HEADS, TOKENS, BLOCK, PAGE, SPLITS, BATCH = 32, 8, 32768, 64, 16, 8, 16
# Scored as distilled: single tokens in 32 dimensions, 4 queries as one; the residual form over means of 4.
RANK, QUERY_POOL, RANK_RESIDUAL, POOL_RESIDUAL = 32, 4, 64, 4
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


def read_resources(
    head_dims: tuple[int, ...] = HEAD_DIMS, kernels: tuple[str, ...] = KERNELS
) -> Iterator[Row]:
    """Compile kernels for every target."""
    refusal = why_no_triton("cuda")
    if refusal is not None:
        raise RuntimeError(f"nothing to compile with: {refusal}")
    from sentei.kernels.ops.triton.compile import compile_launch

    for kernel in kernels:
        for head_dim in head_dims if kernel not in HEADLESS else (0,):
            for target in TARGET_NAMES:
                taken = asdict(compile_launch(make_launch(kernel, head_dim, target), target))
                yield Row(kernel, head_dim, **taken)


def make_launch(kernel: str, head_dim: int, target: str) -> Launch:
    """Build the launch of the case on tensors without memory."""
    if kernel == "prefill":
        return _prefill(head_dim, target, mask_heads=KV_HEADS)
    if kernel == "prefill_per_head":
        return _prefill(head_dim, target, mask_heads=HEADS)
    if kernel == "mass":
        return _mass(head_dim, target)
    if kernel in ("encode", "encode_residual"):
        return _encode(head_dim, target, is_residual=kernel == "encode_residual")
    if kernel in ("scores", "scores_residual"):
        return _scores(head_dim, target)
    if kernel in ("step_scores", "step_scores_residual"):
        return _step_scores(head_dim, target)
    if kernel in ("select", "select_step"):
        return _select() if kernel == "select" else _select_step()
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


def _encode(head_dim: int, target: str, *, is_residual: bool) -> Launch:
    from sentei.kernels.ops.triton.encode import Encoding, Near, encode_launch

    pool, rank = (1, RANK_RESIDUAL) if is_residual else (QUERY_POOL, RANK)
    width = head_dim if is_residual else 2 * head_dim
    angles = _empty(TOKENS, head_dim, dtype=torch.float32)
    gains = _empty(HEADS, dtype=torch.float32) if is_residual else None
    how = Encoding(_empty(HEADS, width, rank), angles, angles, pool, gains)
    q, k = _empty(1, HEADS, TOKENS, head_dim), _empty(1, KV_HEADS, TOKENS, head_dim)
    out = _empty(1, HEADS, TOKENS // pool, how.num_features(head_dim))
    forced = _empty(1, HEADS, TOKENS // pool, dtype=torch.float32)
    near = Near(k, 1.0, BLOCK, BLOCK)
    return encode_launch(q, how, out, first=0, near=near, forced=forced, target=target)


def _scored(head_dim: int, rows: int, batch: int) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Features, pools of a block, forced and bias; a head size names the residual form."""
    features = head_dim + RANK_RESIDUAL if head_dim else RANK
    forced = _empty(batch, HEADS, rows, dtype=torch.float32)
    bias = _empty(HEADS, TOKENS // BLOCK * 2, dtype=torch.float32)
    return features, POOL_RESIDUAL if head_dim else 1, forced, bias


def _scores(head_dim: int, target: str) -> Launch:
    from sentei.kernels.ops.triton.scores import Features, scores_launch

    query_pool = 1 if head_dim else QUERY_POOL
    width, pool, forced, bias = _scored(head_dim, TOKENS // query_pool, 1)
    rows = _empty(1, HEADS, TOKENS // query_pool, width)
    features = Features(rows, _empty(1, KV_HEADS, TOKENS // pool, width), forced, bias, pool, query_pool)
    num = TOKENS // BLOCK
    out = _empty(1, HEADS, num, num, dtype=torch.float32)
    return scores_launch(features, Grid(TOKENS, TOKENS, BLOCK, BLOCK), out, target=target)


def _step_scores(head_dim: int, target: str) -> Launch:
    from sentei.kernels.ops.triton.scores import Features
    from sentei.kernels.ops.triton.step_scores import step_launch

    width, pool, forced, bias = _scored(head_dim, 1, BATCH)
    pages = _empty(BATCH * TOKENS // BLOCK, KV_HEADS, BLOCK // pool, width)
    features = Features(_empty(BATCH, HEADS, 1, width), pages, forced, bias, pool)
    table = _empty(BATCH, TOKENS // BLOCK, dtype=torch.int32)
    out = _empty(BATCH, HEADS, TOKENS // BLOCK, dtype=torch.float32)
    lengths = _empty(BATCH, dtype=torch.int32)
    return step_launch(features, lengths, out, block_k=BLOCK, page_table=table, target=target)


def _select_step() -> Launch:
    from sentei.kernels.ops.triton.select import select_step_launch

    num = TOKENS // BLOCK
    counts, is_odd = (_empty(BATCH, KV_HEADS, dtype=torch.int32) for _ in range(2))
    indices = _empty(BATCH, KV_HEADS, num // 4, dtype=torch.int32)
    logits, forced = (_empty(BATCH, HEADS, *more, dtype=torch.float32) for more in ((num,), ()))
    lengths = _empty(BATCH, dtype=torch.int32)
    return select_step_launch(logits, forced, forced, lengths, (counts, indices, is_odd), block_k=BLOCK)
