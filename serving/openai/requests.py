"""The bodies of the OpenAI API that we serve, with the fields that vLLM's users expect beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from sentei.serving.engine.request import Sampling
from sentei.serving.errors import RequestError
from sentei.serving.openai.fields import Fields
from sentei.serving.openai.messages import MAX_TOOLS, Message, NamedTool, Tool

MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_CHOICES = 8
MAX_BIASES = 1024
SEED_BITS = (1 << 63) - 1
ANY_OBJECT = '{"type":"object"}'

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class StreamOptions(Fields):
    """What to add to a stream."""

    include_usage: bool | None = None


class TextFormat(Fields):
    """Plain text: no rule for the answer."""

    type: Literal["text"]


class ObjectFormat(Fields):
    """JSON mode: the answer is one JSON object."""

    type: Literal["json_object"]


class NamedSchema(Fields):
    """A JSON Schema with a name; ours is always kept to, `strict` or not."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    body: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Fields):
    """The answer follows a JSON Schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class _Generation(Fields):
    """Options that chat and text completions share; null and what is left out get the model's defaults."""

    model: str
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1: no limit")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    user: str | None = Field(default=None, max_length=256)
    response_format: ResponseFormat | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def num_choices(self) -> int:
        """Return how many answers are wanted."""
        return self.n or 1

    def schema_of_answer(self) -> str | None:
        """Return the JSON Schema that the answer must follow, as text; None: any text."""
        wanted = self.response_format
        if isinstance(wanted, SchemaFormat) and wanted.json_schema.body is not None:
            return json.dumps(wanted.json_schema.body, ensure_ascii=False, separators=(",", ":"))
        return ANY_OBJECT if isinstance(wanted, ObjectFormat | SchemaFormat) else None


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def num_top_logprobs(self) -> int | None:
        """Return how many alternatives are wanted; None: no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}, which needs logprobs=true",
                code="invalid_value",
                param="top_logprobs",
            )
        return (self.top_logprobs or 0) if self.logprobs else None

    def wanted_tokens(self) -> int | None:
        """Return the limit on the answer, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    def num_top_logprobs(self) -> int | None:
        """Return how many alternatives are wanted; None: no log-probabilities at all."""
        return self.logprobs

    def wanted_tokens(self) -> int | None:
        """Return the limit on the answer."""
        return self.max_tokens

    def single_prompt(self) -> str | list[int]:
        """Return the one prompt, as text or as token ids; raises RequestError for none, empty or several."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise RequestError(
                    f"prompt has {len(prompt)} entries; send one prompt per request",
                    code="unsupported_value",
                    param="prompt",
                )
            prompt = prompt[0]
        if not prompt:
            raise RequestError(
                "prompt is empty; send at least one character", code="empty_string", param="prompt"
            )
        return prompt  # type: ignore[no-any-return]


class TokenizeRequest(Fields):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None

    def check_one(self) -> None:
        """Raise RequestError unless there is a prompt or a conversation, and not both."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", code="invalid_value", param="prompt")


GenerationRequest = ChatRequest | CompletionRequest


def sampling_of(request: GenerationRequest, defaults: Sampling, fallback_seed: int) -> Sampling:
    """Return the sampling options: what the request names, else the model's defaults.

    Without a seed the request gets its own, which a continuation reuses.
    """
    named = {
        field: value
        for field in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
        )
        if (value := getattr(request, field)) is not None
    }  # fmt: skip
    sampling = replace(
        defaults,
        **named,
        seed=fallback_seed if request.seed is None else request.seed & SEED_BITS,
        num_top_logprobs=request.num_top_logprobs(),
        logit_bias=tuple((int(i), bias) for i, bias in (request.logit_bias or {}).items()),
        json_schema=request.schema_of_answer(),
    )
    if request.top_k is None:
        return sampling
    return replace(sampling, top_k=request.top_k if request.top_k > 0 else None)
