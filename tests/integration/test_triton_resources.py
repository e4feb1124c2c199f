"""Every Triton kernel compiles for every target, and takes no more than it may."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.kernels.bench.resources import (
    KERNELS,
    TARGET_NAMES,
    Row,
    put_table,
    read_resources,
    to_markdown,
)
from sentei.kernels.ops.layouts import BlockLists, PackedMask, PagedCache
from sentei.kernels.ops.rules import Grid, Rule, Softmax, Threshold, TopP

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)
# What a program may take at head size 128: (registers per thread, bytes of shared memory; on gfx942 64 KiB at
# most). Prefill: one program of 8 warps fills a unit of 65,536 registers, and an A100's has 163 KiB. Decode
# waits for memory, so four programs of 4 warps must fit; select and merge are smaller; of mass, one fits.
BOUNDS = {
    "prefill": (255, 160 * 1024),
    "prefill_per_head": (255, 160 * 1024),
    "decode": (128, 40 * 1024),
    "merge": (64, 8 * 1024),
    "mass": (192, 80 * 1024),
    "select": (64, 16 * 1024),
    # Scoring: two programs of 8 warps fill a unit's registers, or one with the features of the residual form.
    "encode": (176, 32 * 1024),
    "encode_residual": (128, 32 * 1024),
    "scores": (128, 24 * 1024),
    "scores_residual": (255, 100 * 1024),
    "step_scores": (64, 8 * 1024),
    "step_scores_residual": (80, 40 * 1024),
    "select_step": (80, 16 * 1024),
}
ROW = Row("prefill", 128, "sm_80", 8, 200, 0, 65536)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    """Whole numbers without memory."""
    return empty(*shape, dtype=torch.int32)


def floats(*shape: int) -> torch.Tensor:
    """Single precision without memory."""
    return empty(*shape, dtype=torch.float32)


def make_prefill() -> Any:
    """Packed, windowed, capped, with sinks, odd sizes, masks per head."""
    from sentei.kernels.ops.triton.prefill import prefill_launch

    mask = PackedMask(ints(6, 9), ints(6, 9, 5), ints(4), ints(4), 48, 48)
    q, k = empty(1, 6, 333, 60), empty(1, 2, 400, 60)
    how = Softmax(0.1, window=70, softcap=30.0, sinks=floats(6))
    return prefill_launch((q, k, k), mask, how, q, floats(1, 6, 333), target="sm_80")


def make_decode() -> Any:
    """Several tokens, a window, a cap, pages of an odd size."""
    from sentei.kernels.ops.triton.decode import decode_launch

    cache = PagedCache(empty(50, 2, 10, 60), empty(50, 2, 10, 60), ints(3, 20), ints(3))
    lists = BlockLists(ints(3, 1), ints(3, 1, 7), 48)
    parts = (floats(4, 3, 6, 2, 60), floats(4, 3, 6, 2))
    q = empty(3, 6, 2, 60)
    how = Softmax(0.1, window=70, softcap=30.0)
    return decode_launch(q, cache, lists, how, parts, target="sm_80")


def make_merge() -> Any:
    """With sinks."""
    from sentei.kernels.ops.triton.decode import merge_launch

    out = (empty(3, 6, 2, 60), floats(3, 6, 2))
    return merge_launch(floats(5, 3, 6, 2, 60), floats(5, 3, 6, 2), *out, floats(6))


def make_mass() -> Any:
    """With a window, over blocks of an odd size."""
    from sentei.kernels.ops.triton.mass import mass_launch

    rows = empty(77, dtype=torch.int64)
    q, k = empty(1, 6, 333, 60), empty(1, 2, 400, 60)
    options: dict[str, Any] = {"scale": 0.1, "block_k": 48, "q_offset": 67, "window": 70}
    return mass_launch(q, k, rows, floats(1, 6, 77), floats(1, 6, 77, 9), target="sm_80", **options)


def make_select(rule: Rule) -> Any:
    """A chunk with a past, blocks of two sizes, a bounded width."""
    from sentei.kernels.ops.triton.select import select_launch

    grid = Grid(300, 365, 64, 32, 65)
    return select_launch(floats(1, 2, 5, 12), rule, grid, ints(1, 2, 5), ints(1, 2, 5, 9))


def make_encode() -> Any:
    """One row of each sequence beside pages of an odd size, residual, a group of 3."""
    from sentei.kernels.ops.triton.encode import Encoding, Near, encode_launch

    how = Encoding(empty(6, 60, 24), floats(999, 60), floats(999, 60), 1, floats(6))
    near = Near(empty(50, 2, 48, 60), 0.1, 48, 48, ints(3, 20))
    out, forced = empty(3, 6, 1, 84), floats(3, 6, 1)
    return encode_launch(
        empty(3, 6, 1, 60), how, out, first=ints(3), near=near, forced=forced, target="sm_80"
    )


def make_scores() -> Any:
    """A chunk with a past, a group of 3, blocks of 12 pools, 48 features in two tiles."""
    from sentei.kernels.ops.triton.scores import Features, scores_launch

    features = Features(empty(2, 6, 333, 48), empty(2, 2, 100, 48), floats(2, 6, 333), floats(6, 16), 4)
    return scores_launch(features, Grid(333, 400, 16, 48, 67), floats(2, 6, 21, 9), target="sm_80")


def make_step_scores() -> Any:
    """Keys side by side, a group of 3, blocks of 12 pools."""
    from sentei.kernels.ops.triton.scores import Features
    from sentei.kernels.ops.triton.step_scores import step_launch

    features = Features(empty(2, 6, 1, 48), empty(2, 2, 100, 48), floats(2, 6, 1), floats(6, 16), 4)
    return step_launch(features, ints(2), floats(2, 6, 9), block_k=48, target="sm_80")


def make_select_step() -> Any:
    """A group of 3 in one list, all blocks."""
    from sentei.kernels.ops.triton.select import select_step_launch

    results = (ints(2, 2), ints(2, 2, 9), ints(2, 2))
    return select_step_launch(floats(2, 6, 9), floats(2, 6), floats(2, 6), ints(2), results, block_k=48)


OPTIONS: dict[str, Callable[[], Any]] = {
    "prefill": make_prefill,
    "decode": make_decode,
    "merge": make_merge,
    "mass": make_mass,
    "select threshold": lambda: make_select(Threshold(floats(1, 2, 1))),
    "select top-p": lambda: make_select(TopP(0.9)),
    "encode": make_encode,
    "scores": make_scores,
    "step scores": make_step_scores,
    "select step": make_select_step,
}


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_and_within_bounds_at_head_128(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled afresh for four targets: nothing spills, registers and shared memory keep their bounds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    registers, shared_bytes = BOUNDS[kernel]

    rows = list(read_resources((128,), (kernel,)))

    assert [(row.kernel, row.target) for row in rows] == [(kernel, target) for target in TARGET_NAMES]
    for row in rows:
        assert row.spills == 0, row
        assert row.registers <= registers, row
        assert row.shared_bytes <= (
            min(shared_bytes, 64 * 1024) if row.target == "gfx942" else shared_bytes
        ), row


@needs_triton
@pytest.mark.parametrize("name", OPTIONS)
def test_options_compile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter takes lightly, types above all, the compiler takes too: each option."""
    from sentei.kernels.ops.triton.compile import compile_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    assert compile_launch(OPTIONS[name](), "sm_80").registers > 0


def test_table_stands_between_its_marks() -> None:
    """The page keeps its words, the table is replaced, spills are named, a page without marks is refused."""
    page = "before\n<!-- resources: begin -->\nold\n<!-- resources: end -->\nafter"

    text = put_table(page, [ROW])

    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    assert "| prefill | 128 | 200 / 64 KiB / 8 |" in text
    assert "**12 spilled**" in to_markdown([Row("mass", 64, "sm_90", 8, 255, 12, 1024)])
    with pytest.raises(ValueError, match="needs the marks"):
        put_table("nothing", [ROW])
