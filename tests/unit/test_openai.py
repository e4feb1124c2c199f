"""Wire types: what is taken, and what a refusal says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sentei.serving.engine.request import NEUTRAL, Sampling
from sentei.serving.errors import RequestError
from sentei.serving.openai.fields import error_body, parse_request
from sentei.serving.openai.requests import ChatRequest, CompletionRequest, sampling_of

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    """A parsed chat request with these fields."""
    return parse_request(ChatRequest, json.dumps({"model": "m", "messages": HELLO, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    """A parsed completion request with these fields."""
    return parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"messages": []}, "messages", "empty_array", "is []"),
        ({"messages": "hi"}, "messages", "invalid_value", "'hi'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value", "'robot'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter", "missing"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value", "-1"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value", "is 0"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value", "'many'"),
        ({"temperature": 2.5}, "temperature", "integer_above_max_value", "2.5"),
        ({"top_p": 0}, "top_p", "decimal_below_min_value", "is 0"),
        ({"n": 9}, "n", "integer_above_max_value", "is 9"),
        ({"n": "2"}, "n", "invalid_value", "'2'"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "integer_above_max_value", "2.5"),
        ({"stop": ""}, "stop", "invalid_value", "is ''"),
        ({"stop": ["a", ""]}, "stop.1", "invalid_value", "is ''"),
        ({"stop": list("abcde")}, "stop", "invalid_value", "at most 4"),
        ({"stop": "x" * 300}, "stop", "invalid_value", "at most 256"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_object'"),
        ({"logit_bias": {"dog": 1.0}}, "logit_bias.dog", "invalid_value", "'dog'"),
        ({"seed": 1.5}, "seed", "invalid_value", "1.5"),
        ({"maxtokens": 3}, "maxtokens", "unknown_parameter", "leave it out"),
        ({"tools": [{}]}, "tools.0.type", "missing_required_parameter", "missing"),
        ({"guided_json": {}}, "guided_json", "unknown_parameter", "leave it out"),
    ],
)
def test_bad_value_is_named(fields: dict[str, Any], param: str, code: str, words: str) -> None:
    """A refusal names the parameter, the value that was found and what is allowed."""
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        chat(**fields)

    error = error_body(caught.value)["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_body_that_is_no_json() -> None:
    """Broken JSON is an invalid request, not a crash."""
    with pytest.raises(RequestError, match="invalid JSON") as caught:
        parse_request(ChatRequest, b"{")

    assert caught.value.code == "invalid_json"


def test_neutral_values_of_unsupported_options_pass() -> None:
    """Clients that send every option at its default are served."""
    request = chat(n=1, frequency_penalty=0, presence_penalty=0, logit_bias={}, tools=[], store=False)

    assert request.n == 1


def test_image_part_is_refused_by_name() -> None:
    """A part that is no text is named, not the whole content."""
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(RequestError, match=r"content\.0\.type is 'image_url'") as caught:
        chat(messages=[{"role": "user", "content": [image]}])

    assert caught.value.param == "messages.0.content.0.type"


OPTIONAL = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_as_if_absent(name: str) -> None:
    """Clients that send every option they know, most of them null, are served as if they had sent none."""
    assert chat(**{name: None}) == chat()


def test_reply_can_be_sent_back_with_all_its_nulls() -> None:
    """Replies of this and of other servers are full of null fields that nobody here knows."""
    reply = {"role": "assistant", "content": "a", "refusal": None, "audio": None, "function_call": None}

    found = chat(messages=[*HELLO, reply], reasoning_effort=None)

    assert found == chat(messages=[*HELLO, {"role": "assistant", "content": "a"}])


def test_assistant_may_have_said_nothing() -> None:
    """An assistant's content may be null, or a list of parts with a refusal among them."""
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]

    found = chat(
        messages=[{"role": "assistant", "content": None}, {"role": "assistant", "content": parts}, *HELLO]
    )

    assert [message.text() for message in found.messages] == ["", "ab", "hello"]


def test_seed_falls_back_to_the_requests_own() -> None:
    """Without a seed the request gets one, so that a continuation draws on from the same."""
    assert sampling_of(chat(temperature=1.0), NEUTRAL, fallback_seed=9).seed == 9
    assert sampling_of(chat(seed=4), NEUTRAL, fallback_seed=9).seed == 4
    assert sampling_of(chat(seed=-(2**70) + 5), NEUTRAL, fallback_seed=9).seed == 5


def test_what_a_request_leaves_out_is_the_models_default() -> None:
    """The model's generation_config speaks where the request does not, and zero speaks, too."""
    defaults = Sampling(temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1)

    silent = sampling_of(chat(), defaults, fallback_seed=0)
    loud = sampling_of(chat(temperature=0, top_p=1.0, top_k=-1, repetition_penalty=1.0), defaults, 0)

    assert silent == defaults
    assert loud == NEUTRAL


def test_every_option_reaches_the_engine() -> None:
    """What is accepted is what the engine gets."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = sampling_of(
        chat(
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=0.75,
            logit_bias={"7": -100},
            logprobs=True,
            seed=11,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        ),
        NEUTRAL,
        fallback_seed=0,
    )

    assert found == Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.75,
        logit_bias=((7, -100.0),),
        json_schema=json.dumps(schema, separators=(",", ":")),
        seed=11,
        num_top_logprobs=0,
    )


def test_content_parts_are_joined() -> None:
    """A message may come in text parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text() == "ab"


@pytest.mark.parametrize(
    ("prompt", "expected"), [("hi", "hi"), (["hi"], "hi"), ([3, 4], [3, 4]), ([[3, 4]], [3, 4])]
)
def test_one_prompt_in_any_of_its_forms(prompt: Any, expected: Any) -> None:
    """A prompt is text or ids, alone or as the only entry of a list."""
    assert completion(prompt=prompt).single_prompt() == expected


@pytest.mark.parametrize(("prompt", "words"), [("", "empty"), ([], "empty"), (["a", "b"], "2 entries")])
def test_no_prompt_or_several(prompt: Any, words: str) -> None:
    """No prompt and several prompts are refused by name."""
    with pytest.raises(RequestError, match=words):
        completion(prompt=prompt).single_prompt()


def test_top_logprobs_need_logprobs() -> None:
    """The number of alternatives alone asks for nothing."""
    assert chat(logprobs=True, top_logprobs=2).num_top_logprobs() == 2
    assert chat(logprobs=True).num_top_logprobs() == 0
    assert chat().num_top_logprobs() is None
    with pytest.raises(RequestError, match="needs logprobs"):
        chat(top_logprobs=2).num_top_logprobs()


def test_error_types_follow_the_status() -> None:
    """Clients choose their exception by status; the type agrees with it."""
    kinds = [error_body(RequestError("x", status=status))["error"]["type"] for status in (404, 429, 503)]

    assert kinds == ["invalid_request_error", "rate_limit_error", "server_error"]
