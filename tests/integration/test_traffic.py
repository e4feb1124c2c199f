"""The demo's clients, against a real port: when the next session is sent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from sentei.pipeline.demo.traffic import Prompt, TrafficDriver
from sentei.pipeline.rollout.client import AdminClient
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


def test_the_end_comes_also_while_nobody_may_go_on() -> None:
    """Whoever asks is let go, with one answer; a question that fails is asked again and ends nothing."""
    receiver = Receiver(reply(200, ANSWER, Content_Type="text/event-stream", X_Sentei_Variant="dense"))
    asked: list[bool] = []

    def never() -> bool:
        asked.append(True)
        if len(asked) == 1:
            raise KeyError("workers")
        return False

    driver = TrafficDriver(receiver.url, "m", prompts(), clients=1, may_go_on=never)
    with receiver.listening(), driver as traffic:
        ends = time.monotonic() + DEADLINE_S
        while len(asked) < 2 and time.monotonic() < ends:
            time.sleep(0.01)

    assert len(receiver.received) == 1
    assert traffic.totals.last_error == "KeyError: 'workers'"
    assert not driver._thread.is_alive()


@pytest.mark.parametrize(
    ("auditor", "are_done"),
    [
        ({"is_up": True, "waiting": 2}, False),
        ({"is_up": True, "waiting": 0}, True),
        ({"is_up": False}, False),
    ],
)
def test_audits_are_done_when_the_auditor_says_so(auditor: dict[str, Any], are_done: bool) -> None:
    """One that is too busy to answer is just then not taken for one that has nothing to do."""
    receiver = Receiver(reply(200, json.dumps({"workers": {"auditor": auditor}}).encode()))

    with receiver.listening():
        client = AdminClient(receiver.url, "a token")
        assert client.are_audits_done() is are_done
        client.close()

    assert receiver.received[0].path == "/admin/v1/status"
