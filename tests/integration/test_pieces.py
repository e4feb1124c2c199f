"""A prompt in pieces: the logits, the choices and the counts of the same prompt in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf import pieces
from sentei.kernels.hf.pieces import run_in_pieces
from sentei.kernels.hf.retrofit import retrofit
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import exact_adapter


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that prompts of a test are longer than."""
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 128)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@pytest.mark.parametrize("rung", ["dense", "bold"])
@pytest.mark.parametrize(("tokens", "keep"), [(100, 1), (512, 1), (513, 3), (600, 200)])
def test_pieces_give_the_logits_of_one_pass(make: Any, rung: str, tokens: int, keep: int) -> None:
    """Also where the last rows lie in two pieces, and where one row is left over."""
    model = make()
    adapter = exact_adapter(model, {"bold": 0.3})
    ids = make_ids(tokens)
    with retrofit(model, adapter, rung) as handle, torch.no_grad():
        handle.set_prompt_tokens(tokens)
        whole = model(input_ids=ids, use_cache=True, logits_to_keep=keep).logits
        density = handle.stats().density()
        handle.reset_stats()
        found = run_in_pieces(model, ids, DynamicCache(config=model.config), keep=keep)

        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        assert handle.stats().density() == (None if density is None else pytest.approx(density, abs=1e-6))
    if rung == "bold" and tokens > 500:
        assert density is not None
        assert density < 0.9


def test_a_prompt_past_the_verified_length_is_dense_from_its_first_piece_on() -> None:
    """Its first pieces are short enough to run sparse, and must not."""
    model = make_llama()
    adapter = exact_adapter(model, {"bold": 0.3})
    dense, bold = adapter.ladder.rungs
    ladder = replace(adapter.ladder, rungs=(dense, replace(bold, verified_tokens=400)))
    with retrofit(model, adapter.with_ladder(ladder), "bold") as handle, torch.no_grad():
        for tokens in (401, 400):
            handle.reset_stats()
            handle.set_prompt_tokens(tokens)
            run_in_pieces(model, make_ids(tokens), DynamicCache(config=model.config))

            assert handle.stats().has_run_sparse == (tokens == 400)
