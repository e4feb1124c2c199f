"""The pretended card for every test here; Triton's kernels are stood in for.

In an ordinary session what a kernel defines is computed by the CPU's own programs. Under TRITON_INTERPRET=1
(tests/integration/test_card.py) the kernels themselves run, launch code included, in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.ops.layouts import BlockLists
from sentei.kernels.ops.paged import attend_paged
from sentei.kernels.ops.select import select_lists
from sentei.kernels.scorer.network import BlockScorer, ScorerError
from sentei.kernels.scorer.pages import ScorerPages
from sentei.kernels.scorer.pooled_cache import pool_keys
from sentei.kernels.scorer.selection import score_blocks
from tests.card.pretend import CardTensor, PretendCard

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCard]:
    """A card that computes and counts; torch believes in one GPU of compute capability 9.0."""
    launch = pytest.importorskip("sentei.kernels.ops.triton.launch", reason="triton is not installed")
    pretended = PretendCard()

    def wait(*_: Any) -> None:
        pretended.note("read", "synchronize")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: _Properties)
    monkeypatch.setattr(launch.Launch, "run", _interpret(launch.Launch.run) if IS_INTERPRETED else _refuse)
    if not IS_INTERPRETED:
        _stand_in(monkeypatch)
    with pretended:
        yield pretended


class _Properties:
    """What is asked of a GPU's properties."""

    multi_processor_count = 2


def _interpret(run: Any) -> Any:
    """A launch on what its tensors hold: a real one waits for nothing either."""

    def interpret(launch: Any) -> None:
        held = {name: held_by(value) for name, value in launch.arguments.items()}
        with _disable_current_modes():
            run(replace(launch, arguments=held))

    return interpret


def _refuse(launch: Any) -> None:
    raise AssertionError(f"{launch.kernel} has no stand-in: give it one in tests/card/conftest.py")


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, selection and mass by `attend`, `select_lists` and `block_mass` on CPU tensors."""
    from sentei.kernels.ops.triton import decode, mass, prefill, select

    def attend_by_cpu(q: Any, k: Any, v: Any, mask: Any, how: Any) -> Any:
        q, k, v, mask = (held_by(x) for x in (q, k, v, mask))
        return attend(q, k, v, mask, scale=how.scale, window=how.window, return_lse=True)

    def select_by_cpu(scores: Any, rule: Any, grid: Any, width: int) -> Any:
        found = select_lists(held_by(scores), held_by(rule), grid, backend="torch")
        return found.counts, pad(found.indices, (0, width - found.indices.shape[3]), value=-1)

    def mass_by_cpu(q: Any, k: Any, rows: Any, **options: Any) -> Any:
        return block_mass(held_by(q), held_by(k), rows=held_by(rows), **options)

    def paged_by_cpu(q: Any, cache: Any, lists: Any, how: Any, *, num_splits: int | None = None) -> Any:
        del num_splits
        return attend_paged(held_by(q), held_by(cache), held_by(lists), scale=how.scale)

    monkeypatch.setattr(prefill, "attend_triton", _outside(attend_by_cpu))
    monkeypatch.setattr(select, "select_triton", _outside(select_by_cpu))
    monkeypatch.setattr(mass, "block_mass_triton", _outside(mass_by_cpu))
    monkeypatch.setattr(decode, "attend_paged_triton", _outside(paged_by_cpu))
    _stand_in_for_scores(monkeypatch)


def _stand_in_for_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer's launches by the torch code that defines them."""
    from sentei.kernels.scorer import launches

    def encode_by_cpu(scorer: Any, k: Any, first: int, table: Any) -> Any:
        mine, keys = _scorer_by_cpu(scorer), held_by(k)
        pooled = pool_keys(keys, first, held_by(table), mine.shape)
        return (mine.encode_keys(*(part.to(keys.dtype) for part in pooled)),)

    def scores_by_cpu(scorer: Any, q: Any, k: Any, pools: Any, table: Any, block_q: int) -> Any:
        tensors = [held_by(x) for x in (q, k, pools)]
        how = {"table": held_by(table), "block_q": block_q, "backend": "torch"}
        try:
            return (score_blocks(_scorer_by_cpu(scorer), *tensors, **how)[0],)
        except ScorerError:  # where the CPU says so the card says nothing, and hands on NaN
            blocks = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], scorer.shape.block_tokens)
            return (torch.full((*q.shape[:2], *blocks), torch.nan),)

    def step_by_cpu(scorer: Any, q: Any, cache: Any, pooled: Any, table: Any, limits: Any) -> Any:
        pages = ScorerPages(_scorer_by_cpu(scorer), held_by(table), 1)
        pages.pooled, positions = held_by(pooled), held_by(cache.lengths).long() - 1
        shares = pages._shares_together(held_by(q)[:, :, 0], held_by(cache), positions)
        by_group = (len(shares), scorer.shape.kv_heads, -1, shares.shape[2])
        index, own = torch.arange(shares.shape[2]), (positions // pages.block)[:, None, None]
        chosen = (shares > held_by(limits)[..., None]).view(by_group).any(dim=2)
        keep = (chosen | (index == 0) | (index == own)) & (index <= own)
        counts = keep.sum(dim=2, dtype=torch.int32)
        order = keep.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
        is_odd = shares.isnan().view(by_group).flatten(2).any(dim=2).int()
        return counts, order.masked_fill(index >= counts[..., None], -1), is_odd

    encode, scores, step = map(_outside, (encode_by_cpu, scores_by_cpu, step_by_cpu))

    def choose_step(scorer: Any, *rest: Any) -> Any:
        counts, indices, is_odd = step(scorer, *rest)
        return BlockLists(counts, indices, scorer.shape.block_tokens), is_odd

    monkeypatch.setattr(launches, "encode_pools", lambda *given: encode(*given)[0])
    monkeypatch.setattr(launches, "score_rows", lambda *given: scores(*given)[0])
    monkeypatch.setattr(launches, "choose_step", choose_step)


def _scorer_by_cpu(scorer: BlockScorer) -> BlockScorer:
    """The same weights as the CPU holds them."""
    with torch.inference_mode(False):
        mine = BlockScorer(scorer.shape, scorer.scale).requires_grad_(False)
        for name, weight in scorer.named_parameters():
            setattr(mine, name, torch.nn.Parameter(held_by(weight), requires_grad=False))
    return mine


def _outside(work: Any) -> Any:
    """Run on the CPU as a kernel would on the card: unseen by the mode, with results on the card."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return tuple(CardTensor(part) for part in work(*args, **kwargs))

    return run


def held_by(value: Any) -> Any:
    """What the card's tensors hold, those in the fields of our own types, too."""
    if isinstance(value, CardTensor):
        return value.held
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: held_by(getattr(value, f.name)) for f in fields(value) if f.init})
    return value
