"""Watches one generation in an engine's process, where the ingress that asked for it traces."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from sentei.serving.engine.request import EngineRequest, TokenChunk
from sentei.serving.traces import DECODE, ENGINE, NO_SPAN, PREFILL, WAIT, Span, Tracer


class Watch:
    """Tells a generation in spans: the wait for its turn, prefill up to the first token, decode to the last.

    `begin_prefill` is for an engine that knows when it begins, and may come from its thread; without it
    the prefill has the wait in it.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._begun_s: float | None = None
        self._first_s: float | None = None
        self._last: TokenChunk | None = None
        self._num_tokens = 0

    def begin_prefill(self) -> None:
        """Note that the model begins to work for it."""
        self._begun_s = time.monotonic()

    def see(self, chunk: TokenChunk) -> None:
        """Note what came."""
        if self._span is NO_SPAN:
            return
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._tell_prefill(self._first_s)
        self._last = chunk
        self._num_tokens += len(chunk.ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first_s is not None and self._last is not None:
            self._span.child(DECODE, since_s=self._first_s).end()
            self._span.say(
                completion_tokens=self._num_tokens,
                compute_s=self._last.compute_s,
                finish_reason=self._last.finish_reason,
            )
        self._span.__exit__(kind, error, trace)

    def _tell_prefill(self, now_s: float) -> None:
        since_s = self._span.began_s
        if self._begun_s is not None:
            self._span.child(WAIT, since_s=since_s).end(at_s=self._begun_s)
            since_s = self._begun_s
        self._span.child(PREFILL, since_s=since_s).end(at_s=now_s)


def watch_generation(tracer: Tracer, variant: str, request: EngineRequest) -> Watch:
    """Return the watch of a request; of one that nobody traces it tells nothing."""
    num_prompt = len(request.prompt_ids) + len(request.sent_ids)
    span = tracer.follow(
        ENGINE, request.traceparent, variant=variant, rung_id=request.rung_id, prompt_tokens=num_prompt
    )
    return Watch(span)
