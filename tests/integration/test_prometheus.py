"""Metrics of one's own: a real HTTP server that answers as Prometheus does, the log, a decision."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import CallError, Secrets
from sentei.pipeline.integrations.prometheus import MetricReader, read_answer
from sentei.pipeline.rollout.replay import replay
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, ROLLOUT
from tests.http_receiver import Received, Receiver, Reply, reply
from tests.stories_rollout import AskingStory

WALL_S = 1_700_000_000.0
QUERY = 'sum(rate(cart_errors_total{job="cart"}[5m]))'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def vector(*values: Any, at_s: float = WALL_S) -> bytes:
    """An answer of Prometheus with so many series."""
    result = [{"metric": {"pod": str(i)}, "value": [at_s, str(value)]} for i, value in enumerate(values)]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()


def watched(server: Receiver, **changes: Any) -> str:
    """A policy with one metric of its own."""
    item = {
        "id": "cart",
        "url": server.url,
        "query": QUERY,
        "bound": {"max": 0.02},
        "window": "4s",
        "every": "1s",
        "timeout": "500ms",
        "action": "rollback",
    }
    text = json.dumps([item | changes])
    return POLICY.replace("  guardrails:\n", f"  guardrails:\n    prometheus: {text}\n")


class Story(AskingStory):
    """A look of the reader before each tick."""

    def __init__(self, store: Store, policy: str, folder: Path) -> None:
        super().__init__(store, policy)
        self.reader = MetricReader(store, Secrets(folder, {"SENTEI_PROM": "t0ken"}), wall=lambda: WALL_S)
        self.said: list[str] = []

    def before(self, now_s: float) -> None:
        """Ask."""
        self.said += self.reader.run_once(now_s)

    def go(self, seconds: int) -> str:
        """The phase and stage that it is in then."""
        state = self.run(seconds)
        return f"{state.phase} {state.stage_id}"


def test_a_rollout_within_its_bound_is_promoted_and_each_answer_is_in_the_store(
    store: Store, tmp_path: Path
) -> None:
    """Asked as its API wants, with the token; what was answered is written down and in the log's evidence."""
    server = Receiver(reply=reply(200, vector(0.01)))
    story = Story(store, watched(server, token={"env": "SENTEI_PROM"}), tmp_path)

    with server.listening():
        end = story.go(25)

    first = server.received[0]
    address = urlsplit(first.path)
    assert end == "promoted full"
    assert (first.method, address.path) == ("GET", "/api/v1/query")
    assert parse_qs(address.query) == {"query": [QUERY]}
    assert first.headers["authorization"] == "Bearer t0ken"
    samples = [item for _, item in store.read_metrics(ROLLOUT)]
    assert len(samples) == len(server.received) == 24  # from the first event on
    assert {(item.status, item.value) for item in samples} == {("ok", 0.01)}
    promoted = next(EventLog(store).read(ROLLOUT, kinds=("promote",)))
    (evidence,) = promoted.payload["metrics"]
    assert (evidence["metric_id"], evidence["status"], evidence["value"]) == ("cart", "within", 0.01)


def test_a_breach_rolls_back_by_its_name_and_replays_alike(store: Store, tmp_path: Path) -> None:
    """Out of its bound for a whole window where sparse serves; a replay reads the samples, not Prometheus."""
    server = Receiver(reply=reply(200, vector(0.01)))
    policy = watched(server)
    story = Story(store, policy, tmp_path)

    with server.listening():
        assert story.go(10) == "running half"
        server.reply = reply(200, vector(0.5))
        assert story.go(4) == "running half"
        assert story.go(3) == "rolled_back half"
    state = story.runner.state()
    num_asked = len(server.received)
    found = replay(store, ROLLOUT, load_policy(policy, "test"))

    assert state is not None
    assert (state.by, state.reason) == ("cart", "cart: 0.5, bound max 0.02, out of it for 4s of 4s")
    assert (found.replayed_end, found.first_difference) == ("rolled_back", None)
    assert len(server.received) == num_asked
    assert story.go(3) == "rolled_back half"
    assert len(server.received) == num_asked  # nobody asks for what is over


def hang(handler: BaseHTTPRequestHandler, received: Received) -> None:
    """An answer that comes too late."""
    time.sleep(1.0)
    reply(200, vector(0.01))(handler, received)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(200, vector()), "the query gives no series"),
        (reply(200, vector("NaN")), "the query gives nan"),
        (reply(200, vector("+Inf")), "the query gives inf"),
        (reply(200, vector(0.01, at_s=WALL_S - 3600)), "the answer is of 3600 s ago"),
        (reply(200, vector(0.01, 0.01)), "the query gives 2 series; aggregate"),
        (reply(200, b"<html>"), "not Prometheus' JSON"),
        (reply(200, b"x" * 300_000), "larger than 262144 bytes"),
        (
            reply(400, b'{"status":"error","errorType":"bad_data","error":"parse error"}'),
            "answered 400: parse error",
        ),
        (reply(302, Location="/elsewhere"), "answered 302"),
        (hang, "no whole answer within 0.5 s"),
    ],
)
def test_what_is_no_number_holds_and_is_an_alert(
    store: Store, tmp_path: Path, answer: Reply, words: str
) -> None:
    """No data is never a pass: the stage holds, the store has the reason, the log one alert."""
    server = Receiver(reply=answer)
    story = Story(store, watched(server), tmp_path)

    with server.listening():
        assert story.go(9) == "running shadow"

    assert words in story.said[0]
    assert all(item.value is None for _, item in store.read_metrics(ROLLOUT))
    alerts = [
        action["detail"]
        for event in EventLog(store).read(ROLLOUT)
        for action in event.payload.get("actions", ())
        if action["kind"] == "lost_metric"
    ]
    assert len(alerts) == 1
    assert words in alerts[0]
    assert {urlsplit(item.path).path for item in server.received} == {"/api/v1/query"}


def test_a_prometheus_that_is_away_is_an_error_and_a_missing_token_asks_nobody(
    store: Store, tmp_path: Path
) -> None:
    """Nothing is sent without the token that the policy names."""
    server = Receiver()
    story = Story(store, watched(server), tmp_path)
    assert story.go(6) == "running shadow"
    assert "no answer, ConnectError" in story.said[0]

    (tmp_path / "other").mkdir()
    with Store.open(f"sqlite:///{tmp_path}/other/state.db") as fresh, server.listening():
        unnamed = Story(fresh, watched(server, token={"file": "absent"}), tmp_path)
        assert unnamed.go(6) == "running shadow"

    assert "file absent in" in unnamed.said[0]
    assert server.received == []


def test_a_metric_is_asked_at_its_own_pace(store: Store, tmp_path: Path) -> None:
    """Each `every`, however often somebody looks."""
    server = Receiver(reply=reply(200, vector(0.01)))
    story = Story(store, watched(server, every="5s", window="10s"), tmp_path)

    with server.listening():
        story.go(21)

    assert len(server.received) == 4


def test_answers_that_prometheus_may_give() -> None:
    """A scalar is a number as a vector of one is; anything else says what it is."""
    scalar = b'{"status":"success","data":{"resultType":"scalar","result":[1700000000,"2.5"]}}'
    matrix = b'{"status":"success","data":{"resultType":"matrix","result":[]}}'
    failed = b'{"status":"error","errorType":"timeout","error":"query timed out"}'

    assert read_answer(scalar, WALL_S) == ("ok", 2.5, "")
    assert read_answer(vector(-3), WALL_S) == ("ok", -3.0, "")
    assert read_answer(vector(1, at_s=math.nan), WALL_S)[0] == "stale"
    with pytest.raises(CallError, match="gives a matrix"):
        read_answer(matrix, WALL_S)
    with pytest.raises(CallError, match="query timed out"):
        read_answer(failed, WALL_S)
    for broken in (b"", b"[]", b"null", b'{"status":"success"}', b"[" * 100_000):
        with pytest.raises(CallError, match="not Prometheus' JSON"):
            read_answer(broken, WALL_S)
