"""Tool calls: what a request may ask for, and what is read out of an answer."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentei.serving.errors import RequestError
from sentei.serving.openai.fields import parse_request
from sentei.serving.openai.requests import ChatRequest
from sentei.serving.text.tools import MarkedCalls, ToolUse, WholeCall, tool_use

MARKED = "{% if tools %}<tool_call>{% endif %}"
PLAIN = "{% if tools %}{{ tools }}{% endif %}"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def use(template: str = MARKED, **fields: Any) -> ToolUse:
    """What a request with two tools wants of them."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("now", "later")
    ]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, **fields}
    return tool_use(parse_request(ChatRequest, json.dumps(body).encode()), template)


def test_tools_are_shown_and_may_be_called() -> None:
    """By default the model sees the tools and calls them if it likes."""
    found = use()

    assert [tool.function.name for tool in found.shown] == ["now", "later"]
    assert found.schema() is None
    assert isinstance(found.reader(), MarkedCalls)


def test_named_function_must_be_called() -> None:
    """A named function turns the answer into one call of it, by a schema."""
    found = use(tool_choice={"type": "function", "function": {"name": "later"}})

    (branch,) = json.loads(found.schema() or "")["anyOf"]
    assert branch["properties"] == {"name": {"const": "later"}, "arguments": WEATHER}
    assert isinstance(found.reader(), WholeCall)


def test_required_offers_every_tool() -> None:
    """A required call may be of any tool, also where the template marks no calls."""
    assert len(json.loads(use(PLAIN, tool_choice="required").schema() or "")["anyOf"]) == 2


def test_no_tools_where_none_are_wanted() -> None:
    """`none` shows the model no tools."""
    assert use(tool_choice="none") == use(tools=None) == ToolUse()


@pytest.mark.parametrize(
    ("template", "fields", "words"),
    [
        (PLAIN, {}, "does not mark calls"),
        (MARKED, {"tool_choice": {"type": "function", "function": {"name": "zzz"}}}, "'zzz'"),
        (MARKED, {"tool_choice": "required", "tools": None}, "needs tools"),
        (MARKED, {"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_done_is_refused(template: str, fields: dict[str, Any], words: str) -> None:
    """A refusal names tool_choice and what stands against it."""
    with pytest.raises(RequestError, match=words) as caught:
        use(template, **fields)

    assert caught.value.param == "tool_choice"


def read(reader: MarkedCalls | WholeCall, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer that comes in pieces."""
    found = [*(reader.add(piece) for piece in pieces), reader.flush()]
    calls = [(call.name, json.loads(call.arguments)) for _, calls in found for call in calls]
    return "".join(text for text, _ in found), calls


CALL = '<tool_call>\n{"name": "now", "arguments": {"city": "Łódź"}}\n</tool_call>'
NAMES = frozenset({"now"})


@given(st.lists(st.integers(0, 2 * len(CALL) + 4), max_size=6))
def test_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    """Two calls with text around them come out whole, wherever the pieces end."""
    whole = f"a{CALL}b{CALL}c<"
    bounds = [0, *sorted(cuts), len(whole)]

    found = read(MarkedCalls(NAMES), *(whole[i:j] for i, j in itertools.pairwise(bounds)))

    assert found == ("abc<", [("now", {"city": "Łódź"})] * 2)


@pytest.mark.parametrize(
    "text",
    [
        CALL.replace("now", "never"),
        CALL.replace("}}", "}"),
        CALL.replace('{"city": "Łódź"}', "3"),
        CALL[:-3],
        "<tool_call>[1]</tool_call>",
        "<tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    """A call of an unknown function, of no JSON, or cut off is given to the client as it is."""
    assert read(MarkedCalls(NAMES), text) == (text, [])


def test_one_call_where_no_more_are_wanted() -> None:
    """Without parallel calls the first is taken, and the others are dropped."""
    _, calls = read(MarkedCalls(NAMES, is_single=True), CALL + CALL)

    assert len(calls) == 1


def test_whole_answer_is_a_call_or_text() -> None:
    """A forced call that was cut off by max_tokens is text."""
    body = '{"name": "now", "arguments": {"city": "x"}}'

    assert read(WholeCall(NAMES), body[:9], body[9:]) == ("", [("now", {"city": "x"})])
    assert read(WholeCall(NAMES), body[:9]) == (body[:9], [])
