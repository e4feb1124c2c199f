"""What the ingress does with a request, free of HTTP: check it, assign it, answer it, write it down."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from typing import Any

from sentei.monitors.clock import SteadyClock
from sentei.monitors.errors import MonitorError
from sentei.monitors.records import ARTIFACT, AuditStatus, Missing, Outcome, RequestRecord
from sentei.policies.signals import RoutingTable
from sentei.serving.errors import RequestError, ServingError
from sentei.serving.front.admission import PromptDesk
from sentei.serving.front.journal import Journal, Ticket
from sentei.serving.ingress.account import arrival_of, audit_job_of, is_turned_away, record_of, sent_before
from sentei.serving.ingress.answer import Answerer, Delta, Progress, Question
from sentei.serving.ingress.choices import read_calls
from sentei.serving.ingress.draw import AuditBudget, AuditDraws, draw_audit
from sentei.serving.ingress.router import (
    DENSE,
    NO_SLICE,
    SPARSE,
    Assignment,
    Breaker,
    Lease,
    SeenUnits,
    assign,
)
from sentei.serving.ingress.writer import RecordWriter
from sentei.serving.metrics.counts import IngressCounts
from sentei.serving.metrics.names import Sample
from sentei.serving.metrics.sharing import SharedCounts
from sentei.serving.openai.requests import ChatRequest, GenerationRequest, TokenizeRequest, sampling_of
from sentei.serving.ports import AuditDesk, AuditJob, ModelCard, RecordStore, Tokenizer, Variant
from sentei.serving.settings import Limits
from sentei.serving.text.bounded import body_limit_bytes, longest_token_bytes
from sentei.serving.text.chat import template_of
from sentei.serving.text.pieces import TokenTexts
from sentei.serving.text.prompts import check_biases, check_ending, prompt_ids, room_for_answer, tokenize
from sentei.serving.text.schemas import SchemaChecker
from sentei.serving.text.tools import NO_TOOLS, ToolUse, tool_use
from sentei.serving.traces import ADMIT, ANSWER, NO_SPAN, OFF, QUEUE, ROUTE, Span, Tracer

log = logging.getLogger(__name__)

SESSION_HEADER, REQUEST_HEADER = "x-session-id", "x-request-id"
MAX_SESSION_CHARS, MAX_REQUEST_ID_CHARS = 256, 128
DESCRIBE_RETRY_S = 1.0
DESCRIBE_AGAIN_S = 5.0  # a replica that was replaced may run something else
DESK_EVERY_S = 0.5


class Gateway:
    """Holds what all requests share: variants, lease, breaker, tokenizer, records."""

    def __init__(
        self,
        variants: Mapping[str, Variant],
        store: RecordStore,
        *,
        tokenizer: Tokenizer,
        model_name: str,
        limits: Limits,
        desk: AuditDesk | None = None,
        note: str = "",
        user_key: bytes | None = None,
        created_s: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] | None = None,
        tracer: Tracer = OFF,
    ) -> None:
        self.variants = variants
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self.model_name = model_name
        self.limits = limits
        self.note = note  # why there is no sparse variant, where there is none
        self.lease = Lease()
        self.writer = RecordWriter(store, max_waiting=limits.max_unwritten_records)
        self.cards: dict[str, ModelCard] = {}
        self.created_s = int(time.time()) if created_s is None else created_s
        self._store = store
        self._user_key = user_key or secrets.token_bytes(32)
        self._desk = desk
        self._clock = clock
        self.now_s = now_s or SteadyClock()  # of records: all processes of a machine should share it
        self.counts = IngressCounts()
        self.tracer = tracer
        self.shared = SharedCounts(store, self.counts.process, self.count, now_s=self.now_s, clock=clock)
        self._draws, self._budget = AuditDraws(), AuditBudget(wait_s=limits.audit_wait_s)
        self._answerer = Answerer(variants, limits, Breaker())
        self._seen, self._seen_ids = SeenUnits(), SeenUnits()
        self._schemas = SchemaChecker()
        self._prompts = PromptDesk(threads=limits.tokenizer_threads, max_waiting=limits.max_concurrent)
        self._token_bytes = longest_token_bytes(tokenizer)
        self._reading = asyncio.Lock()
        self._in_flight = 0
        self._loops: list[asyncio.Task[None]] = []
        self._audits: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to poll the routing table, to ask the variants who they are, and to write records."""
        self.writer.start()
        self._loops = [asyncio.create_task(self._poll())]
        if self._desk is not None:
            self._loops.append(asyncio.create_task(self._watch(self._desk)))
        self._loops += [asyncio.create_task(self._introduce(name)) for name in self.variants]
        sharing = self.shared.run(lambda: self.counts.store_failed("share_counts"))
        self._loops.append(asyncio.create_task(sharing))

    async def stop(self) -> None:
        """Write what waits and end all tasks."""
        for task in self._loops:
            task.cancel()
        # Audits on their way are waited for: one that was lost must be written as missing.
        await asyncio.gather(*self._loops, *self._audits, return_exceptions=True)
        await self._schemas.stop()
        self._prompts.stop()
        await asyncio.to_thread(self.writer.stop)
        await asyncio.to_thread(self.tracer.stop)
        with suppress(MonitorError):  # the last counts are seen for a while after this ingress has gone
            await asyncio.to_thread(self.shared.write)

    def body_limit_bytes(self) -> int:
        """Return how long a body may be: by the setting, and by what a prompt of this model can need."""
        limit_bytes, card = self.limits.max_body_bytes, self.cards.get(DENSE)
        if card is None:
            return limit_bytes
        return body_limit_bytes(limit_bytes, card.max_context_tokens, self._token_bytes)

    def readiness(self) -> dict[str, Any]:
        """Say whether requests can be answered, by whom, and how the records fare."""
        return {
            "ready": DENSE in self.cards,
            "mode": "dense_and_sparse" if SPARSE in self.variants else "dense_only",
            "note": self.note,
            "variants": {name: name in self.cards for name in self.variants},
            "lease_is_fresh": self.lease.is_fresh(self._clock()),
            "routing": self.lease.stamp(self._clock()),
            "artifact": {"runs": self._artifact(), "bound": self.lease.artifact()},
            "records": {
                "written": self.writer.written,
                "waiting": self.writer.waiting,
                "dropped": self.writer.dropped,
            },
        }

    def count(self) -> list[Sample]:
        """Return all that this ingress has counted, and how it fares now."""
        whose = {"process": self.counts.process}
        now = {
            "sentei_records_written_total": self.writer.written,
            "sentei_records_dropped_total": self.writer.dropped,
            "sentei_records_waiting": self.writer.waiting,
            "sentei_lease_is_fresh": int(self._obeyed(self._clock()) is not None),
        }
        errors = {**whose, "operation": "write_record"}
        return [
            *self.counts.samples(),
            *((name, whose, float(value)) for name, value in now.items()),
            ("sentei_store_errors_total", errors, float(self.writer.num_errors)),
        ]

    async def read_routing_once(self) -> None:
        """Look at the routing table once; a store that cannot be read lets the lease run out.

        One read at a time: an older one that ended after a newer one would bring the older table back, and
        with it a share that an abort has just taken away.
        """
        async with self._reading:
            now_s = self._clock()  # before the read: what comes back may be older, never younger
            found = await asyncio.to_thread(self._store.read_routing)
            if found is not None:
                self.lease.observe(*found, now_s)

    async def introduce_once(self, name: str) -> None:
        """Ask one variant who it is; what sparse runs is written down for the controller."""
        before = self.cards.get(name)
        card = self.cards[name] = await self.variants[name].describe()
        if name == SPARSE and (before is None or before.artifact != card.artifact):
            await asyncio.to_thread(self._store.save_value, ARTIFACT, card.artifact)

    async def check(
        self,
        request: GenerationRequest,
        headers: Mapping[str, str],
        *,
        num_bytes: int = 0,
        journal: Journal | None = None,
        body_sha256: str = "",
        span: Span = NO_SPAN,
    ) -> tuple[Question, ...]:
        """Turn a parsed request into its questions, one for each wanted answer; raises RequestError.

        All have one unit and one assignment, and the first alone is audited: the unit is what counts. With a
        journal they are those of an ingress that is gone, as far as it had answered them; its ticket must be
        of this body. What sparse began goes on on sparse only where a new request would go there, too.
        """
        ticket = None if journal is None else Ticket.check(journal.ticket, self._user_key, body_sha256)
        card = self._card(request.model)
        use = self._tool_use(request)
        check_biases(request, card)
        check_ending(request, use)
        sampling = sampling_of(request, card.sampling, fallback_seed=secrets.randbits(31))
        if use.must_call:
            sampling = replace(sampling, json_schema=use.schema())
        if sampling.json_schema is not None:
            await self._schemas.check(sampling.json_schema)
        ids = await self._prompts.run(num_bytes, prompt_ids, request, use, self.tokenizer, card)
        max_tokens = room_for_answer(request, len(ids), card, self.limits.default_max_tokens)
        span.child(ADMIT, since_s=span.began_s, prompt_tokens=len(ids)).end()
        if ticket is not None:
            span.link(ticket.traceparent)
        with span.child(ROUTE) as deciding:
            ticket = ticket or self._ticket(headers, request.user, len(ids), sampling.seed)
            assignment = Assignment(**ticket.assignment)
            deciding.say(**_said_of(assignment))
        first = Question(
            request_id=ticket.request_id,
            unit=ticket.unit,
            prompt_ids=ids,
            max_tokens=max_tokens,
            sampling=replace(sampling, seed=ticket.seed),
            stops=request.stops(),
            stop_ids=frozenset() if request.ignore_eos else frozenset(card.eos_ids),
            assignment=assignment,
            tools=use,
            is_resumed=journal is not None,
            is_stopped=journal is not None and self._is_stopped(assignment, len(ids), ticket.unit),
            span=span,
        )
        questions = (first, *(self._sibling(first, i) for i in range(1, request.num_choices())))
        if journal is None:
            return questions
        sent = {index: sent_before(choice, ticket, self.now_s()) for index, choice in journal.choices.items()}
        return tuple(replace(item, sent=sent.get(index)) for index, item in enumerate(questions))

    def sign(self, question: Question, progress: Progress, body_sha256: str) -> str:
        """Return the ticket with which another ingress can take an answer up whose first token is there."""
        ticket = Ticket(
            request_id=question.request_id,
            unit=question.unit,
            seed=question.sampling.seed,
            assignment=asdict(question.assignment),
            body_sha256=body_sha256,
            ttft_s=(progress.ttft_ms() or 0.0) / 1e3,
            first_at_s=self.now_s(),
            traceparent=progress.span.traceparent,
        )
        return ticket.sign(self._user_key)

    async def tokenize(self, request: TokenizeRequest, *, num_bytes: int = 0) -> dict[str, Any]:
        """Return a prompt's ids, and how long prompt and answer may be together."""
        card = self._card(self.model_name if request.model is None else request.model)
        ids = await self._prompts.run(num_bytes, tokenize, request, self.tokenizer, card)
        return {"count": len(ids), "max_model_len": card.max_context_tokens, "tokens": list(ids)}

    def _ticket(self, headers: Mapping[str, str], user: str | None, num_tokens: int, seed: int) -> Ticket:
        request_id = self._request_id(headers.get(REQUEST_HEADER, ""))
        unit = session_unit(headers, user, request_id, user_key=self._user_key)
        return Ticket(request_id, unit, seed, asdict(self._assign(num_tokens, unit)))

    def begin(self, questions: Sequence[Question]) -> list[tuple[Progress, AsyncGenerator[Delta, None]]]:
        """Start answers; raises RequestError when too many run. Each one's record is written when it ends."""
        if self._in_flight + len(questions) > self.limits.max_concurrent:
            for question in questions:
                self._give_back_audit(question)
            raise RequestError(
                f"{self._in_flight} requests are in flight (limit {self.limits.max_concurrent}); retry later",
                status=429,
                code="overloaded",
                retry_after_s=1,
            )
        return [self._begin_one(question) for question in questions]

    def _begin_one(self, question: Question) -> tuple[Progress, AsyncGenerator[Delta, None]]:
        progress = self._answerer.begin(question)
        progress.span = question.span.child(ANSWER, request_id=question.request_id)
        deltas, reader = self._run(question, progress), question.tools.reader()
        return progress, deltas if reader is None else read_calls(deltas, reader)

    def _tool_use(self, request: GenerationRequest) -> ToolUse:
        if not isinstance(request, ChatRequest):
            return NO_TOOLS
        return tool_use(request, template_of(self.tokenizer))

    def _sibling(self, first: Question, index: int) -> Question:
        """Return the question of another answer to the same request: its own id, its own seed."""
        return replace(
            first,
            request_id=self._request_id(f"{first.request_id}.{index}"),
            sampling=replace(first.sampling, seed=first.sampling.seed + index),
            assignment=replace(first.assignment, is_audited=False, audit_probability=0.0),
        )

    async def _run(self, question: Question, progress: Progress) -> AsyncGenerator[Delta, None]:
        self._in_flight += 1
        is_done = False
        try:
            async with aclosing(self._answerer.deltas(question, progress, self.tokenizer)) as deltas:
                async for delta in deltas:
                    is_done = delta.finish_reason is not None
                    yield delta
        except (GeneratorExit, asyncio.CancelledError):
            if not is_done:
                progress.outcome = Outcome.CANCELLED
            raise
        except RequestError as error:
            # A request that nobody could answer says nothing of the variant that was asked.
            is_callers = error.status < 500 and error.status != 429
            progress.is_turned_away = is_turned_away(error, progress)
            if progress.outcome is not Outcome.UNANSWERABLE:
                progress.outcome = Outcome.REFUSED if is_callers else Outcome.FAILED
            progress.error = progress.error or error.message
            raise
        except Exception as error:  # the request handler: log, count as failed, answer with an error
            log.exception("request %s failed", question.request_id)
            progress.outcome, progress.error = Outcome.FAILED, f"{type(error).__name__}: {error}"
            raise RequestError("internal error; see the server's log", status=500) from error
        finally:
            self._in_flight -= 1
            self._write_down(question, progress)

    def _write_down(self, question: Question, progress: Progress) -> None:
        total_ms = (time.monotonic() - progress.began_s) * 1e3
        if progress.is_turned_away and question.assignment.is_audited:
            self._give_back_audit(question)
            question = replace(question, assignment=replace(question.assignment, is_audited=False))
        record = record_of(question, progress, at_s=self.now_s(), total_ms=total_ms)
        self.writer.put(record)
        _end_span(record, progress, is_resumed=question.is_resumed)
        self.counts.end(
            record,
            failed_by=progress.failed_by,
            queue_s=progress.queue_s(),
            attention=progress.attention,
        )
        if not question.assignment.is_audited:
            return
        job = audit_job_of(question, progress, self.limits.audit_max_tokens)
        if self._desk is None or not job.served_ids:
            self._give_back_audit(question)
            self._miss(job, Missing.NO_TOKENS if self._desk is not None else Missing.NO_AUDITOR)
            return
        task = asyncio.get_running_loop().create_task(self._submit_audit(self._desk, job))
        self._audits.add(task)
        task.add_done_callback(self._audits.discard)

    def _give_back_audit(self, question: Question) -> None:
        """Give back what this ingress took for a question; for a resumed one another ingress took it."""
        if question.assignment.is_audited and not question.is_resumed:
            self._budget.give_back()

    async def _submit_audit(self, desk: AuditDesk, job: AuditJob) -> None:
        if (refusal := await desk.submit(job)) is not None:
            log.warning("audit of request %s was not taken: %s", job.request_id, refusal)
            self._miss(job, refusal)

    def _miss(self, job: AuditJob, reason: Missing) -> None:
        self.writer.put(job.score(AuditStatus.MISSING, self.now_s(), reason=reason.value))

    def _request_id(self, wanted: str) -> str:
        """Keep the caller's (or the proxy's) request id if it is usable and new: records are kept by it."""
        is_usable = 0 < len(wanted) <= MAX_REQUEST_ID_CHARS and wanted.isascii() and wanted.isprintable()
        return wanted if is_usable and self._seen_ids.add(wanted) else f"req-{uuid.uuid4().hex}"

    def _assign(self, prompt_tokens: int, unit: str) -> Assignment:
        now_s = self._clock()
        assigned = assign(self._obeyed(now_s), prompt_tokens=prompt_tokens, unit=unit)
        is_of_rollout = bool(assigned.rollout_id) and assigned.slice_id != NO_SLICE
        if is_of_rollout and self._seen.add((assigned.rollout_id, assigned.slice_id, unit)):
            self.writer.put(arrival_of(assigned, unit, at_s=self.now_s()))
        return draw_audit(assigned, unit, draws=self._draws, budget=self._budget, now_s=now_s)

    def _is_stopped(self, begun: Assignment, prompt_tokens: int, unit: str) -> bool:
        """Whether sparse may not go on with what another ingress began: a new request would go elsewhere."""
        now = assign(self._obeyed(self._clock()), prompt_tokens=prompt_tokens, unit=unit)
        places = [(each.variant, each.rollout_id, each.rung_id, each.artifact) for each in (begun, now)]
        return begun.variant == SPARSE and places[0] != places[1]

    def _obeyed(self, now_s: float) -> RoutingTable | None:
        """Return the table, unless its lease ran out or sparse runs something else than what was proven."""
        table = self.lease.table(now_s) if SPARSE in self.variants else None
        return None if table is None or (table.artifact and table.artifact != self._artifact()) else table

    def _artifact(self) -> str:
        card = self.cards.get(SPARSE)
        return card.artifact if card is not None else ""

    def _card(self, model: str) -> ModelCard:
        if model != self.model_name:
            raise RequestError(
                f"model {model[:80]!r} does not exist; this server has {self.model_name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )
        if (card := self.cards.get(DENSE)) is None:
            raise RequestError(
                "the model is still loading; retry soon", status=503, code="loading", retry_after_s=2
            )
        return card

    async def _poll(self) -> None:
        while True:
            try:
                await self.read_routing_once()
            except Exception as error:  # the store may be away for a while: the lease takes care
                log.warning("routing table could not be read: %s", error)
                self.counts.store_failed("read_routing")
            await asyncio.sleep(self.limits.poll_every_s)

    async def _watch(self, desk: AuditDesk) -> None:
        while True:
            load = await desk.load()
            self._budget.observe(load, self._clock())
            await asyncio.sleep(DESK_EVERY_S)

    async def _introduce(self, name: str) -> None:
        while True:
            try:
                await self.introduce_once(name)
            except (ServingError, MonitorError) as error:
                log.info("variant %s does not say what it runs: %s", name, error)
            is_known = name in self.cards
            if is_known and name == DENSE:
                return
            await asyncio.sleep(DESCRIBE_AGAIN_S if is_known else DESCRIBE_RETRY_S)


def _said_of(assigned: Assignment) -> dict[str, Any]:
    """What a span says of a decision: never of whom it was."""
    return {
        "rollout_id": assigned.rollout_id or None,
        "variant": assigned.variant,
        "slice_id": assigned.slice_id,
        "rung_id": assigned.serving_rung_id,
        "share": assigned.share,
        "reason": assigned.reason,
        "is_audited": assigned.is_audited,
    }


def _end_span(record: RequestRecord, progress: Progress, *, is_resumed: bool) -> None:
    """End the span of an answer with what its record says, but for whose it was and an error's words."""
    span, queue_s = progress.span, progress.queue_s()
    if queue_s is not None:
        span.child(QUEUE, since_s=progress.began_s).end(at_s=progress.began_s + queue_s)
    span.say(
        variant=record.variant_assigned,
        variant_served=record.variant_served,
        slice_id=record.slice_id,
        rung_id=record.rung_id,
        outcome=record.outcome,
        reason=progress.failed_by or None,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        compute_s=record.compute_s,
        is_audited=record.chosen_for_audit,
        is_resumed=is_resumed,
    )
    span.end(is_ok=record.outcome not in (Outcome.FAILED, Outcome.UNANSWERABLE))


def session_unit(
    headers: Mapping[str, str], user: str | None, request_id: str, *, user_key: bytes = b""
) -> str:
    """Return the statistical unit: session if named, else user, else API key, else the request itself."""
    session = headers.get(SESSION_HEADER)
    is_plain = session is None or (session.isascii() and session.isprintable())
    if session is not None and not (is_plain and 0 < len(session) <= MAX_SESSION_CHARS):
        raise RequestError(
            f"header {SESSION_HEADER} has {len(session)} characters; send 1 to {MAX_SESSION_CHARS}, "
            "printable and of ASCII",
            code="invalid_value",
            param=SESSION_HEADER,
        )
    if session:
        return session
    if user:  # often an e-mail address: what is written down tells people apart, and nobody's name
        return f"user-{hmac.new(user_key, user.encode(errors='surrogatepass'), 'sha256').hexdigest()[:32]}"
    key = headers.get("authorization", "").removeprefix("Bearer ").strip()
    with suppress(UnicodeEncodeError):
        return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else request_id
    return request_id
