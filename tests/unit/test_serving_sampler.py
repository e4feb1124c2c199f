"""The sampler on logits of a few tokens: what each option does, its order, and its repeatability."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sentei.pipeline.models import POCKET_DIR
from sentei.serving.engine.grammar import Grammars
from sentei.serving.engine.request import EngineRequest, Sampling, TokenLogprob
from sentei.serving.engine.sampler import Sampler
from sentei.serving.errors import BadLogitsError, GrammarError

LOGITS = torch.tensor([2.0, 1.9, 1.0, -3.0])


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    sent: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
) -> TokenLogprob:
    """The next token behind a prompt and what was sent."""
    return Sampler(EngineRequest("a", prompt, 99, sampling=sampling, sent_ids=sent)).choose(logits)


def draws(sampling: Sampling, logits: torch.Tensor = LOGITS) -> Counter[int]:
    """The first token under 200 seeds."""
    return Counter(choose(logits, replace(sampling, seed=seed)).token_id for seed in range(200))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_a_typed_error(value: float) -> None:
    """NaN or infinite logits never become a token."""
    with pytest.raises(BadLogitsError, match="1 of 3 logits"):
        choose(torch.tensor([0.0, value, 1.0]), Sampling())


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=t) for t in (1e-4, 1e-30, 1e-38, 1e-60, 1e-300, 5e-324)]
    + [Sampling(temperature=t, top_p=p) for t in (1e-38, 1.0, 2.0) for p in (1e-9, 1e-300)]
    + [Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, min_p=1.0)],
)
def test_tiny_temperature_and_nucleus_are_greedy(sampling: Sampling) -> None:
    """Options too small for a float leave the most likely token, never an error."""
    assert draws(sampling, LOGITS * 30) == {0: 200}


def test_same_seed_same_token() -> None:
    """A draw depends on seed and position: it repeats, and neighbours differ."""
    sampler, again = (Sampler(EngineRequest("a", (), 99, sampling=Sampling(1.0, seed=5))) for _ in "ab")

    drawn = [sampler.choose(LOGITS).token_id for _ in range(50)]

    assert drawn == [again.choose(LOGITS).token_id for _ in range(50)]
    assert len(set(drawn)) > 1


def test_draws_follow_the_probabilities() -> None:
    """Without limits each token comes as often as its probability says (200 draws, four standard errors)."""
    found, expected = draws(Sampling(temperature=1.0)), LOGITS.softmax(-1)

    for token_id, share in enumerate(expected.tolist()):
        error = math.sqrt(share * (1 - share) / 200)
        assert found[token_id] / 200 == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, top_p=0.5), {0, 1}),
        (Sampling(temperature=1.0, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1.0, min_p=0.5), {0, 1}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.3), {0}),
        (Sampling(temperature=1.0, logit_bias=((0, -100.0), (3, 5.0))), {1, 2, 3}),
    ],
)
def test_limits_cut_the_tail(sampling: Sampling, kept: set[int]) -> None:
    """Each limit keeps exactly its tokens, and the mass of top_p is that of what top_k has left."""
    assert set(draws(sampling)) == kept


def test_repetition_penalty_counts_the_prompt_the_others_do_not() -> None:
    """A repeated token's logit shrinks, on either side of zero; the two others count the answer alone."""
    logits = torch.tensor([2.0, 1.5, -1.0])

    assert choose(logits, Sampling(repetition_penalty=2.0), prompt=(0,)).token_id == 1
    assert choose(logits, Sampling(repetition_penalty=2.0), sent=(0, 1)).token_id == 0
    assert choose(-logits, Sampling(repetition_penalty=4.0), sent=(2,)).token_id == 2
    assert choose(-logits, Sampling(repetition_penalty=4.0), sent=(2,), prompt=(1,)).token_id == 2
    assert choose(logits, Sampling(presence_penalty=2.0), prompt=(0,)).token_id == 0
    assert choose(logits, Sampling(presence_penalty=0.6), sent=(0, 0, 0)).token_id == 1


def test_frequency_penalty_grows_with_each_time() -> None:
    """Two times 0.3 are more than the gap of half a nat, once is not."""
    logits = torch.tensor([2.0, 1.5])

    found = [choose(logits, Sampling(frequency_penalty=0.3), sent=(0,) * n).token_id for n in (1, 2)]

    assert found == [0, 1]


def test_logprobs_are_the_models_own() -> None:
    """Penalties and temperature change the choice, not what is said of it; as many alternatives as asked."""
    sampling = Sampling(num_top_logprobs=2, presence_penalty=2.0, temperature=0.5, top_k=1)

    found = choose(torch.tensor([0.0, 1.0, 0.5]), sampling, sent=(1,))

    expected = torch.tensor([0.0, 1.0, 0.5]).log_softmax(-1).tolist()
    assert found.token_id == 2
    assert found.logprob == pytest.approx(expected[2])
    assert [token_id for token_id, _ in found.top] == [1, 2]
    assert [value for _, value in found.top] == pytest.approx([expected[1], expected[2]])


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    """The pocket model's tokenizer; its end is token 2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET_DIR, local_files_only=True)


def follow_schema(grammars: Grammars, sent: tuple[int, ...] = ()) -> list[int]:
    """The answer to random logits under the schema, up to its end."""
    sampling = Sampling(temperature=1.5, seed=1, json_schema=SCHEMA, repetition_penalty=1.2)
    sampler, ids = Sampler(EngineRequest("a", (5,), 200, sampling=sampling, sent_ids=sent), grammars), [*sent]
    while ids[-1:] != [2] and len(ids) < 200:
        noise = torch.Generator().manual_seed(len(ids))
        ids.append(sampler.choose(torch.randn(2050, generator=noise)).token_id)
    return ids


def test_random_logits_give_json_of_the_schema(tokenizer: object) -> None:
    """However wild the logits, the answer is what the schema says, and it ends by itself."""
    ids = follow_schema(Grammars(tokenizer, 2050, (2,)))

    found = json.loads(tokenizer.decode(ids[:-1]))  # type: ignore[attr-defined]
    assert set(found) == {"kind", "age"}
    assert found["kind"] in ("cat", "dog")
    assert found["age"] <= 99


def test_answer_under_a_schema_goes_on_elsewhere(tokenizer: object) -> None:
    """A sampler that is given the tokens already sent goes on inside the schema as the first would have."""
    grammars = Grammars(tokenizer, 2050, (2,))
    whole = follow_schema(grammars)

    assert follow_schema(grammars, tuple(whole[:4])) == whole


@pytest.mark.parametrize(
    ("schema", "words"),
    [('{"type": "strin"}', "strin"), ('{"not": {}}', "not"), ('{"$ref": "http://x/y"}', "http")],
)
def test_schema_that_cannot_be_followed_is_named(tokenizer: object, schema: str, words: str) -> None:
    """What the library does not know it says, and nothing is ignored in silence."""
    with pytest.raises(GrammarError, match=words):
        Grammars(tokenizer, 2048, (2,)).follow(schema)


def test_schema_without_end_is_an_error_not_a_hang(tokenizer: object) -> None:
    """A schema that only refers to itself allows no token."""
    with pytest.raises(GrammarError):
        Grammars(tokenizer, 2048, (2,)).follow('{"$ref": "#"}').allowed()
