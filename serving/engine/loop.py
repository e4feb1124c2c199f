"""The engine: a thread that asks the scheduler what to do, lets the runner do it, hands tokens to asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from sentei.serving.engine.attention_use import AttentionUse
from sentei.serving.engine.request import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
    TokenLogprob,
)
from sentei.serving.engine.scheduler import Scheduler, Step, StepKind
from sentei.serving.errors import EngineError

log = logging.getLogger(__name__)

Sink = Callable[[TokenChunk | ScoreResult | Exception], None]


class Runner(Protocol):
    """What the engine needs of a model; `ModelRunner` is the real one."""

    def prefill(self, request: EngineRequest) -> tuple[TokenLogprob, float]:
        """Start a request; returns its first token and the model seconds so far."""

    def decode(self, request_id: str) -> tuple[TokenLogprob, float]:
        """Give a running request its next token."""

    def attention(self, request_id: str) -> AttentionUse | None:
        """Say what a running request's attention kept so far; None where nothing is thinned."""

    def drop(self, request_id: str) -> None:
        """Free what a request holds."""

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay a request for the audit."""


@dataclass(slots=True)
class _Job:
    request: EngineRequest | ScoreRequest
    sink: Sink
    num_tokens: int = 0
    on_prefill: Callable[[], None] | None = None


class Engine:
    """Runs requests on one thread; the methods that asyncio code calls never touch the model."""

    def __init__(self, runner: Runner, limits: EngineLimits) -> None:
        self._runner = runner
        self._scheduler = Scheduler(limits)
        self._jobs: dict[str, _Job] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._step_began_s: float | None = None

    # Called from asyncio.

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="sentei-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after the step that runs now."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def stalled_s(self) -> float:
        """Seconds since the running step began; 0 while idle."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    async def generate(
        self, request: EngineRequest, on_prefill: Callable[[], None] | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yield tokens as they come; closing the iterator frees the request's cache.

        `on_prefill` is called on the engine's thread when the model begins to work for the request.
        """
        queue: asyncio.Queue[TokenChunk | ScoreResult | Exception] = asyncio.Queue()
        sink = self._sink_into(queue)
        self._post(lambda: self.submit(request, sink, on_prefill))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, TokenChunk)
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._post(lambda: self.cancel(request.request_id))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay a request when there is room for it."""
        queue: asyncio.Queue[TokenChunk | ScoreResult | Exception] = asyncio.Queue()
        sink = self._sink_into(queue)
        self._post(lambda: self.submit(request, sink))
        try:
            item = await queue.get()
        finally:
            self._post(lambda: self.cancel(request.request_id))
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, ScoreResult)
        return item

    async def between_steps(self, action: Callable[[], None]) -> None:
        """Run `action` on the engine's thread when no step runs; raises what it raises."""
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def act() -> None:
            try:
                action()
            except Exception as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        self._post(act)
        await done

    # Called on the engine's thread (or directly by a test, without any thread).

    def submit(
        self,
        request: EngineRequest | ScoreRequest,
        sink: Sink,
        on_prefill: Callable[[], None] | None = None,
    ) -> None:
        """Queue a request; a refusal goes to its sink."""
        if (refusal := self._scheduler.refusal(request)) is not None:
            sink(refusal)
            return
        self._scheduler.add(request)
        num_sent = len(request.sent_ids) if isinstance(request, EngineRequest) else 0
        self._jobs[request.request_id] = _Job(request, sink, num_sent, on_prefill)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its cache; a cancel that comes late or twice does nothing."""
        self._jobs.pop(request_id, None)
        self._scheduler.finish(request_id)
        self._runner.drop(request_id)

    def step(self) -> bool:
        """Do one piece of work; False when there was none."""
        step = self._scheduler.next_step()
        if step is None:
            return False
        for request_id in step.request_ids:
            if (job := self._jobs.get(request_id)) is not None:
                self._work(step, job)
        return True

    def _work(self, step: Step, job: _Job) -> None:
        request = job.request
        try:
            if isinstance(request, ScoreRequest):
                job.sink(self._runner.score(request))
                self.cancel(request.request_id)
                return
            is_prefill = step.kind is StepKind.PREFILL
            if is_prefill and job.on_prefill is not None:
                job.on_prefill()
            token, compute_s = (
                self._runner.prefill(request) if is_prefill else self._runner.decode(request.request_id)
            )
            self._deliver(request, job, token, compute_s)
        except EngineError as error:
            self._fail(request.request_id, job, error)
        except Exception as error:  # the request handler: one request's failure must not end the others
            log.exception("request %s failed in %s", request.request_id, step.kind)
            self._fail(request.request_id, job, EngineError(f"{type(error).__name__}: {error}"))

    def _deliver(self, request: EngineRequest, job: _Job, token: TokenLogprob, compute_s: float) -> None:
        if token.token_id in request.stop_ids:
            use = self._runner.attention(request.request_id)
            job.sink(TokenChunk((), (), FinishReason.STOP, compute_s, use))
            self.cancel(request.request_id)
            return
        is_first = job.num_tokens == len(request.sent_ids)
        job.num_tokens += 1
        finish = FinishReason.LENGTH if job.num_tokens >= request.max_tokens else None
        logprobs = () if request.sampling.num_top_logprobs is None else (token,)
        # Only twice: a client that leaves early has left the prefill's record behind.
        use = self._runner.attention(request.request_id) if is_first or finish is not None else None
        job.sink(TokenChunk((token.token_id,), logprobs, finish, compute_s, use))
        if finish is not None:
            self.cancel(request.request_id)

    def _fail(self, request_id: str, job: _Job, error: Exception) -> None:
        job.sink(error)
        self.cancel(request_id)

    def _run(self) -> None:
        while not self._is_stopping:
            self._drain()
            self._step_began_s = time.monotonic()
            has_worked = self.step()
            self._step_began_s = None
            if not has_worked:
                with self._wake:
                    self._wake.wait_for(lambda: bool(self._inbox) or self._is_stopping)

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    @staticmethod
    def _sink_into(queue: asyncio.Queue[TokenChunk | ScoreResult | Exception]) -> Sink:
        loop = asyncio.get_running_loop()

        def sink(item: TokenChunk | ScoreResult | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        return sink
