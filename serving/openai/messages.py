"""The messages of a conversation and the tools that a model may call, as clients send them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from sentei.serving.errors import RequestError
from sentei.serving.openai.fields import Fields

MAX_TOOLS = 128


class TextPart(Fields):
    """One piece of text of a message's content."""

    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    """What an assistant said when it would not answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The refusal, as a part of the assistant's text."""
        return self.refusal


TextParts = Annotated[list[TextPart], Field(min_length=1)]
AnswerParts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(min_length=1)
]


def _join(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class SystemMessage(Fields):
    """What the model is told before the conversation; `developer` is the newer name of `system`."""

    role: Literal["system", "developer"]
    content: str | TextParts
    name: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        return _join(self.content)


class UserMessage(Fields):
    """What the user says."""

    role: Literal["user"]
    content: str | TextParts
    name: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        return _join(self.content)


class CalledFunction(Fields):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class Call(Fields):
    """One call that the assistant made."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # in pieces of a stream, which some clients send back whole

    def as_template_wants(self, place: str) -> dict[str, Any]:
        """Return the call with its arguments as an object; raises RequestError if they are none."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{place}.function.arguments is no JSON: {error}", code="invalid_value", param=place
            ) from error
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class AssistantMessage(Fields):
    """What the model said: a reply of ours fits as it is."""

    role: Literal["assistant"]
    content: str | AnswerParts | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        """Return the content as one string, or the refusal where there is none."""
        return _join(self.content) or self.refusal or ""


class ToolMessage(Fields):
    """What a tool answered."""

    role: Literal["tool"]
    content: str | TextParts
    tool_call_id: str

    def text(self) -> str:
        """Return the content as one string."""
        return _join(self.content)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Fields):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction
