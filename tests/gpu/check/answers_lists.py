"""Block mass and selection against fp64 and the rules' own words; selection and attention in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.ops.layouts import BlockLists
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.rules import Grid, Rule, Threshold, TopK, TopP
from sentei.kernels.ops.select import select_lists
from sentei.kernels.ops.tolerances import MASS_SUM_ATOL

from .plan import Line, SkipRowError, WrongAnswerError
from .tensors import draw, draw_prompt, paged_cache, poisoned, prompt_grid
from .truth import compare, compare_lse
from .worker import Bench

SHARE, BLOCKS = 0.9, 9
# Weights of a row sum to 1 and the kernel adds them in fp32: a block this near to the bound may go or stay.
MARGIN = 1e-5


def mass(bench: Bench, case: str) -> Iterator[Line]:
    """LSE and mass are those of fp64; keys ahead of every row are NaN and never touched."""
    sizes = bench.sizes
    tokens, past = sizes.answer_tokens, 40
    heads, dim, block = (sizes.heads, sizes.kv_heads), sizes.head_dim, sizes.block
    dtype, window = torch.bfloat16, None
    if case == "fp32":
        heads, dim, block, dtype, window, tokens = (6, 2), 60, 48, torch.float32, tokens // 6, tokens // 2
    q = draw(bench, 1, heads[0], tokens, dim, dtype=dtype)
    k = draw(bench, 1, heads[1], past + tokens + 30, dim, dtype=dtype)
    rows = torch.arange(tokens, device=bench.device)
    if case == "sampled":
        rows = torch.randint(tokens, (77,), generator=bench.generator, device=bench.device)
    last = past + int(rows.max())
    k[:, :, last + 1 :] = torch.nan
    with poisoned(bench.device):
        lse, found = block_mass(
            q, k, scale=dim**-0.5, block_k=block, rows=rows, q_offset=past, window=window, backend="triton"
        )
    picked, seen = q[:, :, rows], k.nan_to_num()
    exact_lse, exact = _mass_in(torch.float64, picked, seen, past + rows, block, window)
    own_lse, own = _mass_in(torch.float32, picked, seen, past + rows, block, window)
    yield compare("mass", found, own, exact, MASS_SUM_ATOL)
    yield compare_lse(lse, own_lse, exact_lse)


def _mass_in(
    dtype: torch.dtype, q: Tensor, k: Tensor, positions: Tensor, block: int, window: int | None
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    scores = q.to(dtype) @ k.to(dtype).repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    key = torch.arange(k.shape[2], device=k.device)
    hidden = key > positions[:, None]
    if window is not None:
        hidden = hidden | (key <= positions[:, None] - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    weights = torch.nn.functional.pad(weights, (0, num_blocks(k.shape[2], block) * block - k.shape[2]))
    return scores.logsumexp(-1), weights.unflatten(-1, (-1, block)).sum(-1)


def select(bench: Bench, case: str) -> Iterator[Line]:
    """The lists keep the mask's contract and the rule; blocks ahead hold NaN and are never kept."""
    sizes = bench.sizes
    grid = Grid(sizes.answer_tokens, sizes.answer_tokens + 65, sizes.block, sizes.block // 2, 65)
    scores, is_open, is_forced = _draw_scores(bench, grid)
    cut = torch.full((1, scores.shape[1], 1), -4.0, device=bench.device)
    cut[:, ::2] = -2.0
    rule: Rule = {"threshold": Threshold(cut), "top_p": TopP(SHARE), "top_k": TopK(BLOCKS)}[case]
    with poisoned(bench.device):
        mask = select_lists(scores, rule, grid, backend="triton")
    kept = mask.validate().to_dense()
    if bool((kept & ~(is_open | is_forced)).any()) or bool((is_forced & ~kept).any()):
        raise WrongAnswerError("forced blocks must be kept, and blocks ahead never")
    chosen = kept & ~is_forced
    if case == "threshold":
        wrong = (chosen != (is_open & (scores > cut[..., None]))).sum()
    elif case == "top_k":
        wrong = (chosen != _top_k(scores, is_open, is_forced)).sum()
    else:
        wrong = _wrong_by_mass(scores, is_open, chosen)
    if int(wrong):
        raise WrongAnswerError(f"{int(wrong)} choices of {chosen.numel()} are not what the rule {case} says")
    yield Line(
        "lists", note=f"{int(chosen.sum())} of {int(is_open.expand_as(chosen).sum())} open blocks kept"
    )


def _draw_scores(bench: Bench, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Log shares [1, 4, Q, Kb], some equal, NaN ahead; which blocks may be chosen, and which are forced."""
    rows, blocks = num_blocks(grid.q_len, grid.block_q), num_blocks(grid.kv_len, grid.block_k)
    first = grid.q_offset + torch.arange(rows, device=bench.device)[:, None] * grid.block_q
    last = (first + grid.block_q).clamp(max=grid.q_offset + grid.q_len) - 1
    index = torch.arange(blocks, device=bench.device)
    own = first // grid.block_k
    is_open = (index > 0) & (index < own)
    is_forced = ((index == 0) | (index >= own)) & (index <= last // grid.block_k)
    raw = torch.randn(1, 4, rows, blocks, generator=bench.generator, device=bench.device) * 2
    raw[:, 1::2] = raw[:, 1::2].round()  # many equal ones
    shares = raw.masked_fill(~(is_open | is_forced), -torch.inf).log_softmax(-1)
    is_ahead = ~(is_open | is_forced)
    return shares.masked_fill(is_ahead, torch.nan), is_open, is_forced


def _top_k(scores: Tensor, is_open: Tensor, is_forced: Tensor) -> Tensor:
    """The highest open scores that there is room for; of equals, the first."""
    values = scores.masked_fill(~is_open, -torch.inf)
    room = (BLOCKS - is_forced.sum(-1, keepdim=True)).clamp(min=0)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < room) & is_open


def _wrong_by_mass(scores: Tensor, is_open: Tensor, chosen: Tensor) -> Tensor:
    """Rows that drop too much, that could drop more, or that drop a block above one they keep."""
    weights = scores.double().exp().masked_fill(~is_open, 0.0)
    dropped = is_open & ~chosen
    spare = 1.0 - SHARE
    mass = weights.masked_fill(~dropped, 0.0).sum(-1)
    lowest = scores.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    highest = scores.masked_fill(~dropped, -torch.inf).amax(-1, keepdim=True)
    next_mass = mass + weights.masked_fill(~(chosen & (scores == lowest)), 0.0).sum(-1)
    could_drop = chosen.any(-1) & (next_mass < spare - MARGIN)
    is_mixed = (highest >= lowest)[..., 0]
    return ((mass > spare + MARGIN) | could_drop | is_mixed).sum()


def graph(bench: Bench, case: str) -> Iterator[Line]:
    """A replay gives the bits of a plain call, so nothing in it waits for the host or reads on it."""
    call, inputs = (_decode if case == "decode" else _prefill)(bench)
    call()
    if not bench.is_cuda:
        raise SkipRowError("CUDA graphs need a card; the calls themselves ran")
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        captured = call()
    for tensor in inputs:
        tensor.normal_(generator=bench.generator)
    recorded.replay()
    plain = call()
    if not torch.equal(captured, plain):
        gap = float((captured.float() - plain.float()).abs().max())
        raise WrongAnswerError(f"a replayed graph differs from a plain call by {gap:.2e}")
    yield Line(case, note="a replay on new numbers gives the bits of a plain call")


def _decode(bench: Bench) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    sizes = bench.sizes
    tokens, block = sizes.answer_tokens, sizes.block
    keys, values = (draw(bench, sizes.batch, sizes.kv_heads, tokens, sizes.head_dim) for _ in range(2))
    q = draw(bench, sizes.batch, sizes.heads, 1, sizes.head_dim)
    lengths = torch.full((sizes.batch,), tokens, dtype=torch.int32, device=bench.device)
    cache = paged_cache(bench, keys, values, lengths, block)
    grid = Grid(1, tokens, block, block, tokens - 1)
    blocks = num_blocks(tokens, block)
    scores = torch.rand(
        sizes.batch, sizes.kv_heads, 1, blocks, generator=bench.generator, device=bench.device
    )
    kept = max(3, blocks // 3)

    def call() -> Tensor:
        mask = select_lists(scores, TopK(kept), grid, width=kept, backend="triton")
        lists = BlockLists(mask.counts[:, :, 0], mask.indices[:, :, 0], block)
        return attend_paged(q, cache, lists, backend="triton")[0]

    return call, (q, scores)


def _prefill(bench: Bench) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    sizes, tokens = bench.sizes, bench.sizes.answer_tokens
    q, k, v = draw_prompt(bench, tokens)
    grid = prompt_grid(bench, tokens)
    num = num_blocks(tokens, sizes.block)
    scores = torch.rand(1, sizes.kv_heads, num, num, generator=bench.generator, device=bench.device)
    kept = max(3, num // 3)

    def call() -> Tensor:
        mask = select_lists(scores, TopK(kept), grid, width=kept, backend="triton")
        return attend(q, k, v, mask, backend="triton")[0]

    return call, (q, k, v, scores)
