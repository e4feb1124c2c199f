"""The dropped mass of served answers: what a pass measures, what a replay reports, what the store holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.ladder import NEVER, Ladder
from sentei.kernels.hf.models import attention_modules, thinnable_layers
from sentei.kernels.hf.observe import Selection
from sentei.kernels.hf.retrofit import attach, retrofit
from sentei.kernels.ops.reference import token_mask
from sentei.serving.engine.request import ScoreRequest
from sentei.serving.engine.runner import ModelRunner
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import uncalibrated_ladder


def make_adapter(model: Any, *, break_even_tokens: int = 0, query_block: int = 64) -> Adapter:
    """An untrained adapter with one bold rung."""
    adapter = new_adapter(model, "tiny", rank=4)
    ladder = uncalibrated_ladder(adapter, {"bold": 0.5})
    rungs = tuple(replace(rung, break_even_tokens=break_even_tokens) for rung in ladder.rungs)
    return adapter.with_ladder(Ladder(rungs, ladder.bin_edges_tokens, query_block))


@torch.no_grad()
def feed(model: Any, *parts: torch.Tensor) -> None:
    """Run one pass after the other over one cache."""
    cache = DynamicCache(config=model.config)
    for ids in parts:
        model(input_ids=ids, cache=cache, use_cache=True)


@pytest.mark.parametrize(("length", "query_block"), [(63, 64), (130, 16), (200, 64)])
@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_rows_tell_the_share_of_dense_attention_that_the_mask_leaves_out(
    make: Callable[[], Any], length: int, query_block: int
) -> None:
    """In the prefill and in a decode step, it is what plain softmax puts on the keys that were not read."""
    model, ids, seen = make(), make_ids(length + 1), list[Selection]()
    for _, module in attention_modules(model):  # random weights attend evenly; now rows differ in their needs
        module.scaling *= 4 if hasattr(module, "q_norm") else 300
    handle = attach(model, make_adapter(model, query_block=query_block), rung="bold")

    with handle.watching(seen.append), handle.recording_rows() as rows:
        feed(model, ids[:, :length], ids[:, length:])
        measured = [part.dropped() for part in rows]
    handle.close()

    for selection, found in zip(seen, measured, strict=True):
        query, key, scale = selection.query, selection.key, selection.layer.scale
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        ahead = torch.ones(query.shape[2], key.shape[2]).triu(1 + key.shape[2] - query.shape[2]).bool()
        shares = (query @ key.transpose(2, 3) * scale).masked_fill(ahead, -torch.inf).softmax(-1)
        is_read = token_mask(selection.mask.to_dense(), selection.mask, None)
        torch.testing.assert_close(found, (shares * ~is_read).sum(-1), rtol=1e-3, atol=1e-5)
    assert len(measured) == 2 * len(thinnable_layers(model))
    assert (max(float(part.max()) for part in measured) > 0.1) == (length > 128)


def test_rows_of_a_call_that_ran_densely_dropped_nothing() -> None:
    """Below the break-even length each row has its zero, so that an audit of a short prompt has a number."""
    model = make_llama()

    with retrofit(model, make_adapter(model, break_even_tokens=128), "bold") as handle:
        with handle.recording_rows() as rows:
            feed(model, make_ids(100))
        feed(model, make_ids(100))

    assert [part.dropped().shape for part in rows] == [(1, 4, 100)] * 2
    assert not any(part.dropped().any() for part in rows)


def test_replay_tells_what_the_prompt_dropped_where_steps_run_dense() -> None:
    """A ladder whose decode steps never pay: the answer's rows drop nothing, those at the prompt's end do."""
    model, ids = make_llama(), tuple(make_ids(260)[0].tolist())
    for _, module in attention_modules(model):
        module.scaling *= 300
    adapter = make_adapter(model)
    rungs = tuple(replace(rung, decode_break_even_tokens={1: NEVER}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))
    request = ScoreRequest("a", ids, 256, "bold", served_chunk_tokens=1)

    with retrofit(model, adapter) as handle:
        found = torch.tensor(ModelRunner(model, handle).score(request).dropped_mass)

    per_row = 2 * 4  # layers and heads
    assert len(found) == (16 + 4) * per_row
    assert float(found[: 16 * per_row].max()) > 0.1
    assert not found[16 * per_row :].any()
