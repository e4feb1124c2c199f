"""Tool calls in a model's answer: how they are asked for, and how they are read out of its text. Pure."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from sentei.serving.errors import RequestError
from sentei.serving.openai.messages import NamedTool, Tool
from sentei.serving.openai.requests import ChatRequest
from sentei.serving.text.pieces import StopScanner, ToolCall

BEGIN, END = "<tool_call>", "</tool_call>"  # the form that most templates with tools teach


class CallReader(Protocol):
    """Takes calls out of a stream of text."""

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take in text; returns what is plain text, and the calls that are whole now."""

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return what is left when no more text comes."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one request wants of tools: which are shown to the model, and what its answer must be."""

    shown: tuple[Tool, ...] = ()
    must_call: tuple[Tool, ...] = ()  # the answer is one call of one of these
    is_single: bool = False

    def schema(self) -> str | None:
        """Return the JSON Schema of an answer that must be a call."""
        if not self.must_call:
            return None
        return json.dumps({"anyOf": [_call_schema(tool) for tool in self.must_call]}, separators=(",", ":"))

    def reader(self) -> CallReader | None:
        """Return what reads this answer's calls; None where there can be none."""
        names = frozenset(tool.function.name for tool in self.shown)
        if self.must_call:
            return WholeCall(names)
        return MarkedCalls(names, is_single=self.is_single) if self.shown else None


NO_TOOLS = ToolUse()


def tool_use(request: ChatRequest, template: str) -> ToolUse:
    """Return what a request wants of tools; raises RequestError where this model cannot."""
    tools, choice = tuple(request.tools or ()), request.tool_choice
    if not tools or choice == "none":
        if isinstance(choice, NamedTool) or choice == "required":
            raise _refusal("needs tools to choose from; send `tools`")
        return NO_TOOLS
    is_single = request.parallel_tool_calls is False
    if choice in (None, "auto"):
        if BEGIN not in template:
            raise _refusal(
                f"is 'auto', but the model's chat template does not mark calls by {BEGIN}, the only form "
                "that is read here; send 'required', or name a function"
            )
        return ToolUse(shown=tools, is_single=is_single)
    if request.response_format is not None and request.schema_of_answer() is not None:
        raise _refusal("asks for a call, and response_format for something else; leave one of them out")
    wanted = tools
    if isinstance(choice, NamedTool):
        wanted = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not wanted:
            raise _refusal(f"names function {choice.function.name[:64]!r}, which is none of the tools")
    return ToolUse(shown=tools, must_call=wanted, is_single=True)


def _refusal(words: str) -> RequestError:
    return RequestError(f"tool_choice {words}", code="invalid_value", param="tool_choice")


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class MarkedCalls:
    """Reads `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; what is no such call stays text."""

    def __init__(self, names: frozenset[str], *, is_single: bool = False) -> None:
        self._names = names
        self._is_single = is_single
        self._outside = StopScanner([BEGIN])
        self._inside: str | None = None  # what came behind a mark; None: no mark is open
        self._num_calls = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take in text; returns what is plain text, and the calls that are whole now."""
        plain, calls = "", list[ToolCall]()
        while True:
            if self._inside is None:
                plain += self._outside.add(text)
                if not self._outside.has_stopped:
                    return plain, calls
                self._inside, text = self._outside.rest, ""
                self._outside = StopScanner([BEGIN])
            body, end, rest = (self._inside + text).partition(END)
            if not end:
                self._inside = body
                return plain, calls
            self._inside, text = None, rest
            call = _read_call(body, self._names, self._num_calls)
            if call is None:
                plain += BEGIN + body + END
            elif not (self._is_single and self._num_calls):
                calls.append(call)
                self._num_calls += 1

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return what is left; a call that was cut off is text."""
        return (self._outside.flush() if self._inside is None else BEGIN + self._inside), []


class WholeCall:
    """Reads an answer that is one call and nothing else; cut off, it is text."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._text = ""

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Hold the text back."""
        self._text += text
        return "", []

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return the call."""
        call = _read_call(self._text, self._names, 0)
        return (self._text, []) if call is None else ("", [call])


def _read_call(text: str, names: frozenset[str], index: int) -> ToolCall | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(index, f"call_{uuid.uuid4().hex[:24]}", str(found["name"]), text)
