"""An open stream of requests: each begins at its time, however slow the answers before it are."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.soak.streams import Answer, ask

WHOLE_EVERY = 4  # one answer in so many is not streamed
CLIENT_TIMEOUT_S = 150.0


@dataclass
class Traffic:
    """Requests at a steady rate in a thread of its own, each of a session of its own."""

    url: str
    rate: float  # requests a second
    prompts: list[str]
    max_tokens: int
    name: str
    answers: list[Answer] = field(default_factory=list)
    running: set[int] = field(default_factory=set)  # indices of answers that a client reads now
    is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Traffic:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send_all()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._thread.join(CLIENT_TIMEOUT_S + 30)

    def in_mid_stream(self, part: Callable[[str], bool] = lambda _: True) -> list[Answer]:
        """Streams of which a client has the beginning and not the end, by the maker of their newest token."""
        answers = [self.answers[i] for i in list(self.running)]
        return [a for a in answers if a.makers and a.finish is None and part(a.makers[-1])]

    async def _send_all(self) -> None:
        many = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=CLIENT_TIMEOUT_S, trust_env=False, limits=many
        ) as client:
            tasks, began_s = set[asyncio.Task[None]](), time.monotonic()
            for i in itertools.count():
                await asyncio.sleep(max(0.0, began_s + i / self.rate - time.monotonic()))
                if self.is_over.is_set():
                    break
                task = asyncio.create_task(self._send(client, i))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)

    async def _send(self, client: httpx.AsyncClient, index: int) -> None:
        prompt = self.prompts[index % len(self.prompts)]
        answer = Answer(f"{self.name}-{index}", prompt, self.max_tokens)
        self.answers.append(answer)
        place = len(self.answers) - 1
        self.running.add(place)
        try:
            await ask(client, answer, stream=index % WHOLE_EVERY != 0)
        finally:
            self.running.discard(place)
