"""What the engine does next, and the engine's loop over a fake runner."""

from __future__ import annotations

from typing import Any

import pytest

from sentei.serving.engine.loop import Engine
from sentei.serving.engine.request import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    Sampling,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
)
from sentei.serving.engine.scheduler import Scheduler, Step, StepKind
from sentei.serving.errors import BadLogitsError, EngineBusyError, EngineError, EngineRefusedError
from tests.fakes_serving import FakeRunner

LIMITS = EngineLimits(
    max_running=2, max_queued=3, max_scores=1, max_context_tokens=16, score_patience_steps=3
)


def ask(name: str, *, prompt: int = 4, max_tokens: int = 4, **options: Any) -> EngineRequest:
    """A generation request over ids 1, 2, 3 ..."""
    return EngineRequest(name, tuple(range(1, prompt + 1)), max_tokens, **options)


def replay(name: str, *, prompt: int = 2, served: int = 2) -> ScoreRequest:
    """A replay of `served` tokens."""
    return ScoreRequest(name, tuple(range(prompt + served)), prompt)


def step(kind: StepKind, *names: str) -> Step:
    """The step that is expected."""
    return Step(kind, names)


def test_idle_scheduler_has_nothing_to_do() -> None:
    """Without requests there is no step."""
    assert Scheduler(LIMITS).next_step() is None


def test_prefills_and_decode_rounds_alternate() -> None:
    """A second prompt waits for one decode round of the first, and then both decode together."""
    scheduler = Scheduler(LIMITS)
    for name in ("a", "b", "c"):
        scheduler.add(ask(name))

    steps = [scheduler.next_step() for _ in range(4)]

    assert steps == [
        step(StepKind.PREFILL, "a"),
        step(StepKind.DECODE, "a"),
        step(StepKind.PREFILL, "b"),
        step(StepKind.DECODE, "a", "b"),
    ]


def test_waiting_request_runs_when_another_ends() -> None:
    """No more than max_running requests hold a cache; the next in line follows."""
    scheduler = Scheduler(LIMITS)
    for name in ("a", "b", "c"):
        scheduler.add(ask(name))
    for _ in range(5):
        scheduler.next_step()

    scheduler.finish("a")

    assert scheduler.next_step() == step(StepKind.PREFILL, "c")
    assert scheduler.next_step() == step(StepKind.DECODE, "b", "c")


def test_replay_waits_for_users_but_not_for_ever() -> None:
    """A replay runs when the engine is idle, or after its patience has run out."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask("a"))
    scheduler.add(replay("r"))

    kinds = [found.kind for _ in range(5) if (found := scheduler.next_step()) is not None]

    assert kinds == ["prefill", "decode", "decode", "score", "decode"]


def test_idle_engine_replays_at_once() -> None:
    """Nobody waits, so the replay starts."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(replay("r"))

    assert scheduler.next_step() == step(StepKind.SCORE, "r")
    assert scheduler.next_step() is None


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ask("x", prompt=16), EngineRefusedError, "16 tokens"),
        (ask("x", prompt=0), EngineRefusedError, "0 tokens"),
        (ask("x", prompt=8, max_tokens=9), EngineRefusedError, "exceeds 16"),
        (ask("x", max_tokens=2, sent_ids=(1, 2)), EngineRefusedError, "2 sent"),
        (ask("a"), EngineRefusedError, "already running"),
        (replay("x", served=0), EngineRefusedError, "0 served"),
        (replay("x", prompt=16), EngineRefusedError, "16 prompt"),
    ],
)
def test_impossible_requests_are_refused(
    request_: EngineRequest | ScoreRequest, error: type[EngineError], words: str
) -> None:
    """What can never run is refused with its numbers, and the queues stay as they were."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask("a"))

    with pytest.raises(error, match=words):
        scheduler.add(request_)
    assert scheduler.next_step() == step(StepKind.PREFILL, "a")


def test_full_queues_are_busy() -> None:
    """Beyond the limits both queues say so instead of growing."""
    scheduler = Scheduler(LIMITS)
    for name in ("a", "b", "c"):
        scheduler.add(ask(name))
    scheduler.add(replay("r"))

    assert isinstance(scheduler.refusal(ask("d")), EngineBusyError)
    assert isinstance(scheduler.refusal(replay("s")), EngineBusyError)


def test_refusal_asks_without_side_effect() -> None:
    """Asking whether a request fits does not queue it."""
    scheduler = Scheduler(LIMITS)

    assert scheduler.refusal(ask("a")) is None
    assert scheduler.next_step() is None


def run(engine: Engine, *requests: EngineRequest | ScoreRequest) -> dict[str, list[Any]]:
    """Submit requests and step until nothing is left; returns what each one's sink got."""
    found: dict[str, list[Any]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request, found[request.request_id].append)
    while engine.step():
        pass
    return found


def test_engine_streams_until_max_tokens_and_frees_the_cache() -> None:
    """Each token comes as its own chunk, the last one says why it is the last, and the cache is dropped."""
    runner = FakeRunner()

    chunks = run(Engine(runner, LIMITS), ask("a", max_tokens=3))["a"]

    assert [chunk.ids for chunk in chunks] == [(5,), (6,), (7,)]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.LENGTH]
    assert runner.live == {}


def test_stop_token_ends_the_answer_and_is_not_sent() -> None:
    """The end token is told by the finish reason alone."""
    chunks = run(Engine(FakeRunner(), LIMITS), ask("a", stop_ids=frozenset({6})))["a"]

    assert [(chunk.ids, chunk.finish_reason) for chunk in chunks] == [((5,), None), ((), FinishReason.STOP)]


def test_first_and_last_chunk_say_what_the_attention_kept() -> None:
    """What was kept so far travels with the first and the last chunk, also before a stop token."""
    whole = run(Engine(FakeRunner(), LIMITS), ask("a", max_tokens=3))["a"]
    stopped = run(Engine(FakeRunner(), LIMITS), ask("a", stop_ids=frozenset({6})))["a"]

    assert [chunk.attention and chunk.attention.sparse_calls for chunk in whole] == [1, None, 3]
    assert [chunk.attention and chunk.attention.sparse_calls for chunk in stopped] == [1, 2]


def test_sent_tokens_are_continued_and_counted() -> None:
    """A continuation starts behind what was sent and ends where the whole answer would have ended."""
    chunks = run(Engine(FakeRunner(), LIMITS), ask("a", sent_ids=(5, 6), max_tokens=4))["a"]

    assert [chunk.ids for chunk in chunks] == [(7,), (8,)]


def test_logprobs_only_where_wanted() -> None:
    """Log-probabilities travel only with requests that asked for them."""
    wanted = ask("b", sampling=Sampling(num_top_logprobs=0))

    found = run(Engine(FakeRunner(), LIMITS), ask("a"), wanted)

    assert not found["a"][0].logprobs
    assert found["b"][0].logprobs[0].token_id == 5


def test_failure_of_one_request_leaves_others_alone() -> None:
    """A typed error reaches its own request; the engine goes on."""
    runner = FakeRunner(fail=BadLogitsError("3 of 9 logits are NaN"))
    engine = Engine(runner, LIMITS)
    broken = run(engine, ask("a"))["a"]
    runner.fail = None

    fine = run(engine, ask("b", max_tokens=1))["b"]

    assert isinstance(broken[0], BadLogitsError)
    assert fine[0].ids == (5,)


def test_surprise_becomes_an_engine_error() -> None:
    """An unexpected exception is told as an engine error with its type's name."""
    found = run(Engine(FakeRunner(fail=RuntimeError("out of memory")), LIMITS), ask("a"))["a"]

    assert isinstance(found[0], EngineError)
    assert "RuntimeError: out of memory" in str(found[0])


def test_cancel_frees_the_cache_and_stops_the_stream() -> None:
    """After a cancel no token comes and nothing is held; a second cancel does nothing."""
    runner, chunks = FakeRunner(), list[Any]()
    engine = Engine(runner, LIMITS)
    engine.submit(ask("a"), chunks.append)
    engine.step()

    engine.cancel("a")
    engine.cancel("a")

    assert not engine.step()
    assert len(chunks) == 1
    assert runner.live == {}


def test_replay_gives_a_result() -> None:
    """A replay's result reaches its sink."""
    found = run(Engine(FakeRunner(), LIMITS), replay("r"))["r"]

    assert isinstance(found[0], ScoreResult)
    assert [top[0] for top in found[0].top_ids] == [2, 3]


async def test_async_generator_streams_and_cancels() -> None:
    """Through the thread: tokens arrive in order, and leaving the loop early frees the cache."""
    runner = FakeRunner()
    engine = Engine(runner, LIMITS)
    engine.start()
    try:
        whole = [chunk async for chunk in engine.generate(ask("a", max_tokens=3))]
        stream = engine.generate(ask("b", max_tokens=9))
        first = await anext(stream)
        await stream.aclose()
        await engine.between_steps(lambda: None)
    finally:
        engine.stop()

    assert [chunk.ids for chunk in whole] == [(5,), (6,), (7,)]
    assert isinstance(first, TokenChunk)
    assert runner.live == {}


async def test_refusal_reaches_the_caller_through_the_thread() -> None:
    """A request that cannot fit raises its typed error at the first token."""
    engine = Engine(FakeRunner(), LIMITS)
    engine.start()
    try:
        with pytest.raises(EngineRefusedError, match="exceeds 16"):
            await anext(engine.generate(ask("a", max_tokens=99)))
    finally:
        engine.stop()


async def test_action_between_steps_passes_its_error_on() -> None:
    """What goes wrong in an action on the engine's thread is raised where it was asked for."""

    def broken() -> None:
        raise ValueError("no such fault")

    engine = Engine(FakeRunner(), LIMITS)
    engine.start()
    try:
        with pytest.raises(ValueError, match="no such fault"):
            await engine.between_steps(broken)
    finally:
        engine.stop()
    assert not engine.is_alive()
