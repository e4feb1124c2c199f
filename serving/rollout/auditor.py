"""Replays audited answers through dense (twice) and sparse (once) and writes the paired scores.

The queue is bounded and few replays run at a time, because users come first; engines run them when nobody
waits for an answer. The ingress draws no more than can be replayed in time (`draw.AuditBudget`); what waits
too long all the same is given up, so that replays are of news. What is refused, given up or fails is written
as missing or as an error with its reason, never left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from sentei.monitors.audit import KL_CAP_NATS, TokenScores, score_audit
from sentei.monitors.clock import SteadyClock
from sentei.monitors.errors import AuditError
from sentei.monitors.records import AuditScore, AuditStatus, Missing
from sentei.serving.engine.request import DENSE_RUNG, ScoreRequest, ScoreResult
from sentei.serving.errors import EngineError, VariantError
from sentei.serving.ingress.router import DENSE, SPARSE
from sentei.serving.ingress.writer import RecordWriter
from sentei.serving.ports import AuditJob, AuditLoad, Variant
from sentei.serving.traces import AUDIT, OFF, REPLAY, Span, Tracer

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 180.0
MAX_WAIT_S = 45.0  # older jobs are given up: the controller counts them as missing after a minute
NUM_RECENT_JOBS = 5  # whose mean says how long the next one takes
MAX_REASON_CHARS = 200
FIRST_JOB_S = 1.0  # what a job is taken to need before one was done
# The second dense replay starts so much later: by then Serve mostly counts the first one, and picks another
# replica.
AGAIN_AFTER_S = 0.05
# The second dense replay takes its prompt in chunks, so that it adds up differently. A chunk reads all that
# came before it: 8,064 tokens of SmolLM2 in chunks of 200 took 4.3 times the seconds of one piece.
AGAIN_CHUNK_TOKENS = 200  # at least; longer prompts are cut into so many
AGAIN_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: AuditJob
    since_s: float  # on a monotonic clock


class Auditor:
    """Takes jobs, replays them, writes scores."""

    def __init__(
        self,
        variants: Mapping[str, Variant],
        writer: RecordWriter,
        *,
        max_queued: int = 256,
        concurrency: int = 1,
        kl_cap_nats: Callable[[str], float] = lambda _: KL_CAP_NATS,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        tracer: Tracer = OFF,
    ) -> None:
        self._kl_cap_nats = kl_cap_nats  # by rollout id: the policy says it
        self._variants = variants
        self._writer = writer
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_queued)
        self._concurrency = concurrency
        self._clock = clock or SteadyClock()
        self._monotonic = monotonic
        self._tracer = tracer
        self._job_s = FIRST_JOB_S  # mean of the newest jobs
        self._running = 0
        self._workers: list[asyncio.Task[None]] = []
        self._rollout_ids: dict[str, None] = {}  # in the order in which they were first seen

    def start(self) -> None:
        """Start the workers; needs a running event loop."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._concurrency)]

    async def stop(self) -> None:
        """Stop the workers; what waits is written as missing."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while not self._queue.empty():
            self._miss(self._queue.get_nowait().job, Missing.STOPPED)

    async def submit(self, job: AuditJob) -> Missing | None:
        """Queue a job; QUEUE_FULL if it cannot. A new rollout's first job ends the old one's audits."""
        self._rollout_ids.setdefault(job.rollout_id)
        try:
            self._queue.put_nowait(_Waiting(job, self._monotonic()))
        except asyncio.QueueFull:
            return Missing.QUEUE_FULL
        return None

    async def load(self) -> AuditLoad:
        """Say how much is to be done, and how fast that goes."""
        return AuditLoad(self._queue.qsize() + self._running, self._concurrency / self._job_s)

    async def audit(self, job: AuditJob) -> AuditScore:
        """Replay one answer and score it; failures become the score's status."""
        with self._span(job) as span:
            score = await self._score(job, span)
            span.say(audit_status=score.status)
        return score

    def _span(self, job: AuditJob) -> Span:
        return self._tracer.follow(
            AUDIT,
            job.traceparent,
            request_id=job.request_id,
            rollout_id=job.rollout_id,
            slice_id=job.slice_id,
            rung_id=job.rung_id,
            variant_served=job.variant_served,
            audited_tokens=len(job.served_ids),
        )

    async def _score(self, job: AuditJob, span: Span) -> AuditScore:
        try:
            dense, again, sparse = await self._replay_all(job, span)
            numbers = score_audit(
                job.served_ids,
                _token_scores(dense),
                dense_again=_token_scores(again),
                sparse=_token_scores(sparse),
                kl_cap_nats=self._kl_cap_nats(job.rollout_id),
                dropped_mass=sparse.dropped_mass,
            )
        except (EngineError, VariantError, AuditError) as error:
            log.warning("audit of request %s failed: %s", job.request_id, error)
            return job.score(AuditStatus.ERROR, self._clock(), reason=str(error)[:MAX_REASON_CHARS])
        return job.score(
            AuditStatus.SCORED,
            self._clock(),
            dense_compute_s=dense.compute_s,
            sparse_compute_s=sparse.compute_s,
            artifact=sparse.artifact,
            **asdict(numbers),
        )

    async def _work(self) -> None:
        while True:
            waiting = await self._queue.get()
            job, began_s = waiting.job, self._monotonic()
            if job.rollout_id != next(reversed(self._rollout_ids)):  # nobody decides by its score any more
                self._miss(job, Missing.ROLLOUT_ENDED)
                continue
            if began_s - waiting.since_s > MAX_WAIT_S:
                self._miss(job, Missing.EXPIRED)
                continue
            self._running += 1
            try:
                self._writer.put(await self.audit(job))
            except asyncio.CancelledError:
                self._miss(job, Missing.STOPPED)
                raise
            except Exception as error:  # like the request handler: one job's surprise must not end the worker
                log.exception("audit of request %s broke", job.request_id)
                self._writer.put(job.score(AuditStatus.ERROR, self._clock(), reason=type(error).__name__))
            finally:
                self._running -= 1
                self._job_s += (self._monotonic() - began_s - self._job_s) / NUM_RECENT_JOBS

    def _miss(self, job: AuditJob, reason: Missing) -> None:
        span = self._span(job)
        span.say(audit_status=AuditStatus.MISSING, reason=reason)
        span.end()
        self._writer.put(job.score(AuditStatus.MISSING, self._clock(), reason=reason.value))

    async def _replay_all(self, job: AuditJob, span: Span) -> tuple[ScoreResult, ScoreResult, ScoreResult]:
        """Replay through dense twice and sparse once, side by side; the first failure ends the others."""
        names = ((DENSE, "dense"), (DENSE, "again"), (SPARSE, "sparse"))
        tasks = [asyncio.create_task(self._replay(variant, job, name, span)) for variant, name in names]
        try:
            dense, again, sparse = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return dense, again, sparse

    async def _replay(self, variant: str, job: AuditJob, name: str, span: Span) -> ScoreResult:
        """Teacher-force the span, fed as it was served: what came before it, then token by token."""
        before = (*job.prompt_ids, *job.earlier_ids)
        request = ScoreRequest(
            request_id=f"{job.request_id}/{name}",
            ids=(*before, *job.served_ids),
            num_prompt=len(before),
            num_earlier=len(job.earlier_ids),
            rung_id=job.rung_id if variant == SPARSE else DENSE_RUNG,
            prompt_chunk_tokens=_again_chunk(len(before)) if name == "again" else None,
            served_chunk_tokens=None if name == "again" else 1,
            artifact=job.artifact if variant == SPARSE else "",
        )
        if name == "again":
            await asyncio.sleep(AGAIN_AFTER_S)
        with span.child(REPLAY, replay=name, variant=variant, rung_id=request.rung_id) as replaying:
            request = replace(request, traceparent=replaying.traceparent)
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets the result: stop() hangs.
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    return await self._variants[variant].score(request)
            except TimeoutError as error:  # a handle without replicas waits for ever
                raise VariantError(variant, "timeout", f"no replay within {REPLAY_TIMEOUT_S:g} s") from error


def _again_chunk(num_tokens: int) -> int:
    """Return the size of a chunk: odd, so that it is a multiple of no block's and cuts where none ends."""
    return max(AGAIN_CHUNK_TOKENS, num_tokens // AGAIN_CHUNKS) | 1


def _token_scores(result: ScoreResult) -> TokenScores:
    return TokenScores.of(result.top_ids, result.top_logprobs)
