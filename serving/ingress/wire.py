"""Answers as OpenAI sends them, whole or as events; `system_fingerprint` says who gave each piece."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sentei.serving.engine.request import TokenLogprob
from sentei.serving.errors import RequestError
from sentei.serving.ingress.answer import Delta, Progress
from sentei.serving.openai.fields import error_body
from sentei.serving.text.pieces import TokenTexts, ToolCall

DONE = "data: [DONE]\n\n"
_MISSING_LOGPROB = -9999.0  # OpenAI's value for a token outside the listed ones


def event(body: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error_event(error: RequestError) -> str:
    """Return the event that ends a stream which nobody could finish."""
    return event(error_body(error))


def models_body(name: str, created_s: int) -> dict[str, Any]:
    """Return the answer of GET /v1/models."""
    return {"object": "list", "data": [model_body(name, created_s)]}


def model_body(name: str, created_s: int) -> dict[str, Any]:
    """Return one model."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "sentei"}


def usage_body(prompt_tokens: int, progresses: Sequence[Progress]) -> dict[str, Any]:
    """Return the token counts and, beyond OpenAI's fields, what a thinned answer's attention kept."""
    completion_tokens = sum(len(progress.ids) for progress in progresses)
    kept = progresses[0].attention if len(progresses) == 1 else None
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **({} if kept is None else {"sentei_attention": kept}),
    }


@dataclass(frozen=True, slots=True)
class Wire:
    """Writes the answers to one request, as chat or as text completion."""

    request_id: str
    model_name: str
    is_chat: bool
    texts: TokenTexts
    has_logprobs: bool = False
    created_s: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, index: int, delta: Delta, progress: Progress, *, is_first: bool) -> dict[str, Any]:
        """Return one piece of a stream; `is_first` of its choice."""
        choice: dict[str, Any] = {"index": index, "finish_reason": delta.finish_reason}
        choice["logprobs"] = self._logprobs([delta]) if self.has_logprobs else None
        if self.is_chat:
            choice["delta"] = {"role": "assistant"} if is_first else {}
            if delta.text or is_first:
                choice["delta"]["content"] = delta.text
            if delta.calls:
                choice["delta"]["tool_calls"] = [_call(call, is_piece=True) for call in delta.calls]
        else:
            choice["text"] = delta.text
        return {**self._head(progress, is_whole=False), "choices": [choice]}

    def usage_chunk(self, progresses: Sequence[Progress], prompt_tokens: int) -> dict[str, Any]:
        """Return the last piece of a stream whose caller asked for usage."""
        usage = usage_body(prompt_tokens, progresses)
        return {**self._head(progresses[0], is_whole=False), "choices": [], "usage": usage}

    def whole(
        self, answers: Sequence[Sequence[Delta]], progresses: Sequence[Progress], prompt_tokens: int
    ) -> dict[str, Any]:
        """Return whole answers, one choice each."""
        choices = [self._choice(index, deltas) for index, deltas in enumerate(answers)]
        usage = usage_body(prompt_tokens, progresses)
        return {**self._head(progresses[0], is_whole=True), "choices": choices, "usage": usage}

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        choice: dict[str, Any] = {"index": index, "finish_reason": deltas[-1].finish_reason}
        choice["logprobs"] = self._logprobs(deltas) if self.has_logprobs else None
        if not self.is_chat:
            return {**choice, "text": text}
        calls = [_call(call) for delta in deltas for call in delta.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {**choice, "message": message}

    def _head(self, progress: Progress, *, is_whole: bool) -> dict[str, Any]:
        chat_kind = "chat.completion" if is_whole else "chat.completion.chunk"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": chat_kind if self.is_chat else "text_completion",
            "created": self.created_s,
            "model": self.model_name,
            "system_fingerprint": f"{progress.variant}/{progress.rung_id}",
        }

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        entries = [entry for delta in deltas for entry in delta.logprobs]
        if self.is_chat:
            return {"content": [self._chat_logprob(entry) for entry in entries], "refusal": None}
        return {
            "tokens": [self.texts.name_of(entry.token_id) for entry in entries],
            "token_logprobs": [_bounded(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [offset for delta in deltas for offset in delta.offsets],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Return the alternatives by name; of tokens with one text, all but the likeliest go by their id."""
        found: dict[str, float] = {}
        for token_id, value in entry.top:
            name = self.texts.name_of(token_id)
            found[name if name not in found else f"token_id:{token_id}"] = _bounded(value)
        return found

    def _chat_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token_id, value) for token_id, value in entry.top]
        return {**self._named(entry.token_id, entry.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        found = self.texts.bytes_of(token_id)
        return {"token": self.texts.name_of(token_id), "logprob": _bounded(logprob), "bytes": list(found)}


def _bounded(logprob: float) -> float:
    return max(logprob, _MISSING_LOGPROB)


def _call(call: ToolCall, *, is_piece: bool = False) -> dict[str, Any]:
    """Return a call; a piece of a stream also counts it."""
    function = {"name": call.name, "arguments": call.arguments}
    found = {"id": call.call_id, "type": "function", "function": function}
    return {"index": call.index, **found} if is_piece else found
