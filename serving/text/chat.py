"""Conversations to prompts, by the model's own chat template; what it cannot say is refused in its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from sentei.serving.errors import RequestError
from sentei.serving.openai.messages import AssistantMessage, Message, SystemMessage, Tool, ToolMessage
from sentei.serving.ports import Tokenizer


def template_of(tokenizer: Tokenizer) -> str:
    """Return the source of the chat template (of all of them, where there are several); "": there is none."""
    found: Any = getattr(tokenizer, "chat_template", None) or ""
    return found if isinstance(found, str) else "\n".join(str(text) for text in found.values())


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """Render a conversation; raises RequestError where the template cannot, or would lose a part of it."""
    template = template_of(tokenizer)
    _check_tools(template, messages, tools)
    if not template:
        return "\n".join(message.text() for message in messages)
    conversation = [_plain(message, f"messages.{i}", template) for i, message in enumerate(messages)]
    options: dict[str, Any] = {"tools": [_plain_tool(tool) for tool in tools]} if tools else {}
    try:
        rendered = str(
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
        )
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RequestError(
            f"the model's chat template refuses these messages: {str(error)[:300]}",
            code="chat_template_error",
            param="messages",
        ) from error
    _check_instructions(rendered, messages)
    return rendered


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """Return the ids of a conversation; a model without chat template gets the plain texts, one per line."""
    text = chat_text(tokenizer, messages, tools)
    return tokenizer.encode(text, add_special_tokens=not template_of(tokenizer))


def knows_tools(template: str) -> bool:
    """Whether a template says anything of tools."""
    return re.search(r"\btools\b", template) is not None


def _check_tools(template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    if tools and not knows_tools(template):
        text = "the model's chat template has no place for tools; leave them out"
        raise RequestError(text, code="unsupported_value", param="tools")
    if "tool" in template:
        return
    for i, message in enumerate(messages):
        if isinstance(message, ToolMessage) or (isinstance(message, AssistantMessage) and message.tool_calls):
            text = f"messages.{i} is about tools, for which the model's chat template has no place"
            raise RequestError(text, code="unsupported_value", param=f"messages.{i}")


def _plain(message: Message, place: str, template: str) -> dict[str, Any]:
    """Return a message as templates know it: `developer` is `system` where they know no developer."""
    is_unknown = message.role == "developer" and "developer" not in template
    found: dict[str, Any] = {"role": "system" if is_unknown else message.role, "content": message.text()}
    if not isinstance(message, ToolMessage) and message.name is not None:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        found["tool_calls"] = [
            call.as_template_wants(f"{place}.tool_calls.{i}") for i, call in enumerate(message.tool_calls)
        ]
    return found


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.function.name,
        "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _check_instructions(rendered: str, messages: Sequence[Message]) -> None:
    """Raise RequestError where the template passed over a system message: nobody else would tell."""
    for i, message in enumerate(messages):
        if isinstance(message, SystemMessage) and message.text().strip() not in rendered:
            raise RequestError(
                f"messages.{i} has role {message.role!r}, and the model's chat template leaves its text out: "
                "it has no such role there; put the text into the first user message",
                code="unsupported_value",
                param=f"messages.{i}.role",
            )
