"""Real prompts against the OpenAI API: sessions with recall questions and source text, from a seed."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from sentei.pipeline.tasks import MAKERS
from sentei.pipeline.tasks.prompt import RecallTask, TaskName, is_correct
from sentei.pipeline.text.corpus import Document

SESSION_HEADER = "x-session-id"
VARIANT_HEADER = "x-sentei-variant"
ASK_AGAIN_S = 0.5
WAIT_MOST_S = 240.0  # then the next session is sent all the same: whoever is asked may be gone


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of one session; `task` is set where there is a right answer."""

    session_id: str
    text: str
    max_tokens: int
    task: RecallTask | None = None


@dataclass(frozen=True, slots=True)
class MixOptions:
    """What the sessions ask for; lengths are drawn from `prompt_tokens` with equal chance."""

    prompt_tokens: Sequence[int] = (256, 1024, 2048, 3072)
    tasks: Sequence[TaskName] = ("passkey", "key_value", "copy")
    text_share: float = 0.4  # sessions that continue source text instead of answering a question
    answer_tokens: int = 16
    text_tokens: int = 32


def prompt_mix(
    tokenizer: Any, documents: Sequence[Document], *, options: MixOptions, seed: int, prefix: str
) -> Iterator[Prompt]:
    """Yield prompts without end; a seed gives the same prompts, `prefix` keeps sessions of two runs apart."""
    rng = random.Random(f"traffic {seed}")
    for number in itertools.count():
        session = f"{prefix}-{number:05d}"
        tokens = rng.choice(list(options.prompt_tokens))
        if rng.random() < options.text_share:
            text = _source_text(tokenizer, documents, tokens, rng)
            yield Prompt(session, text, options.text_tokens)
            continue
        make = MAKERS[rng.choice(list(options.tasks))]
        task = make(
            tokenizer,
            prompt_tokens=tokens,
            depth=rng.random(),
            seed=seed * 1_000_003 + number,
            documents=documents,
        )
        yield Prompt(session, task.prompt, options.answer_tokens, task)


def _source_text(tokenizer: Any, documents: Sequence[Document], tokens: int, rng: random.Random) -> str:
    document = rng.choice([d for d in documents if len(d.text) > 8 * tokens] or list(documents))
    start = rng.randrange(max(1, len(document.text) - 8 * tokens))
    text = document.text[start : start + 8 * tokens]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids[:tokens]))


@dataclass(slots=True)
class TrafficTotals:
    """What the clients saw; times in milliseconds."""

    sent: int = 0
    failed: int = 0
    asked: int = 0
    answered_right: int = 0
    by_variant: dict[str, int] = field(default_factory=dict)
    ttft_ms: dict[str, list[float]] = field(default_factory=dict)
    last_error: str = ""

    def add(self, prompt: Prompt, variant: str, ttft_ms: float, text: str) -> None:
        """Count one answer."""
        self.sent += 1
        self.by_variant[variant] = self.by_variant.get(variant, 0) + 1
        self.ttft_ms.setdefault(variant, []).append(ttft_ms)
        if prompt.task is not None:
            self.asked += 1
            self.answered_right += is_correct(prompt.task, text)

    def add_failure(self, error: str) -> None:
        """Count one request that got no answer."""
        self.sent += 1
        self.failed += 1
        self.last_error = error


class TrafficDriver:
    """A fixed number of clients in a thread of their own; each sends its next session when the last ends.

    Between sessions a client thinks for `think_s`, and waits until `may_go_on`, which may block, says yes.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Iterator[Prompt],
        *,
        clients: int = 2,
        think_s: float = 0.0,
        may_go_on: Callable[[], bool] | None = None,
    ) -> None:
        self.totals = TrafficTotals()
        self._url, self._model, self._prompts, self._clients = url, model, prompts, clients
        self._think_s, self._may_go_on = think_s, may_go_on
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sentei-traffic", daemon=True)

    def __enter__(self) -> TrafficDriver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        asyncio.run(self._drive())

    async def _drive(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120, trust_env=False) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self._clients)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self._stopping.is_set():
            prompt = await asyncio.to_thread(self._next)
            try:
                await self._send(client, prompt)
            except (httpx.HTTPError, ValueError) as error:
                self.totals.add_failure(f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._think_s)
            ends_s = time.monotonic() + WAIT_MOST_S
            while time.monotonic() < ends_s and not await self._is_free():
                await asyncio.sleep(ASK_AGAIN_S)

    async def _is_free(self) -> bool:
        if self._may_go_on is None or self._stopping.is_set():
            return True
        try:
            return await asyncio.to_thread(self._may_go_on)
        except Exception as error:  # a question that fails must not end the traffic: it is asked again
            self.totals.last_error = f"{type(error).__name__}: {error}"
            return False

    def _next(self) -> Prompt:
        with self._lock:
            return next(self._prompts)

    async def _send(self, client: httpx.AsyncClient, prompt: Prompt) -> None:
        body = {
            "model": self._model,
            "prompt": prompt.text,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        started = time.perf_counter()
        first: float | None = None
        parts: list[str] = []
        headers = {SESSION_HEADER: prompt.session_id}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
            variant = response.headers.get(VARIANT_HEADER, "unknown")
            async for line in response.aiter_lines():
                text = _event_text(line)
                if text is None:
                    continue
                first = first if first is not None else time.perf_counter()
                parts.append(text)
        ended = first if first is not None else time.perf_counter()
        self.totals.add(prompt, variant, (ended - started) * 1e3, "".join(parts))


def _event_text(line: str) -> str | None:
    """Return the text of one server-sent event, or None for a blank line, usage or the end."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event = json.loads(line[6:])
    if "error" in event:
        raise ValueError(f"stream ended with an error: {event['error'].get('message')}")
    choices = event.get("choices") or []
    return str(choices[0].get("text", "")) if choices else None
