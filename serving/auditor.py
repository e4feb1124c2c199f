"""Replays audited answers through dense (twice) and sparse (once) and writes the paired scores.

The queue is bounded and few replays run at a time, because users come first; engines run them when nobody
waits for an answer. What is refused or fails is written as missing or as an error, never left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from sentei.monitors.audit import KL_CAP_NATS, TokenScores, score_audit
from sentei.monitors.errors import AuditError
from sentei.monitors.records import AuditScore, AuditStatus
from sentei.serving.engine.request import DENSE_RUNG, ScoreRequest, ScoreResult
from sentei.serving.errors import EngineError, VariantError
from sentei.serving.ports import AuditJob, Variant
from sentei.serving.router import DENSE, SPARSE
from sentei.serving.writer import RecordWriter

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 180.0
AGAIN_CHUNK_TOKENS = 200  # not a multiple of any block size, so the second dense replay adds up differently


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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kl_cap_nats = kl_cap_nats  # by rollout id: the policy says it
        self._variants = variants
        self._writer = writer
        self._queue: asyncio.Queue[AuditJob] = asyncio.Queue(max_queued)
        self._concurrency = concurrency
        self._clock = clock
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
            self._writer.put(self._queue.get_nowait().score(AuditStatus.MISSING, self._clock()))

    async def submit(self, job: AuditJob) -> bool:
        """Queue a job; False when the queue is full. A new rollout's first job ends the old one's audits."""
        self._rollout_ids.setdefault(job.rollout_id)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            return False
        return True

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._queue.qsize()

    async def audit(self, job: AuditJob) -> AuditScore:
        """Replay one answer and score it; failures become the score's status."""
        try:
            dense = await self._replay(DENSE, job, "dense")
            again = await self._replay(DENSE, job, "again")
            sparse = await self._replay(SPARSE, job, "sparse")
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
            return job.score(AuditStatus.ERROR, self._clock())
        return job.score(
            AuditStatus.SCORED,
            self._clock(),
            dense_compute_s=dense.compute_s,
            sparse_compute_s=sparse.compute_s,
            **asdict(numbers),
        )

    async def _work(self) -> None:
        while True:
            job = await self._queue.get()
            if job.rollout_id != next(reversed(self._rollout_ids)):  # nobody decides by its score any more
                self._writer.put(job.score(AuditStatus.MISSING, self._clock()))
                continue
            try:
                self._writer.put(await self.audit(job))
            except asyncio.CancelledError:
                self._writer.put(job.score(AuditStatus.MISSING, self._clock()))
                raise
            except Exception:  # like the request handler: one job's surprise must not end the worker
                log.exception("audit of request %s broke", job.request_id)
                self._writer.put(job.score(AuditStatus.ERROR, self._clock()))

    async def _replay(self, variant: str, job: AuditJob, name: str) -> ScoreResult:
        """Teacher-force one answer, fed as it was served: the prompt, then token by token."""
        request = ScoreRequest(
            request_id=f"{job.request_id}/{name}",
            ids=(*job.prompt_ids, *job.served_ids),
            num_prompt=len(job.prompt_ids),
            rung_id=job.rung_id if variant == SPARSE else DENSE_RUNG,
            prompt_chunk_tokens=AGAIN_CHUNK_TOKENS if name == "again" else None,
            served_chunk_tokens=None if name == "again" else 1,
        )
        try:
            # Not wait_for: in Python 3.11 it swallows a cancellation that meets the result, and stop() hangs.
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                return await self._variants[variant].score(request)
        except TimeoutError as error:  # a handle without replicas waits for ever
            raise VariantError(variant, "timeout", f"no replay within {REPLAY_TIMEOUT_S:g} s") from error


def _token_scores(result: ScoreResult) -> TokenScores:
    return TokenScores.of(result.top_ids, result.top_logprobs)
