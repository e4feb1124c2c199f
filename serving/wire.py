"""Answers as OpenAI sends them, whole or as events; `system_fingerprint` says who gave each piece."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentei.serving.answer import Delta, Progress
from sentei.serving.engine.request import TokenLogprob
from sentei.serving.errors import RequestError
from sentei.serving.openai import error_body
from sentei.serving.ports import Tokenizer

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


def usage_body(prompt_tokens: int, progress: Progress) -> dict[str, Any]:
    """Return the token counts and, beyond OpenAI's fields, what a thinned answer's attention kept."""
    completion_tokens = len(progress.ids)
    extra = {} if progress.attention is None else {"sentei_attention": progress.attention}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **extra,
    }


@dataclass(frozen=True, slots=True)
class Wire:
    """Writes one answer, as chat or as text completion."""

    request_id: str
    model_name: str
    is_chat: bool
    tokenizer: Tokenizer
    has_logprobs: bool = False

    def chunk(self, delta: Delta, progress: Progress, *, is_first: bool) -> dict[str, Any]:
        """Return one piece of a stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": delta.finish_reason}
        choice["logprobs"] = self._logprobs(delta.logprobs) if self.has_logprobs else None
        if self.is_chat:
            choice["delta"] = {"role": "assistant"} if is_first else {}
            if delta.text or is_first:
                choice["delta"]["content"] = delta.text
        else:
            choice["text"] = delta.text
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind, progress), "choices": [choice]}

    def usage_chunk(self, progress: Progress, prompt_tokens: int) -> dict[str, Any]:
        """Return the last piece of a stream whose caller asked for usage."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        usage = usage_body(prompt_tokens, progress)
        return {**self._head(kind, progress), "choices": [], "usage": usage}

    def whole(self, deltas: Sequence[Delta], progress: Progress, prompt_tokens: int) -> dict[str, Any]:
        """Return a whole answer."""
        text = "".join(delta.text for delta in deltas)
        logprobs = [entry for delta in deltas for entry in delta.logprobs]
        choice: dict[str, Any] = {"index": 0, "finish_reason": deltas[-1].finish_reason}
        choice["logprobs"] = self._logprobs(logprobs) if self.has_logprobs else None
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        usage = usage_body(prompt_tokens, progress)
        return {**self._head(kind, progress), "choices": [choice], "usage": usage}

    def _head(self, kind: str, progress: Progress) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
            "system_fingerprint": f"{progress.variant}/{progress.rung_id}",
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprob(entry) for entry in entries], "refusal": None}
        return {
            "tokens": [self._token(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._token(i): value for i, value in entry.top} for entry in entries],
            "text_offset": [],
        }

    def _chat_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token_id, value) for token_id, value in entry.top]
        return {**self._named(entry.token_id, entry.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token(token_id)
        return {"token": text, "logprob": max(logprob, _MISSING_LOGPROB), "bytes": list(text.encode())}

    def _token(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])
