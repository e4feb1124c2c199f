"""A prompt in pieces: the logits, the choices and the counts of the same prompt in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf import prompt_pieces
from sentei.kernels.hf.prompt_pieces import PIECE_TOKENS, cut_pieces, run_in_pieces
from sentei.kernels.hf.retrofit import retrofit
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import exact_adapter

PIECE = 128


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rests that prompts of a test have."""
    monkeypatch.setattr(prompt_pieces, "LEAST_TOKENS", 32)


@pytest.mark.parametrize(
    ("tokens", "size", "ends"),
    [
        (100, 128, [100]),
        (159, 128, [159]),
        (160, 128, [128, 160]),
        (257, 128, [128, 257]),
        (512, 128, [128, 256, 384, 512]),
        (512, None, [512]),
    ],
)
def test_a_short_rest_goes_with_the_piece_before_it(tokens: int, size: int | None, ends: list[int]) -> None:
    """Pieces follow each other, and the last rows of a prompt are in one."""
    found = list(cut_pieces(tokens, size))

    assert [end for _, end in found] == ends
    assert [begin for begin, _ in found] == [0, *ends[:-1]]


def test_only_our_own_program_on_a_cpu_takes_pieces() -> None:
    """Transformers' sdpa and compiled Flex take a prompt in one pass."""
    model, found = make_llama(), {}
    for base in ("best", "sdpa", "flex"):
        with retrofit(model, None, "dense", base=base) as handle:
            found[base] = handle.piece_tokens

    assert found == {"best": PIECE_TOKENS, "sdpa": None, "flex": None}


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@pytest.mark.parametrize("rung", ["dense", "bold"])
@pytest.mark.parametrize(("tokens", "keep"), [(100, 1), (512, 1), (513, 3), (600, 200)])
def test_pieces_give_the_logits_of_one_pass(make: Any, rung: str, tokens: int, keep: int) -> None:
    """Also where the last rows lie in two pieces, and where a short rest is left over."""
    model = make()
    adapter = exact_adapter(model, {"bold": 0.3})
    ids = make_ids(tokens)
    with retrofit(model, adapter, rung) as handle, torch.no_grad():
        handle.set_prompt_tokens(tokens)
        whole = model(input_ids=ids, use_cache=True, logits_to_keep=keep).logits
        density = handle.stats().density()
        handle.reset_stats()
        found = run_in_pieces(model, ids, DynamicCache(config=model.config), size=PIECE, keep=keep)

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
            run_in_pieces(model, make_ids(tokens), DynamicCache(config=model.config), size=PIECE)

            assert handle.stats().has_run_sparse == (tokens == 400)
