"""The load on a server: times that do not wait, what was felt, and the table's row."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from sentei.pipeline.measure.load import (
    Felt,
    Goal,
    Request,
    openai_sender,
    plan_arrivals,
    read_piece,
    run_load,
    summarise,
)


class Clock:
    """A clock that moves when somebody sleeps, and when a fake server takes its time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


def test_arrivals_are_drawn_beforehand_and_of_one_seed() -> None:
    """A rate gives rising times that another run repeats; without a rate all leave at once."""
    prompts = [(1, 2)] * 200

    drawn = plan_arrivals(prompts, rate_per_s=4.0, answer_tokens=8, seed=3)

    assert drawn == plan_arrivals(prompts, rate_per_s=4.0, answer_tokens=8, seed=3)
    assert [r.at_s for r in drawn] == sorted(r.at_s for r in drawn)
    assert drawn[-1].at_s == pytest.approx(50.0, rel=0.25)
    assert {r.at_s for r in plan_arrivals(prompts, rate_per_s=None, answer_tokens=8, seed=3)} == {0.0}
    assert len({r.session for r in drawn}) == 200


async def test_what_is_felt_counts_from_the_time_of_leaving() -> None:
    """Two seconds to the first token, one for each of the next two; a failure is a row, not the end."""
    clock = Clock()

    async def send(request: Request) -> AsyncIterator[int]:
        if request.session == "bad":
            raise ValueError("status 503")
        for pause_s in (2.0, 1.0, 1.0):
            await clock.sleep(pause_s)
            yield 1

    requests = [Request(5.0, (1, 2, 3), 3, "good"), Request(0.0, (1,), 3, "bad")]

    felt, seconds = await run_load(requests, send, clock=clock, sleep=clock.sleep)

    assert (felt[0].first_s, felt[0].last_s, felt[0].tokens) == (2.0, 4.0, 3)
    assert felt[0].per_token_s == 1.0
    assert felt[1].failure == "ValueError: status 503"
    assert seconds == 9.0


def test_the_row_counts_failures_and_what_was_good() -> None:
    """Goodput holds both times against the goal; medians are over what was answered."""
    felt = [Felt(10, 0.1, 1.1, 11), Felt(10, 0.3, 0.5, 3), Felt(10, failure="x"), Felt(10, 9.0, 9.1, 2)]

    row = summarise(felt, 10.0, Goal(first_ms=1000, per_token_ms=100))

    assert row["failed"] == 1
    assert row["ttft_ms_p50"] == 300.0
    assert row["ttft_ms_p95"] == 9000.0
    assert row["tpot_ms_p50"] == 100.0
    assert row["tokens_per_s"] == 1.6
    assert row["goodput_per_s"] == 0.2


def test_a_line_of_the_stream_brings_text_a_count_or_an_error() -> None:
    """The end, comments and an empty piece bring nothing; an error in the stream is one."""
    assert read_piece('data: {"choices": [{"text": "a", "finish_reason": "length"}]}') == (True, None)
    assert read_piece('data: {"choices": [{"text": "", "finish_reason": "length"}]}') == (False, None)
    assert read_piece('data: {"choices": [], "usage": {"completion_tokens": 5}}') == (False, 5)
    assert read_piece("data: [DONE]") == (False, None)
    assert read_piece("") == (False, None)
    with pytest.raises(ValueError, match="gone"):
        read_piece('data: {"error": {"message": "gone"}}')


async def test_requests_go_to_the_openai_api() -> None:
    """Ids as the prompt, a session of its own, streaming; a refusal says what the server said."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if b"wrong" in request.content:
            return httpx.Response(404, text="no such model")
        line = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
        usage = 'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'
        return httpx.Response(200, text=line * 2 + usage + "data: [DONE]\n\n")

    async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://server") as client:
        request = Request(0.0, (4, 5), 7, "s1")
        pieces = [num async for num in openai_sender(client, "pocket", {"seed": 1})(request)]
        with pytest.raises(ValueError, match="status 404: no such model"):
            [num async for num in openai_sender(client, "wrong", {})(request)]

    assert pieces == [1, 1, 3]
    assert seen[0].url.path == "/v1/completions"
    assert seen[0].headers["x-session-id"] == "s1"
    assert b'"prompt":[4,5]' in seen[0].content.replace(b" ", b"")
