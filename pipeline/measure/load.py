"""Load on an OpenAI-compatible API: arrivals that do not wait for answers, and what a user would have felt.

Open loop: requests leave at times drawn beforehand, however slow the server is; a closed loop would slow down
with it and flatter it. Any server that streams `/v1/completions` will do: engines are compared from outside.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

Send = Callable[["Request"], AsyncIterator[int]]  # yields how many tokens came with each piece


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it leaves, its prompt and how long the answer may be."""

    at_s: float
    prompt_ids: tuple[int, ...]
    answer_tokens: int
    session: str


@dataclass(frozen=True, slots=True)
class Felt:
    """How one request went, in seconds since it left; `failure` is empty if it was answered."""

    prompt_tokens: int
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    failure: str = ""

    @property
    def per_token_s(self) -> float:
        """Mean time per token after the first."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good."""

    first_ms: float
    per_token_ms: float

    def is_met(self, felt: Felt) -> bool:
        """Whether one request was good."""
        is_fast = felt.first_s * 1e3 <= self.first_ms and felt.per_token_s * 1e3 <= self.per_token_ms
        return not felt.failure and is_fast


def plan_arrivals(
    prompts: Sequence[Sequence[int]], *, rate_per_s: float | None, answer_tokens: int, seed: int
) -> list[Request]:
    """Give each prompt a time to leave: a Poisson process, or all at once without a rate."""
    draw, at_s, found = random.Random(seed), 0.0, []
    for i, prompt in enumerate(prompts):
        found.append(Request(at_s, tuple(prompt), answer_tokens, f"load-{seed}-{i}"))
        at_s += draw.expovariate(rate_per_s) if rate_per_s else 0.0
    return found


async def run_load(
    requests: Sequence[Request],
    send: Send,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> tuple[list[Felt], float]:
    """Let all requests leave at their time; returns how each went, and the seconds until the last answer."""
    began_s = clock()

    async def one(request: Request) -> Felt:
        await sleep(max(began_s + request.at_s - clock(), 0.0))
        left_s, first_s, last_s, tokens = clock(), 0.0, 0.0, 0
        try:
            async for num in send(request):
                last_s = clock() - left_s
                first_s = first_s or last_s
                tokens += num
        except (httpx.HTTPError, ValueError) as error:
            return Felt(len(request.prompt_ids), failure=f"{type(error).__name__}: {error}")
        failure = "" if tokens else "no token came"
        return Felt(len(request.prompt_ids), first_s, last_s, tokens, failure)

    felt = await asyncio.gather(*(one(request) for request in requests))
    return list(felt), clock() - began_s


def openai_sender(client: httpx.AsyncClient, model: str, extra: dict[str, Any]) -> Send:
    """Return a sender for `/v1/completions`; `extra` goes into each body."""

    async def send(request: Request) -> AsyncIterator[int]:
        body = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.answer_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }
        headers = {"x-session-id": request.session}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise ValueError(f"status {response.status_code}: {text[:200]}")
            seen = 0
            async for line in response.aiter_lines():
                is_text, total = read_piece(line)
                num = int(is_text) if total is None else total - seen  # a piece may hold several tokens
                seen += num
                if num:
                    yield num

    return send


def read_piece(line: str) -> tuple[bool, int | None]:
    """Return whether a line of the stream brings text, and the count if it tells; ValueError: an error."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return False, None
    piece = json.loads(line.removeprefix("data: "))
    if "error" in piece:
        raise ValueError(str(piece["error"])[:200])
    choices, usage = piece.get("choices") or [{}], piece.get("usage") or {}
    return bool(choices[0].get("text")), usage.get("completion_tokens")


def summarise(felt: Sequence[Felt], seconds: float, goal: Goal | None) -> dict[str, float | int | None]:
    """Return the row of a table: latencies, throughput, and how much of it was good."""
    answered = [one for one in felt if not one.failure]
    first = sorted(one.first_s * 1e3 for one in answered)
    per_token = [one.per_token_s * 1e3 for one in answered if one.tokens > 1]
    return {
        "requests": len(felt),
        "failed": len(felt) - len(answered),
        "seconds": round(seconds, 3),
        "ttft_ms_p50": round(median(first), 1) if first else None,
        "ttft_ms_p95": round(first[min(len(first) - 1, int(0.95 * len(first)))], 1) if first else None,
        "tpot_ms_p50": round(median(per_token), 2) if per_token else None,
        "tokens_per_s": round(sum(one.tokens for one in answered) / seconds, 2),
        "prompt_tokens_per_s": round(sum(one.prompt_tokens for one in answered) / seconds, 1),
        "goodput_per_s": round(sum(goal.is_met(one) for one in felt) / seconds, 4) if goal else None,
    }
