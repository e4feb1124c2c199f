"""Wire types: what is taken, and what a refusal says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sentei.serving.errors import RequestError
from sentei.serving.engine.request import NEUTRAL, Sampling
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
        ({"n": 2}, "n", "integer_above_max_value", "is 2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "integer_above_max_value", "0.5"),
        ({"maxtokens": 3}, "maxtokens", "unknown_parameter", "leave it out"),
        ({"tools": [{}]}, "tools", "invalid_value", "at most 0"),
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


def test_seed_falls_back_to_the_requests_own() -> None:
    """Without a seed the request gets one, so that a continuation draws on from the same."""
    assert sampling_of(chat(temperature=1.0), fallback_seed=9).seed == 9
    assert sampling_of(chat(seed=4), fallback_seed=9).seed == 4


def test_content_parts_are_joined() -> None:
    """A message may come in text parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text() == "ab"


@pytest.mark.parametrize("stop", ["", ["a", ""], ["a", "b", "c", "d", "e"], "x" * 300])
def test_bad_stops_are_refused(stop: Any) -> None:
    """Stop strings are few, short and not empty."""
    with pytest.raises(RequestError, match="at most 4"):
        chat(stop=stop).stops()


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
