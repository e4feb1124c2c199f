"""Streamed answers over HTTP, token by token, and whether each is whole and as it would be undisturbed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(slots=True)
class Answer:
    """One answer as a client saw it."""

    session_id: str
    prompt: str
    max_tokens: int
    tokens: list[str] = field(default_factory=list)  # by name, which tells every token from every other
    makers: list[str] = field(default_factory=list)  # variant/rung of each token
    lead: float = float("inf")  # the least of the best token over the next, in nats; needs `logprobs=2`
    text: str = ""
    finish: str | None = None
    error: str = ""
    status: int = 0
    has_done: bool = False
    began_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0

    @property
    def fault(self) -> str:
        """What is wrong with the answer, apart from its tokens; "" if nothing."""
        if self.error:
            return self.error
        if self.status != 200:
            return f"HTTP {self.status}"
        if self.finish != "length" or len(self.tokens) != self.max_tokens or not self.has_done:
            return f"truncated after {len(self.tokens)} of {self.max_tokens} tokens (finish {self.finish})"
        return ""

    @property
    def num_moves(self) -> int:
        """How often another variant took over."""
        return sum(a != b for a, b in zip(self.makers, self.makers[1:], strict=False))


def body_of(answer: Answer, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """The request of an answer: greedy, with the name of every token; `logprobs=2` to learn its lead."""
    return {
        "model": "tiny",
        "prompt": answer.prompt,
        "max_tokens": answer.max_tokens,
        "temperature": 0,
        "logprobs": 0,
        "stream": stream,
        **fields,
    }


async def ask(
    client: httpx.AsyncClient,
    answer: Answer,
    *,
    stream: bool = True,
    seen: Callable[[Answer], None] = lambda _: None,
    **fields: Any,
) -> Answer:
    """Get an answer; nothing is tried again, and whatever goes wrong is kept in it."""
    body, headers = body_of(answer, stream=stream, **fields), {"x-session-id": answer.session_id}
    try:
        if stream:
            async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                answer.status = response.status_code
                if response.status_code != 200:
                    answer.error = f"HTTP {response.status_code}: {(await response.aread())[:200]!r}"
                    return answer
                async for line in response.aiter_lines():
                    _read_line(answer, line)
                    seen(answer)
        else:
            response = await client.post("/v1/completions", json=body, headers=headers)
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = f"HTTP {response.status_code}: {response.content[:200]!r}"
                return answer
            _take(answer, response.json())
            answer.has_done = True
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error} after {len(answer.tokens)} tokens"
    finally:
        answer.took_s = time.monotonic() - answer.began_s
    return answer


def _read_line(answer: Answer, line: str) -> None:
    if line.startswith(":"):
        raise httpx.RemoteProtocolError(f"a comment that is none of a client's: {line[:80]}")
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        answer.has_done = True
        return
    _take(answer, json.loads(line.removeprefix("data: ")))


def _take(answer: Answer, piece: dict[str, Any]) -> None:
    if "error" in piece:
        answer.error = f"error in the stream after {len(answer.tokens)} tokens: {piece['error']}"
        return
    for choice in piece["choices"]:
        logprobs = choice["logprobs"] or {}
        names = logprobs.get("tokens") or []
        for top in logprobs.get("top_logprobs") or []:
            best = sorted(top.values(), reverse=True)
            answer.lead = min(answer.lead, best[0] - best[1]) if len(best) > 1 else answer.lead
        answer.tokens += names
        answer.makers += [str(piece["system_fingerprint"])] * len(names)
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
