"""The demo's clients, against a real port: when the next session is sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

from sentei.pipeline.demo.traffic import Prompt, TrafficDriver
from tests.http_receiver import Receiver, reply

ANSWER = b'data: {"choices": [{"text": "yes"}]}\n\ndata: [DONE]\n\n'
DEADLINE_S = 30.0


def prompts() -> Iterator[Prompt]:
    """Sessions without end."""
    return (Prompt(f"s-{number}", "a text", 1) for number in count())


def test_the_next_session_waits_until_it_may_go_on() -> None:
    """One answer, then as many questions as it takes, and the next session only after a yes."""
    asked_at: list[int] = []  # how many requests had come when it was asked
    receiver = Receiver(reply(200, ANSWER, Content_Type="text/event-stream", X_Sentei_Variant="dense"))

    def may_go_on() -> bool:
        asked_at.append(len(receiver.received))
        return len(asked_at) % 2 == 0  # no, then yes

    with (
        receiver.listening(),
        TrafficDriver(receiver.url, "m", prompts(), clients=1, may_go_on=may_go_on) as traffic,
    ):
        ends = time.monotonic() + DEADLINE_S
        while len(receiver.received) < 3 and time.monotonic() < ends:
            time.sleep(0.01)

    assert asked_at[:4] == [1, 1, 2, 2]
    assert traffic.totals.by_variant["dense"] >= 3
    assert traffic.totals.failed == 0
