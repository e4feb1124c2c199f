"""Audits: what is replayed, how it is scored, and what becomes of failures."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sentei.monitors.records import AuditStatus, Missing
from sentei.serving.engine.request import ScoreResult
from sentei.serving.errors import EngineBusyError
from sentei.serving.ingress.writer import RecordWriter
from sentei.serving.ports import AuditJob, AuditLoad
from sentei.serving.rollout.auditor import AGAIN_AFTER_S, Auditor
from tests.fakes_serving import FakeClock, FakeStore, FakeVariant, crash, perfect_scores

SERVED = (10, 11, 12, 13)


def job(name: str = "a", *, served: tuple[int, ...] = SERVED, rollout_id: str = "r1") -> AuditJob:
    """An answer that dense served."""
    return AuditJob(name, "session", rollout_id, "long", "medium", "dense", (1, 2, 3), served)


def make_auditor(
    sparse: FakeVariant | None = None, *, max_queued: int = 4
) -> tuple[Auditor, FakeVariant, FakeVariant, FakeStore]:
    """An auditor over fakes, with the fakes."""
    dense, sparse = FakeVariant("dense"), sparse or FakeVariant("sparse")
    store = FakeStore()
    auditor = Auditor({"dense": dense, "sparse": sparse}, RecordWriter(store), max_queued=max_queued)
    return auditor, dense, sparse, store


def disagreeing(served: tuple[int, ...], *, at: int) -> ScoreResult:
    """Scores of a model that would have said something else at one position."""
    other = tuple(99 if i == at else token for i, token in enumerate(served))
    return perfect_scores(other, second=98)


async def test_agreement_scores_zero() -> None:
    """A sparse variant that says what dense says has nothing to answer for."""
    auditor, _, _, _ = make_auditor()

    score = await auditor.audit(job())

    assert (score.status, score.tokens) == (AuditStatus.SCORED, 4)
    assert (score.token_disagreement, score.kl, score.first_divergence) == (0.0, pytest.approx(0.0), None)
    assert (score.dense_compute_s, score.sparse_compute_s) == (1.0, 1.0)


async def test_disagreement_is_found_and_floor_is_measured() -> None:
    """One other token in four is a quarter; the noise floor comes from dense against dense."""
    sparse = FakeVariant("sparse", score_results={"sparse": disagreeing(SERVED, at=2)})
    auditor, _, _, _ = make_auditor(sparse)

    score = await auditor.audit(job())

    assert (score.token_disagreement, score.first_divergence) == (0.25, 2)
    assert score.kl is not None
    assert score.kl > 0.1
    assert (score.token_disagreement_floor, score.kl_floor) == (0.0, pytest.approx(0.0))


async def test_dropped_mass_of_the_sparse_replay_is_scored() -> None:
    """Mean and 99th percentile are of what the sparse replay measured; dense replays have no say."""
    shares = tuple(i / 100 for i in range(101))
    sparse = FakeVariant(
        "sparse", score_results={"sparse": replace(perfect_scores(SERVED), dropped_mass=shares)}
    )
    auditor, _, _, _ = make_auditor(sparse)

    score = await auditor.audit(job())

    assert (score.dropped_mass_mean, score.dropped_mass_p99) == (pytest.approx(0.5), pytest.approx(0.99))


async def test_replays_follow_the_way_it_was_served() -> None:
    """Dense twice with different chunks, sparse once at the route's rung, all over the served tokens."""
    auditor, dense, sparse, _ = make_auditor()

    await auditor.audit(job())

    assert [r.request_id for r in dense.scored] == ["a/dense", "a/again"]
    assert dense.scored[0].served_chunk_tokens == sparse.scored[0].served_chunk_tokens == 1
    assert dense.scored[1].prompt_chunk_tokens != dense.scored[0].prompt_chunk_tokens
    assert [r.rung_id for r in (*dense.scored, *sparse.scored)] == ["dense", "dense", "medium"]
    assert sparse.scored[0].ids == (1, 2, 3, *SERVED)


async def test_the_second_dense_replay_is_sent_when_the_first_one_counts() -> None:
    """Two calls of one instant may meet at one replica of two; the sparse one has a replica of its own."""
    auditor, dense, sparse, _ = make_auditor()

    auditing = asyncio.create_task(auditor.audit(job()))
    await asyncio.sleep(AGAIN_AFTER_S / 2)

    assert ([r.request_id for r in dense.scored], len(sparse.scored)) == (["a/dense"], 1)
    await auditing
    assert len(dense.scored) == 2


@pytest.mark.parametrize(("prompt_tokens", "pieces"), [(1000, 5), (1600, 8), (8064, 8), (100_000, 8)])
async def test_the_second_dense_replay_of_a_long_prompt_is_cut_into_few_chunks(
    prompt_tokens: int, pieces: int
) -> None:
    """Of an odd size, a multiple of no block's; each chunk reads all that came before it, so they are few."""
    auditor, dense, _, _ = make_auditor()

    await auditor.audit(replace(job(), prompt_ids=(1,) * prompt_tokens, earlier_ids=()))

    size = dense.scored[1].prompt_chunk_tokens
    assert size is not None
    assert size % 2 == 1
    assert -(-prompt_tokens // size) == pieces


@pytest.mark.parametrize("failure", [crash("sparse"), EngineBusyError("full")])
async def test_failed_replay_is_an_error_score(failure: Exception) -> None:
    """A replay that fails is written as an error, never left out."""
    auditor, _, _, _ = make_auditor(FakeVariant("sparse", failure=failure))

    score = await auditor.audit(job())

    assert (score.status, score.kl, score.request_id) == (AuditStatus.ERROR, None, "a")


async def test_replay_of_another_length_is_an_error_score() -> None:
    """Numbers that do not fit the served tokens are an error, not a score."""
    short = perfect_scores(SERVED[:2])
    auditor, _, _, _ = make_auditor(FakeVariant("sparse", score_results={"sparse": short}))

    assert (await auditor.audit(job())).status == AuditStatus.ERROR


async def test_full_queue_refuses() -> None:
    """A full queue says no instead of growing."""
    auditor, _, _, _ = make_auditor(max_queued=1)

    assert [await auditor.submit(job("a")), await auditor.submit(job("b"))] == [None, Missing.QUEUE_FULL]


async def test_jobs_left_at_the_end_are_missing() -> None:
    """What was taken and never replayed is written as missing."""
    auditor, _, _, store = make_auditor()
    await auditor.submit(job("a"))

    await auditor.stop()
    auditor._writer.start()
    auditor._writer.stop()

    assert [(s.request_id, s.reason) for s in store.audits] == [("a", Missing.STOPPED)]


async def test_audits_of_a_rollout_that_is_over_do_not_delay_the_next() -> None:
    """Once another rollout's jobs come in, what waits of the old one, and stragglers, are not replayed."""
    auditor, dense, _, store = make_auditor(max_queued=8)
    for name, rollout_id in (("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r1"), ("e", "r2")):
        await auditor.submit(job(name, rollout_id=rollout_id))

    auditor.start()
    while auditor._writer.waiting < 5:
        await asyncio.sleep(0)
    await auditor.stop()
    auditor._writer.start()
    auditor._writer.stop()

    assert [r.request_id for r in dense.scored] == ["c/dense", "c/again", "e/dense", "e/again"]
    assert [s.request_id for s in store.audits if s.status is AuditStatus.MISSING] == ["a", "b", "d"]
    assert [s.request_id for s in store.audits if s.status is AuditStatus.SCORED] == ["c", "e"]


async def test_span_is_scored_after_what_was_served_before_it() -> None:
    """Prompt and earlier tokens are context; the score says how long the one and where the span began."""
    auditor, dense, sparse, _ = make_auditor()

    score = await auditor.audit(replace(job(), earlier_ids=(7, 8), share=0.5, probability=0.1))

    assert {(r.ids, r.num_prompt) for r in (*dense.scored, *sparse.scored)} == {((1, 2, 3, 7, 8, *SERVED), 5)}
    assert {r.prompt_end for r in (*dense.scored, *sparse.scored)} == {
        3
    }  # rungs decide as they did when served
    assert (score.prompt_tokens, score.span_start, score.tokens) == (3, 2, 4)
    assert (score.share, score.audit_probability) == (0.5, 0.1)


async def test_sparse_alone_is_asked_for_the_proven_artifact() -> None:
    """A replay counts only if the artifact of the rollout made it."""
    auditor, dense, sparse, _ = make_auditor()

    await auditor.audit(replace(job(), artifact="proven"))

    assert [r.artifact for r in (*dense.scored, *sparse.scored)] == ["", "", "proven"]


async def test_job_that_waited_too_long_is_given_up_unreplayed() -> None:
    """An answer of a minute ago is no news: its replay would only delay the newer ones."""
    clock, store, dense = FakeClock(), FakeStore(), FakeVariant("dense")
    auditor = Auditor({"dense": dense, "sparse": FakeVariant("sparse")}, RecordWriter(store), monotonic=clock)
    await auditor.submit(job("old"))
    clock.now_s += 46.0
    await auditor.submit(job("new"))

    auditor.start()
    while auditor._writer.waiting < 2:
        await asyncio.sleep(0)
    await auditor.stop()
    auditor._writer.start()
    auditor._writer.stop()

    assert [(s.request_id, s.reason) for s in store.audits] == [("old", Missing.EXPIRED), ("new", "")]
    assert [r.request_id for r in dense.scored] == ["new/dense", "new/again"]


async def test_load_says_what_waits_and_how_fast_jobs_are_done() -> None:
    """Ingresses draw by it: two jobs wait, and until one was done a job is taken to need a second."""
    auditor, _, _, _ = make_auditor()
    for name in ("a", "b"):
        await auditor.submit(job(name))

    assert await auditor.load() == AuditLoad(waiting=2, jobs_per_s=1.0)
