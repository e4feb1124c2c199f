"""The last rows of a prompt keep everything where a rung says so: a function of the prompt's length alone."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import Ladder
from sentei.kernels.hf.observe import Selection
from sentei.kernels.hf.retrofit import Base, Retrofit, retrofit
from sentei.kernels.hf.versions import cache_argument
from sentei.serving.engine.request import ScoreRequest, ScoreResult
from sentei.serving.engine.runner import ModelRunner
from tests.fakes_models import make_ids, make_llama
from tests.trial_ladders import exact_adapter

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

QUERY_BLOCK, LAST = 16, 40


def make_adapter(model: Any, dense_last_tokens: int = LAST) -> Adapter:
    """One rung that keeps almost nothing, but for the last rows of a prompt."""
    adapter = exact_adapter(model, {"bold": 0.5})
    rungs = [replace(rung, dense_last_tokens=dense_last_tokens) for rung in adapter.ladder.rungs]
    return adapter.with_ladder(Ladder(tuple(rungs), (), QUERY_BLOCK))


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, *cuts: int) -> tuple[torch.Tensor, Any]:
    """Run a sequence over one cache, cut at some places; return its logits and the cache."""
    cache = DynamicCache(config=model.config)
    borders = [0, *cuts, ids.shape[1]]
    parts = [
        model(input_ids=ids[:, first:last], **cache_argument(cache), use_cache=True).logits
        for first, last in itertools.pairwise(borders)
    ]
    return torch.cat(parts, dim=1), cache


def full_rows(seen: list[Selection]) -> list[int]:
    """Positions of the query blocks that kept all they may read in every head, and might have kept less."""
    found = []
    for selection in seen:
        mask = selection.mask
        kept, limits = mask.to_dense()[0].sum(dim=-1), mask.limits()
        for i in range(kept.shape[1]):
            if int(limits[i]) > 2 and bool((kept[:, i] == limits[i]).all()):
                found.append(mask.q_offset + i * mask.block_q)
    return found


# 40 rows before the end of 500 is 460, and its query block begins at 448.
@pytest.mark.parametrize(("length", "first"), [(500, 448), (512, 464)])
def test_the_last_rows_of_a_prompt_keep_everything(length: int, first: int) -> None:
    """Whole query blocks, from the one that holds the first of them on; all others choose."""
    model, seen = make_llama(), list[Selection]()

    with retrofit(model, make_adapter(model), "bold") as handle, handle.watching(seen.append):
        feed(model, make_ids(length))

    assert sorted(set(full_rows(seen))) == list(range(first, length, QUERY_BLOCK))


def test_text_without_a_cache_has_no_end() -> None:
    """What is judged token by token is no prompt: nothing of it is spared, and no loss is flattered."""
    model, seen = make_llama(), list[Selection]()

    with retrofit(model, make_adapter(model), "bold") as handle, handle.watching(seen.append):
        model(input_ids=make_ids(512), use_cache=False)

    assert full_rows(seen) == []


@pytest.mark.parametrize("cuts", [(256,), (480,), (16, 304, 496)])
def test_what_is_kept_does_not_depend_on_where_a_prompt_was_cut(cuts: tuple[int, ...]) -> None:
    """Its length is known before its first piece runs, and is told; a piece's own end is nobody's end."""
    model, ids = make_llama(), make_ids(512)

    with retrofit(model, make_adapter(model), "bold") as handle:
        whole, _ = feed(model, ids)
        handle.set_prompt_tokens(512)
        cut, _ = feed(model, ids, *cuts)
        handle.set_prompt_tokens(None)
        untold, _ = feed(model, ids, *cuts)

    torch.testing.assert_close(cut, whole)
    assert not torch.allclose(untold, whole)


def test_rows_of_an_answer_that_run_with_their_prompt_choose() -> None:
    """A continued answer is fed behind its prompt in one call; where the prompt ends is told."""
    model, seen = make_llama(), list[Selection]()

    with retrofit(model, make_adapter(model), "bold") as handle, handle.watching(seen.append):
        handle.set_prompt_tokens(400)
        feed(model, make_ids(512))

    assert sorted(set(full_rows(seen))) == [352, 368, 384]


class Noting:
    """A retrofit that notes the prompts' ends it was told."""

    def __init__(self, handle: Retrofit) -> None:
        self.told: list[int | None] = []
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def set_prompt_tokens(self, tokens: int | None) -> None:
        """Note it, and pass it on."""
        self.told.append(tokens)
        self._handle.set_prompt_tokens(tokens)


def replay(model: Any, chunk: int | None, base: Base = "sdpa") -> tuple[ScoreResult, list[int | None]]:
    """Replay a prompt of 512 tokens, cut into pieces, with 8 tokens of an answer; and the ends told."""
    ids = tuple(make_ids(520)[0].tolist())
    with retrofit(model, make_adapter(model), base=base) as handle:
        noting = Noting(handle)
        request = ScoreRequest("a", ids, 512, "bold", prompt_chunk_tokens=chunk, served_chunk_tokens=1)
        return ModelRunner(model, noting).score(request), noting.told


def test_a_replay_in_pieces_is_the_replay_in_one() -> None:
    """An audit's prompt ends where the served one ended, whatever it is cut into."""
    model = make_llama()

    (whole, told), (cut, told_cut) = replay(model, None), replay(model, 128)

    assert set(told) == set(told_cut) == {512}
    torch.testing.assert_close(torch.tensor(cut.top_logprobs), torch.tensor(whole.top_logprobs))


@pytest.mark.parametrize(
    ("piece", "passes"), [(2048, [512]), (448, [448, 64]), (400, [400, 112]), (496, [512])]
)
def test_an_audit_looks_at_the_prompts_last_rows_that_chose(
    piece: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps everything by rule drops nothing and would prove nothing, in one pass or in pieces."""
    monkeypatch.setattr("sentei.kernels.hf.retrofit.PIECE_TOKENS", piece)
    monkeypatch.setattr("sentei.kernels.hf.prompt_pieces.LEAST_TOKENS", 64)
    model, seen = make_llama(), list[int]()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 300  # few keys take all, so that dropping shows
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))

    found, _ = replay(model, None, base="best")

    assert seen[1 : 1 + len(passes)] == passes  # the first pass made the adapter
    of_prompt = torch.tensor(found.dropped_mass)[: 16 * 8]  # 16 rows in 2 layers of 4 heads
    assert float(of_prompt.max()) > 0.1
