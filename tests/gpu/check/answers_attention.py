"""Prefill and decode against fp64: every option, ragged lengths, packed sequences, and nothing to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend, attend_packed
from sentei.kernels.ops.block_mask import BlockMask, num_blocks
from sentei.kernels.ops.layouts import BlockLists, PackedMask
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.rules import Softmax

from .plan import Line, WrongAnswerError
from .tensors import draw, paged_cache, poisoned
from .truth import allowed_keys, attend_in, compare, compare_lse, torchs_own
from .worker import Bench


@dataclass(frozen=True, slots=True)
class Prompt:
    """A shape: (query heads, KV heads, lists), head size, rows and what lies before them, blocks, options."""

    heads: tuple[int, int, int]
    dim: int
    rows: int
    past: int = 0
    blocks: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    share: float = 0.3


def _prompt(name: str, bench: Bench) -> Prompt:
    sizes = bench.sizes
    timed = (sizes.block, sizes.block)
    rows = sizes.answer_tokens
    cases = {
        "groups": Prompt((sizes.heads, sizes.kv_heads, sizes.kv_heads), sizes.head_dim, rows, 0, timed),
        "heads": Prompt((sizes.heads, sizes.kv_heads, sizes.heads), sizes.head_dim, rows, 0, timed),
        "options": Prompt(
            (6, 2, 2), 64, rows - 41, 77, (64, 32), torch.float16, rows // 5, 5.0, has_sinks=True
        ),
        "fp32": Prompt((6, 2, 1), 60, rows // 3, 0, (16, 48), torch.float32),
        "last_row": Prompt((8, 2, 8), sizes.head_dim, 1, rows, timed, window=rows // 2),
        "empty": Prompt((4, 2, 4), 32, rows // 4, 9, share=0.0),
        "packed": Prompt((8, 2, 2), sizes.head_dim, rows // 3, 0, timed),
    }
    return cases[name]


def prefill(bench: Bench, case: str) -> Iterator[Line]:
    """Output and LSE lie within twice torch's own error of fp64; keys of blocks not listed are NaN."""
    if case == "packed":
        yield from _check_packed(bench, _prompt(case, bench))
        return
    shape = _prompt(case, bench)
    q, k, v, blocks = _draw(bench, shape)
    how = _how(bench, shape)
    allowed = _allowed(shape, blocks)
    exact, exact_lse = attend_in(torch.float64, q, k, v, allowed, how)
    own = torchs_own(q, k, v, allowed, how)
    own_lse = attend_in(torch.float32, q, k, v, allowed, how)[1]
    _spoil_unread(k, v, blocks, shape)
    with poisoned(bench.device):
        out, lse = attend(
            q,
            k,
            v,
            _mask(shape, blocks),
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
            return_lse=True,
            backend="triton",
        )
    assert lse is not None
    if shape.share == 0.0 and bool(out.any()):
        raise WrongAnswerError("rows with nothing to read must give zeros")
    yield compare("out", out, own, exact)
    yield compare_lse(lse, own_lse, exact_lse)


def _check_packed(bench: Bench, shape: Prompt) -> Iterator[Line]:
    """Three sequences laid end to end, the middle one of one row, the last with a cached prefix."""
    shapes = [shape, Prompt(shape.heads, shape.dim, 1), Prompt(shape.heads, shape.dim, 50, 40)]
    shapes = [Prompt(one.heads, one.dim, one.rows, one.past, shape.blocks) for one in shapes]
    parts = [_draw(bench, one) for one in shapes]
    packed = PackedMask.pack([_mask(one, part[3]) for one, part in zip(shapes, parts, strict=True)])
    q, k, v = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))
    with poisoned(bench.device):
        out, lse = attend_packed(q, k, v, packed, backend="triton")
    end = 0
    for i_seq, (one, part) in enumerate(zip(shapes, parts, strict=True)):
        rows = slice(end, end + one.rows)
        end = rows.stop
        allowed, how = _allowed(one, part[3]), _how(bench, one)
        exact, exact_lse = attend_in(torch.float64, *part[:3], allowed, how)
        own_lse = attend_in(torch.float32, *part[:3], allowed, how)[1]
        own = torchs_own(*part[:3], allowed, how)
        yield compare(f"out of sequence {i_seq}", out[rows].transpose(0, 1)[None], own, exact)
        yield compare_lse(lse[None, :, rows], own_lse, exact_lse)


def _draw(bench: Bench, shape: Prompt) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the blocks that are kept, bool [1, lists, Q, Kb]: sink and diagonal, or none at all."""
    q_heads, kv_heads, lists = shape.heads
    kv_len = shape.past + shape.rows
    q = draw(bench, 1, q_heads, shape.rows, shape.dim, dtype=shape.dtype)
    k, v = (draw(bench, 1, kv_heads, kv_len, shape.dim, dtype=shape.dtype) for _ in range(2))
    block_q, block_k = shape.blocks
    rows, keys = num_blocks(shape.rows, block_q), num_blocks(kv_len, block_k)
    noise = torch.rand(1, lists, rows, keys, generator=bench.generator, device=bench.device)
    first = shape.past + torch.arange(rows, device=bench.device) * block_q
    last = (first + block_q).clamp(max=kv_len) - 1
    index = torch.arange(keys, device=bench.device)
    is_forced = (index == 0) | (index >= (first // block_k)[:, None])
    blocks = (noise < shape.share) | (is_forced if shape.share > 0.0 else torch.zeros_like(is_forced))
    return q, k, v, blocks & (index <= (last // block_k)[:, None])


def _how(bench: Bench, shape: Prompt) -> Softmax:
    sinks = torch.linspace(-1, 3, shape.heads[0], device=bench.device) if shape.has_sinks else None
    return Softmax(shape.dim**-0.5, shape.window, shape.softcap, sinks)


def _allowed(shape: Prompt, blocks: Tensor) -> Tensor:
    positions = shape.past + torch.arange(shape.rows, device=blocks.device)
    block_q, block_k = shape.blocks
    kv_len = shape.past + shape.rows
    return allowed_keys(blocks, positions, kv_len, block_q=block_q, block_k=block_k, window=shape.window)


def _mask(shape: Prompt, blocks: Tensor) -> BlockMask:
    return BlockMask.from_dense(
        blocks,
        q_len=shape.rows,
        kv_len=shape.past + shape.rows,
        block_q=shape.blocks[0],
        block_k=shape.blocks[1],
        q_offset=shape.past,
    )


def _spoil_unread(k: Tensor, v: Tensor, blocks: Tensor, shape: Prompt) -> None:
    """NaN in every block that no list of a KV head names: it must not be touched."""
    lists, kv_heads = blocks.shape[1], k.shape[1]
    for head in range(kv_heads):
        own = slice(
            head * lists // kv_heads, max(head * lists // kv_heads + 1, (head + 1) * lists // kv_heads)
        )
        is_read = blocks[0, own].any(0).any(0).repeat_interleave(shape.blocks[1])[: k.shape[2]]
        k[0, head, ~is_read], v[0, head, ~is_read] = torch.nan, torch.nan


@dataclass(frozen=True, slots=True)
class Step:
    """(query heads, KV heads, lists), head size, new tokens, page, block, options."""

    heads: tuple[int, int, int]
    dim: int
    tokens: int = 1
    page: int = 16
    block: int = 64
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    num_splits: int | None = None


def _step(name: str, bench: Bench) -> Step:
    sizes = bench.sizes
    group = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    cases = {
        "groups": Step(group, sizes.head_dim, page=sizes.block, block=sizes.block),
        "heads": Step((sizes.heads, sizes.kv_heads, sizes.heads), sizes.head_dim, block=sizes.block),
        "options": Step((6, 2, 6), 64, 3, 16, 32, torch.float16, 90, 5.0, has_sinks=True, num_splits=5),
        "fp32": Step((3, 1, 1), 60, 2, 100, 48, torch.float32, num_splits=3),
    }
    return cases[name]


def decode(bench: Bench, case: str) -> Iterator[Line]:
    """Output and LSE lie within twice torch's own error of fp64; no page that is not listed is touched."""
    shape, longest = _step(case, bench), bench.sizes.answer_tokens
    ends = [longest, 1 + shape.tokens, longest // 2 + 1, 0, longest - 63]
    lengths = torch.tensor(ends, dtype=torch.int32, device=bench.device)
    q_heads, kv_heads, lists = shape.heads
    q = draw(bench, len(ends), q_heads, shape.tokens, shape.dim, dtype=shape.dtype)
    keys, values = (draw(bench, len(ends), kv_heads, longest, shape.dim, dtype=shape.dtype) for _ in range(2))
    blocks = _draw_step_blocks(bench, lengths, lists, num_blocks(longest, shape.block), shape.block)
    allowed = _allowed_step(shape, blocks, lengths, longest)
    sinks = torch.linspace(-1, 3, q_heads, device=bench.device) if shape.has_sinks else None
    how = Softmax(shape.dim**-0.5, shape.window, shape.softcap, sinks)
    exact, exact_lse = attend_in(torch.float64, q, keys, values, allowed, how)
    own = torchs_own(q, keys, values, allowed, how)
    own_lse = attend_in(torch.float32, q, keys, values, allowed, how)[1]
    cache = paged_cache(bench, keys, values, lengths, shape.page)
    with poisoned(bench.device):
        out, lse = attend_paged(
            q,
            cache,
            _step_lists(blocks, shape.block),
            window=shape.window,
            softcap=shape.softcap,
            sinks=sinks,
            num_splits=shape.num_splits,
            backend="triton",
        )
    yield compare("out", out, own, exact)
    yield compare_lse(lse, own_lse, exact_lse)


def _draw_step_blocks(bench: Bench, lengths: Tensor, lists: int, blocks: int, block: int) -> Tensor:
    """Random blocks of each sequence, bool [B, lists, Kb], its first and its last always in."""
    shape = (len(lengths), lists, blocks)
    noise = torch.rand(shape, generator=bench.generator, device=bench.device)
    ends = ((lengths + block - 1) // block)[:, None, None]
    index = torch.arange(blocks, device=bench.device)
    return ((noise < 0.4) | (index == 0) | (index == ends - 1)) & (index < ends)


def _allowed_step(shape: Step, blocks: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Bool [B, lists, tokens, longest]; a row before its sequence's first token sees nothing."""
    steps = torch.arange(shape.tokens, device=blocks.device) - shape.tokens
    positions = (lengths[:, None] + steps)[:, None]
    return allowed_keys(
        blocks[:, :, None],
        positions,
        longest,
        block_q=shape.tokens,
        block_k=shape.block,
        window=shape.window,
    )


def _step_lists(blocks: Tensor, block: int) -> BlockLists:
    counts = blocks.sum(-1, dtype=torch.int32)
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    is_past = torch.arange(blocks.shape[-1], device=blocks.device) >= counts[..., None]
    return BlockLists(counts, order.masked_fill(is_past, -1), block)
