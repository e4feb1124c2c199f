"""Chat templates as models have them: strict ones, ones without a role, with tools, and broken ones."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from sentei.serving.errors import RequestError
from sentei.serving.openai.messages import (
    AssistantMessage,
    Call,
    CalledFunction,
    Function,
    Message,
    SystemMessage,
    Tool,
    ToolMessage,
    UserMessage,
)
from sentei.serving.text.chat import chat_text
from tests.fakes_serving import FakeTokenizer

STRICT = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant!') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
PERMISSIVE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SILENT = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
KNOWS_DEVELOPER = PERMISSIVE + "{# developer #}"
TOOLS = (
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endfor %}"
)


class TemplateTokenizer(FakeTokenizer):
    """Renders as Transformers does: Jinja, with `raise_exception`."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        def raise_exception(words: str) -> None:
            raise jinja2.TemplateError(words)

        environment = jinja2.Environment()
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.chat_template or "").render(messages=conversation, **options)


def render(template: str | None, *messages: Message, tools: tuple[Tool, ...] = ()) -> str:
    """The prompt of a conversation."""
    return chat_text(TemplateTokenizer(template), messages, tools)


SYSTEM = SystemMessage(role="system", content="be brief")
DEVELOPER = SystemMessage(role="developer", content="be brief")
USER = UserMessage(role="user", content="hi")
TOOL = Tool(type="function", function=Function(name="now"))


@pytest.mark.parametrize("message", [SYSTEM, DEVELOPER])
def test_refusal_of_a_template_is_told_in_its_words(message: Message) -> None:
    """A template that raises is the caller's business: a 400 that says what it said."""
    with pytest.raises(RequestError, match="Only user and assistant!") as caught:
        render(STRICT, message, USER)

    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(("template", "role"), [(PERMISSIVE, "system"), (KNOWS_DEVELOPER, "developer")])
def test_developer_reaches_the_prompt(template: str, role: str) -> None:
    """`developer` is told as `system` where the template knows no developer."""
    assert render(template, DEVELOPER, USER) == f"[{role}]be brief[user]hi"


@pytest.mark.parametrize("message", [SYSTEM, DEVELOPER])
def test_instructions_never_vanish(message: Message) -> None:
    """A template that passes over the role in silence is found out."""
    with pytest.raises(RequestError, match=r"messages\.1 .*leaves its text out"):
        render(SILENT, USER, message)


def test_broken_template_is_told() -> None:
    """A template that is no template is an answer in shape, too."""
    with pytest.raises(RequestError, match="end of template"):
        render("{% for m in messages %}{{ m.content", USER)


def test_tools_are_rendered_with_calls_and_answers() -> None:
    """Tools, calls with their arguments as an object, and tools' answers reach the template."""
    call = Call(id="c1", type="function", function=CalledFunction(name="now", arguments='{"city": "x"}'))
    said = AssistantMessage(role="assistant", tool_calls=[call])
    answer = ToolMessage(role="tool", content="noon", tool_call_id="c1")

    found = render(TOOLS, USER, said, answer, tools=(TOOL,))

    assert found == "(now)[user]hi[assistant]<tool_call>x</tool_call>[tool]noon"


@pytest.mark.parametrize("template", [PERMISSIVE, None])
@pytest.mark.parametrize("where", ["tools", "messages"])
def test_template_without_tools_says_so(template: str | None, where: str) -> None:
    """Tools, or a tool's answer, are refused by name where the template would lose them."""
    answer = ToolMessage(role="tool", content="noon", tool_call_id="c1")
    with pytest.raises(RequestError, match="no place") as caught:
        render(template, USER, *([answer] if where == "messages" else []), tools=(TOOL,) * (where == "tools"))

    assert str(caught.value.param).startswith(where)


def test_arguments_that_are_no_json_are_named() -> None:
    """A call with broken arguments is refused with its place."""
    call = Call(id="c1", type="function", function=CalledFunction(name="now", arguments="{"))
    with pytest.raises(RequestError, match=r"messages\.0\.tool_calls\.0\.function\.arguments"):
        render(TOOLS, AssistantMessage(role="assistant", tool_calls=[call]))
