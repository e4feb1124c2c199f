"""The model runner and the sampler on a tiny random Llama: caches, continuation, replays, broken logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.stats import LayerCall, RetrofitStats
from sentei.serving.engine.request import EngineRequest, Sampling, ScoreRequest
from sentei.serving.engine.runner import ModelRunner
from sentei.serving.errors import EngineRefusedError

PROMPT = tuple(range(5, 45))


class FakeRetrofit:
    """Remembers the rungs; each pass is one dense call of layer 0 and one sparse call of layer 1."""

    piece_tokens: int | None = None

    def __init__(self) -> None:
        self.rungs: list[str] = []
        self.num_resets = self.num_recorded = 0

    def stats(self) -> RetrofitStats:
        found = RetrofitStats()
        found.add(LayerCall(0, 1, 9, "dense", (1.0,)))
        found.add(LayerCall(1, 1, 9, "sparse", (0.2, 0.4)))
        return found

    def reset_stats(self) -> None:
        self.num_resets += 1

    def set_rung(self, rung_id: str) -> None:
        self.rungs.append(rung_id)

    def set_prompt_tokens(self, tokens: int | None) -> None:
        self.prompt_tokens = tokens

    @contextmanager
    def recording_rows(self, newest: int | None = None) -> Iterator[list[FakeRows]]:
        self.num_recorded += 1
        yield [FakeRows(), FakeRows()]


class FakeRows:
    """One row in two heads."""

    def dropped(self) -> torch.Tensor:
        return torch.tensor([[[0.0], [0.5]]])


@pytest.fixture(scope="module")
def model() -> Any:
    """A random two-layer Llama in float64, where two ways to the same logits agree to many digits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).double().eval()


def answer(runner: ModelRunner, request: EngineRequest) -> list[int]:
    """Run one request to its end and drop it."""
    ids = [*request.sent_ids, runner.prefill(request)[0].token_id]
    while len(ids) < request.max_tokens:
        ids.append(runner.decode(request.request_id)[0].token_id)
    runner.drop(request.request_id)
    return ids


def greedy(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The same without any cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_decode_equals_the_whole_forward(model: Any) -> None:
    """Prefill and decode through the cache give the tokens that the plain model gives."""
    assert answer(ModelRunner(model), EngineRequest("a", PROMPT, 8)) == greedy(model, PROMPT, 8)


def test_requests_do_not_mix(model: Any) -> None:
    """Two requests in turn, each with its own cache, get the tokens that each would get alone."""
    runner = ModelRunner(model)
    requests = [EngineRequest("a", PROMPT, 4), EngineRequest("b", PROMPT[::-1], 4)]
    found = {r.request_id: [runner.prefill(r)[0].token_id] for r in requests}
    for _ in range(3):
        for name, ids in found.items():
            ids.append(runner.decode(name)[0].token_id)

    assert len(runner._live) == 2
    assert [found["a"], found["b"]] == [greedy(model, r.prompt_ids, 4) for r in requests]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.5),
    Sampling(temperature=0.9, seed=3, top_k=20, min_p=0.01, top_p=0.9, frequency_penalty=1.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_continuation_goes_on_as_if_nothing_had_happened(model: Any, sampling: Sampling) -> None:
    """An answer continued behind its first tokens, however it is sampled, is the answer in one go."""
    runner = ModelRunner(model)
    whole = answer(runner, EngineRequest("a", PROMPT, 8, sampling=sampling))

    rest = answer(runner, EngineRequest("b", PROMPT, 8, sampling=sampling, sent_ids=tuple(whole[:5])))

    assert rest == whole
    assert runner._live == {}


@pytest.mark.parametrize(("prompt_chunk", "served_chunk"), [(None, None), (None, 1), (7, None), (13, 2)])
def test_replay_is_the_same_in_any_chunks(
    model: Any, prompt_chunk: int | None, served_chunk: int | None
) -> None:
    """However the sequence is cut, a replay of a greedy answer would have chosen each of its tokens."""
    served = greedy(model, PROMPT, 6)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *served]])).logits[0].log_softmax(-1)

    found = ModelRunner(model).score(
        ScoreRequest(
            "a",
            (*PROMPT, *served),
            len(PROMPT),
            num_top=5,
            prompt_chunk_tokens=prompt_chunk,
            served_chunk_tokens=served_chunk,
        )
    )

    assert [top[0] for top in found.top_ids] == served
    expected = [float(logits[len(PROMPT) - 1 + i, token]) for i, token in enumerate(served)]
    assert [top[0] for top in found.top_logprobs] == pytest.approx(expected, abs=1e-5)
    assert all(len(top) == 5 for top in found.top_logprobs)


@pytest.mark.parametrize(("served", "rows"), [(1, 1), (16, 16), (17, 9), (40, 14), (64, 16)])
def test_replay_samples_the_mass_that_its_answer_dropped(model: Any, served: int, rows: int) -> None:
    """At most 16 rows spread over the answer, and the prompt's last, each with all that a pass tells."""
    retrofit = FakeRetrofit()
    ids = (*PROMPT, *range(served))

    found = ModelRunner(model, retrofit).score(ScoreRequest("a", ids, 40, "mild", served_chunk_tokens=1))

    assert retrofit.num_recorded == 1 + rows
    assert found.dropped_mass == (0.0, 0.5) * 2 * (1 + rows)


def test_dense_replay_drops_nothing_and_measures_nothing(model: Any) -> None:
    """There is nothing to tell at the dense rung, with a retrofit or without."""
    retrofit, request = FakeRetrofit(), ScoreRequest("a", PROMPT, 36, served_chunk_tokens=1)

    found = [ModelRunner(model, handle).score(request).dropped_mass for handle in (retrofit, None)]

    assert (found, retrofit.num_recorded) == ([(), ()], 0)


def test_rung_is_set_only_when_it_changes(model: Any) -> None:
    """Requests at different rungs share a model; the rung is switched before the pass that needs it."""
    retrofit = FakeRetrofit()
    runner = ModelRunner(model, retrofit)
    for name, rung in (("a", "mild"), ("b", "mild"), ("c", "dense")):
        runner.prefill(EngineRequest(name, PROMPT, 4, rung_id=rung))
    runner.decode("a")

    assert retrofit.rungs == ["mild", "dense", "mild"]


def test_calls_are_counted_for_the_request_that_made_them(model: Any) -> None:
    """Each request gets the calls of its own passes, and at the dense rung there is nothing to tell."""
    retrofit = FakeRetrofit()
    runner = ModelRunner(model, retrofit)
    for name, rung in (("a", "mild"), ("b", "mild"), ("c", "dense")):
        runner.prefill(EngineRequest(name, PROMPT, 4, rung_id=rung))
    runner.decode("a")

    a, b = runner.attention("a"), runner.attention("b")

    assert a is not None
    assert b is not None
    assert (a.sparse_calls, a.dense_calls, b.sparse_calls) == (2, 2, 1)
    assert [(use.layer, use.decode_density) for use in a.layers] == [(0, 1.0), (1, 0.3)]
    assert runner.attention("c") is None
    assert retrofit.num_resets == 4


def test_rung_without_adapter_is_refused(model: Any) -> None:
    """A dense-only model does not pretend to run a rung."""
    with pytest.raises(EngineRefusedError, match="'medium'"):
        ModelRunner(model).prefill(EngineRequest("a", PROMPT, 4, rung_id="medium"))
