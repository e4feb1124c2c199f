"""One answer: tokens from the assigned variant, or from dense when that fails, also in the middle."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from sentei.monitors.records import Outcome
from sentei.serving.engine.request import (
    DENSE_RUNG,
    EngineRequest,
    FinishReason,
    Sampling,
    TokenChunk,
    TokenLogprob,
)
from sentei.serving.errors import (
    EngineBusyError,
    EngineRefusedError,
    GrammarError,
    RequestError,
    VariantError,
)
from sentei.serving.ingress.router import DENSE, SPARSE, Assignment, Breaker
from sentei.serving.ports import Tokenizer, Variant
from sentei.serving.settings import Limits
from sentei.serving.text.pieces import Detokenizer, StopScanner, ToolCall
from sentei.serving.text.tools import NO_TOOLS, ToolUse
from sentei.serving.traces import NO_SPAN, TRY, Span

log = logging.getLogger(__name__)

MAX_TRIES = 4
REQUESTS_OWN = frozenset({"nan_logits", "error", "empty"})  # failures of dense that come with the request


@dataclass(frozen=True, slots=True)
class Sent:
    """The beginning of an answer that a client has already, from an ingress that is gone."""

    ids: tuple[int, ...]
    finish_reason: FinishReason | None
    ttft_s: float
    ago_s: float  # since its first token
    compute_s: float = 0.0  # model time that it took there


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request: all that is needed to answer it."""

    request_id: str
    unit: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stop_ids: frozenset[int]
    assignment: Assignment
    tools: ToolUse = NO_TOOLS
    sent: Sent | None = None  # what another ingress sent of the answer before it went away
    is_resumed: bool = False  # another ingress began it, and drew its audit
    is_stopped: bool = False  # since then its rollout was stopped, so dense goes on
    span: Span = NO_SPAN  # of the request


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer, ready to be sent; the last one has a finish reason."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()  # of each log-probability's token: characters of the answer before it
    finish_reason: FinishReason | None = None
    calls: tuple[ToolCall, ...] = ()
    num_tokens: int = 0  # of the answer so far, this piece included
    was_sent: bool = False  # the client has it already


@dataclass(slots=True)
class Progress:
    """How far an answer has come; the record of the request is made of it."""

    variant: str
    rung_id: str
    began_s: float
    ids: list[int] = field(default_factory=list)
    outcome: Outcome = Outcome.OK
    error: str = ""
    failed_by: str = ""  # of the newest failed try: its reason
    is_turned_away: bool = False  # nobody answered, and nobody failed
    first_at_s: float | None = None
    last_at_s: float | None = None
    compute_s: float = 0.0
    first_compute_s: float | None = None  # model time up to the first token; None: another ingress sent it
    attention: dict[str, Any] | None = None  # what a thinned answer's attention kept, bounded
    span: Span = NO_SPAN  # of this answer

    def note_failure(self, error: VariantError) -> None:
        """Remember that a try failed; what comes now is a fallback."""
        self.outcome = Outcome.FALLBACK_MID if self.ids else Outcome.FALLBACK_BEFORE
        self.error, self.failed_by = str(error), error.reason

    def note_tokens(self, ids: Sequence[int], now_s: float) -> None:
        """Count new tokens."""
        self.ids += ids
        self.first_at_s = self.first_at_s if self.first_at_s is not None else now_s
        self.last_at_s = now_s

    def ttft_ms(self) -> float | None:
        """Return the time to the first token."""
        return None if self.first_at_s is None else (self.first_at_s - self.began_s) * 1e3

    def queue_s(self) -> float | None:
        """Return the part of the time to the first token in which the model did not work for it."""
        if self.first_at_s is None or self.first_compute_s is None:
            return None
        return max(0.0, self.first_at_s - self.began_s - self.first_compute_s)

    def tpot_ms(self) -> float | None:
        """Return the mean time per token after the first."""
        if self.first_at_s is None or self.last_at_s is None or len(self.ids) < 2:
            return None
        return (self.last_at_s - self.first_at_s) * 1e3 / (len(self.ids) - 1)


class Answerer:
    """Gets answers from variants; one instance serves all requests of an ingress."""

    def __init__(self, variants: Mapping[str, Variant], limits: Limits, breaker: Breaker) -> None:
        self._variants = variants
        self._limits = limits
        self._breaker = breaker
        self._own = uuid.uuid4().hex[:8]  # an engine may still be busy with a try of an ingress that is gone

    def begin(self, question: Question) -> Progress:
        """Start the account of one answer."""
        assigned, now_s = question.assignment, time.monotonic()
        progress = Progress(assigned.variant, assigned.serving_rung_id, now_s)
        if (sent := question.sent) is not None:
            progress.note_tokens(sent.ids, now_s - sent.ago_s)
            progress.began_s = now_s - sent.ago_s - sent.ttft_s
            progress.compute_s = sent.compute_s
        return progress

    async def deltas(
        self, question: Question, progress: Progress, tokenizer: Tokenizer
    ) -> AsyncGenerator[Delta, None]:
        """Yield the answer as text; stop strings end it, and half characters wait for their rest."""
        detokenizer, scanner = Detokenizer(tokenizer), StopScanner(question.stops)
        if (sent := question.sent) is not None:
            text = "".join(scanner.add(detokenizer.add([token_id])) for token_id in sent.ids)
            num_sent = len(sent.ids)
            yield Delta(text, finish_reason=sent.finish_reason, num_tokens=num_sent, was_sent=True)
            if sent.finish_reason is not None:
                return
            if num_sent >= question.max_tokens:  # an engine that says its last token before its end
                text = scanner.add(detokenizer.flush()) + scanner.flush()
                yield Delta(text, finish_reason=FinishReason.LENGTH, num_tokens=num_sent)
                return
        async with aclosing(self._tokens(question, progress)) as chunks:
            async for chunk in chunks:
                offsets, text = list[int](), ""
                for token_id in chunk.ids:
                    offsets.append(detokenizer.num_chars)
                    text += scanner.add(detokenizer.add([token_id]))
                if chunk.finish_reason is not None and not scanner.has_stopped:
                    text += scanner.add(detokenizer.flush())
                    text += "" if scanner.has_stopped else scanner.flush()
                finish = FinishReason.STOP if scanner.has_stopped else chunk.finish_reason
                kept = tuple(offsets[: len(chunk.logprobs)])
                yield Delta(text, chunk.logprobs, kept, finish, num_tokens=len(progress.ids))
                if finish is not None:
                    return

    async def _tokens(self, question: Question, progress: Progress) -> AsyncGenerator[TokenChunk, None]:
        """Yield token chunks: one try on the assigned variant, then dense; again where a replica of it dies.

        Each further try goes on behind what was sent, so replicas may die one after the other. A request that
        gains nothing by a try is not tried on and on: it may be what they die of.
        """
        for i_try in range(MAX_TRIES):
            num_before = len(progress.ids)
            name = question.assignment.variant if i_try == 0 and not question.is_stopped else DENSE
            if name == SPARSE and self._breaker.is_open(time.monotonic()):
                progress.note_failure(VariantError(SPARSE, "breaker_open"))
                continue
            try:
                async with aclosing(self._try(name, question, progress)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except VariantError as error:
                self._note_failure(error, question, progress)
                has_gained = i_try == 0 or len(progress.ids) > num_before
                is_worth_another = name == SPARSE or (error.reason == "crash" and has_gained)
                if not is_worth_another or i_try + 1 == MAX_TRIES:
                    if name == DENSE and error.reason in REQUESTS_OWN:
                        progress.outcome = Outcome.UNANSWERABLE
                    raise RequestError(
                        f"no variant could answer ({error.reason}); try again", status=503, code="overloaded"
                    ) from error

    def _note_failure(self, error: VariantError, question: Question, progress: Progress) -> None:
        log.warning("request %s after %d tokens: %s", question.request_id, len(progress.ids), error)
        if error.variant == SPARSE:
            self._breaker.record(is_ok=False, unit=question.unit, now_s=time.monotonic())
        progress.note_failure(error)

    async def _try(
        self, name: str, question: Question, progress: Progress
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yield what one variant gives, going on behind what was sent; every failure is a VariantError."""
        progress.variant = name
        progress.rung_id = question.assignment.rung_id if name == SPARSE else DENSE_RUNG
        spent_s, has_token = progress.compute_s, False
        with progress.span.child(TRY, variant=name, rung_id=progress.rung_id) as span:
            request = _engine_request(question, progress, self._own, span.traceparent)
            async with aclosing(self._generate(name, request)) as chunks:
                while True:
                    chunk = await self._next(chunks, name, is_first=not has_token)
                    if name == SPARSE and not progress.ids and not chunk.ids and chunk.finish_reason:
                        raise VariantError(name, "empty")
                    has_token = True
                    self._note_chunk(chunk, name, question, progress, spent_s=spent_s)
                    yield chunk
                    if chunk.finish_reason is not None:
                        return

    def _note_chunk(
        self, chunk: TokenChunk, name: str, question: Question, progress: Progress, *, spent_s: float
    ) -> None:
        """Count what came; `spent_s` is the model time of the tries before this one."""
        progress.compute_s = spent_s + chunk.compute_s
        if progress.first_at_s is None:
            progress.first_compute_s = progress.compute_s
        progress.note_tokens(chunk.ids, time.monotonic())
        if chunk.attention is not None:
            progress.attention = chunk.attention.to_dict(self._limits.attention_record_bytes)
        if name == SPARSE and chunk.finish_reason is not None:
            self._breaker.record(is_ok=True, unit=question.unit, now_s=time.monotonic())

    async def _generate(self, name: str, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        try:
            async with aclosing(self._variants[name].generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except EngineBusyError as error:
            if name == SPARSE:
                raise VariantError(name, "busy", str(error)) from error
            raise RequestError(str(error), status=429, code="overloaded", retry_after_s=1) from error
        except EngineRefusedError as error:
            if name == SPARSE:
                raise VariantError(name, "refused", str(error)) from error
            raise RequestError(str(error), code="invalid_value") from error
        except GrammarError as error:  # the caller's schema: dense could not follow it either
            raise RequestError(str(error), code="invalid_value", param="response_format") from error

    async def _next(
        self, chunks: AsyncGenerator[TokenChunk, None], name: str, *, is_first: bool
    ) -> TokenChunk:
        limit_s = self._limits.first_token_timeout_s if is_first else self._limits.token_timeout_s
        try:
            chunk = await asyncio.wait_for(anext(chunks, None), limit_s)
        except TimeoutError as error:
            what = "first token" if is_first else "next token"
            raise VariantError(name, "timeout", f"no {what} within {limit_s:g} s") from error
        if chunk is None:
            raise VariantError(name, "crash", "the stream ended without a finish reason")
        return chunk


def _engine_request(question: Question, progress: Progress, own: str, traceparent: str) -> EngineRequest:
    request = EngineRequest(
        # A try of its own: the failed one may still be on its way out of the same engine.
        request_id=f"{question.request_id}/{progress.variant}/{len(progress.ids)}/{progress.outcome}/{own}",
        prompt_ids=question.prompt_ids,
        max_tokens=question.max_tokens,
        rung_id=progress.rung_id,
        sampling=question.sampling,
        stop_ids=question.stop_ids,
        artifact=question.assignment.artifact if progress.variant == SPARSE else "",
        traceparent=traceparent,
    )
    return replace(request, sent_ids=tuple(progress.ids))
