"""What we answer, as types: the API's document is made of them, and tests hold every answer against them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Has the fields that are named here and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What is wrong, where, and in one word."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every answer that is no success."""

    error: ErrorDetail


class Model(Answer):
    """The one model that users see."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class AttentionKept(Answer):
    """What a thinned answer's attention kept; by layer: prefill, and the mean of the decode steps."""

    sparse_calls: int
    dense_calls: int
    prefill_density: float | None
    decode_density: float | None
    layers: dict[str, list[float | None]] | None


class Usage(Answer):
    """Counted tokens; what the attention kept is said of one answer alone."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    sentei_attention: AttentionKept | None = None


class NamedLogprob(Answer):
    """One token with its log-probability and its own bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(NamedLogprob):
    """A chosen token and the most likely ones, best first."""

    top_logprobs: list[NamedLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprobs]
    refusal: None


class TextLogprobs(Answer):
    """Log-probabilities of a text answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class MadeFunction(Answer):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class MadeCall(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class Reply(Answer):
    """The assistant's message: it can be sent back as it is."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MadeCall] = []


class ChatChoice(Answer):
    """One answer of a chat."""

    index: int
    message: Reply
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None


class TextChoice(Answer):
    """One answer to a prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None


class _Whole(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Whole):
    """POST /v1/chat/completions, not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Whole):
    """POST /v1/completions, not streamed."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class CallPiece(MadeCall):
    """A call in a stream: always whole, and counted."""

    index: int


class ReplyPiece(Answer):
    """A piece of the assistant's message; the first names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPiece] = []


class ChatPiece(Answer):
    """A piece of one answer of a chat."""

    index: int
    delta: ReplyPiece
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    logprobs: ChatLogprobs | None


class TextPiece(Answer):
    """A piece of one answer to a prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None


class _Chunk(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None  # in the last one, with no choices, where `stream_options` asks for it


class ChatChunk(_Chunk):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]


class TextChunk(_Chunk):
    """One event of a streamed text completion."""

    object: Literal["text_completion"]
    choices: list[TextPiece]


class Tokens(Answer):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
