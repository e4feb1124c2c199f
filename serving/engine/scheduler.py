"""What the engine does next. Plain Python without tensors or clock, so it is tested without a model.

Requests wait in order of arrival, are prefilled one at a time, and then decode in rounds: each round gives
every running request one token. Prefills and rounds alternate, so a long prompt delays running streams by
one prefill at most. Replays for the audit run when nobody waits, or after `score_patience_steps` steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from sentei.serving.engine.request import EngineLimits, EngineRequest, ScoreRequest
from sentei.serving.errors import EngineBusyError, EngineError, EngineRefusedError


class StepKind(StrEnum):
    """The three things an engine can do."""

    PREFILL = "prefill"
    DECODE = "decode"
    SCORE = "score"


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work: a prefill or a replay of one request, or one decode round of all running ones."""

    kind: StepKind
    request_ids: tuple[str, ...]


def size_refusal(request: EngineRequest | ScoreRequest, limits: EngineLimits) -> EngineRefusedError | None:
    """Say why a request can never fit an engine, or None."""
    limit = limits.max_context_tokens
    if isinstance(request, ScoreRequest):
        served = len(request.ids) - request.num_prompt
        if request.num_prompt < 1 or served < 1 or len(request.ids) > limit:
            return EngineRefusedError(
                f"replay of {request.num_prompt} prompt and {served} served tokens; need both, max {limit}"
            )
        return None
    tokens = len(request.prompt_ids)
    if not 0 < tokens < limit:
        return EngineRefusedError(f"prompt of {tokens} tokens; this engine takes 1 to {limit - 1}")
    if request.max_tokens <= len(request.sent_ids):
        return EngineRefusedError(
            f"max_tokens is {request.max_tokens} with {len(request.sent_ids)} sent; ask for more"
        )
    if tokens + request.max_tokens > limit:
        return EngineRefusedError(
            f"prompt of {tokens} plus max_tokens of {request.max_tokens} exceeds {limit}; shorten one"
        )
    return None


class Scheduler:
    """Keeps who waits, who runs and whose replay is due; the engine does what `next_step` says."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._waiting: deque[str] = deque()
        self._running: list[str] = []
        self._scores: deque[str] = deque()
        self._requests: dict[str, EngineRequest | ScoreRequest] = {}
        self._last: StepKind | None = None
        self._steps_since_score = 0

    def refusal(self, request: EngineRequest | ScoreRequest) -> EngineError | None:
        """Say why a request cannot be taken now, or None; changes nothing."""
        if request.request_id in self._requests:
            return EngineRefusedError(
                f"request id {request.request_id!r} is already running; use a fresh one"
            )
        if (refusal := size_refusal(request, self.limits)) is not None:
            return refusal
        if isinstance(request, ScoreRequest):
            return self._score_refusal()
        if len(self._waiting) >= self.limits.max_queued:
            return EngineBusyError(
                f"{len(self._waiting)} requests already wait (limit {self.limits.max_queued}); retry"
            )
        return None

    def _score_refusal(self) -> EngineError | None:
        if len(self._scores) >= self.limits.max_scores:
            return EngineBusyError(
                f"{len(self._scores)} replays already wait (limit {self.limits.max_scores}); retry"
            )
        return None

    def add(self, request: EngineRequest | ScoreRequest) -> None:
        """Queue a request or a replay; raises what `refusal` would return."""
        if (refusal := self.refusal(request)) is not None:
            raise refusal
        self._requests[request.request_id] = request
        if isinstance(request, ScoreRequest):
            self._scores.append(request.request_id)
        else:
            self._waiting.append(request.request_id)

    def next_step(self) -> Step | None:
        """Choose the next piece of work and take it off its queue; None when there is nothing to do."""
        if self._is_score_due():
            return self._take(StepKind.SCORE, (self._scores.popleft(),))
        if self._can_prefill() and not (self._last is StepKind.PREFILL and self._running):
            request_id = self._waiting.popleft()
            self._running.append(request_id)
            return self._take(StepKind.PREFILL, (request_id,))
        if self._running:
            return self._take(StepKind.DECODE, tuple(self._running))
        return None

    def finish(self, request_id: str) -> None:
        """Forget a request wherever it is; unknown ids are fine, because a cancel may come twice."""
        self._requests.pop(request_id, None)
        if request_id in self._running:
            self._running.remove(request_id)
        for queue in (self._waiting, self._scores):
            if request_id in queue:
                queue.remove(request_id)

    def _can_prefill(self) -> bool:
        return bool(self._waiting) and len(self._running) < self.limits.max_running

    def _is_score_due(self) -> bool:
        is_idle = not self._running and not self._waiting
        return bool(self._scores) and (is_idle or self._steps_since_score >= self.limits.score_patience_steps)

    def _take(self, kind: StepKind, request_ids: tuple[str, ...]) -> Step:
        self._last = kind
        self._steps_since_score = 0 if kind is StepKind.SCORE else self._steps_since_score + 1
        return Step(kind, request_ids)
