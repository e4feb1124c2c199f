"""The wire types of the OpenAI API that we serve, strict about what they take, and their errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sentei.serving.engine.request import Sampling
from sentei.serving.errors import RequestError

DEFAULT_MAX_TOKENS = 64
MAX_STOPS = 4

Penalty = Annotated[float, Field(ge=0.0, le=0.0)]


class StreamOptions(BaseModel):
    """What to add to a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Generation(BaseModel):
    """Options that chat and text completions share; neutral values of what we cannot do are accepted."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = Field(default=None, max_length=256)
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings; raises RequestError for too many or empty ones."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > MAX_STOPS or any(not text or len(text) > 256 for text in found):
            raise RequestError(
                f"stop has {len(found)} strings; send at most {MAX_STOPS}, each of 1 to 256 characters",
                code="invalid_value",
                param="stop",
            )
        return found

    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
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
    max_tokens: int | None = Field(default=None, ge=1)
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


GenerationRequest = ChatRequest | CompletionRequest
Parsed = TypeVar("Parsed", bound=BaseModel)


def sampling_of(request: GenerationRequest, fallback_seed: int) -> Sampling:
    """Return the sampling options; without a seed the request gets its own, which a continuation reuses."""
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        seed=fallback_seed if request.seed is None else request.seed,
        num_top_logprobs=request.num_top_logprobs(),
    )


def parse_request(kind: type[Parsed], body: bytes) -> Parsed:
    """Parse a request body; raises RequestError that names the field, its value and what is allowed."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise request_error(error) from error


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "too_short": "empty_array",
    "greater_than": "decimal_below_min_value",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}


def request_error(error: ValidationError) -> RequestError:
    """Turn the first complaint of pydantic into an OpenAI-shaped error."""
    first = error.errors(include_url=False)[0]
    # pydantic adds the branch of a union to the path, such as "str": that is no name of the caller's.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or _is_field_name(part)]
    param = ".".join(path) or None
    code = _CODES.get(first["type"], "invalid_value")
    if first["type"] == "missing":
        return RequestError(f"{param} is missing; send it in the JSON body", code=code, param=param)
    if first["type"] == "extra_forbidden":
        text = f"{param} is not a parameter of this API; leave it out"
        return RequestError(text, code=code, param=param)
    value = repr(first["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    message = first["msg"][:1].lower() + first["msg"][1:]
    return RequestError(f"{param or 'the body'} is {shown}: {message}", code=code, param=param)


def _is_field_name(part: str) -> bool:
    return part.isidentifier() and part not in ("str", "int", "list")


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the JSON body that OpenAI clients turn into their exceptions."""
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
