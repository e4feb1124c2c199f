"""The webhook of an approval, a real HTTP server: 200 approves, all else holds, and the log says who."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import Secrets
from sentei.pipeline.integrations.gatekeeper import GateKeeper
from sentei.pipeline.integrations.shapes import sign
from sentei.pipeline.rollout.replay import replay
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, ROLLOUT
from tests.http_receiver import Received, Receiver, Reply, reply
from tests.stories_rollout import AskingStory

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    (tmp_path / "key").write_text(KEY)
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def gated(receiver: Receiver, **changes: Any) -> str:
    """A policy whose second stage asks the receiver."""
    hook = {"id": "ci", "url": f"{receiver.url}/gate", "every": "5s", "timeout": "500ms"} | changes
    stage = "{id: half, share: 50%, rung: medium"
    return POLICY.replace(f"{stage}}}", f"{stage}, approval: {{webhook: {json.dumps(hook)}}}}}")


class Story(AskingStory):
    """A look of the gatekeeper after each tick."""

    def __init__(self, store: Store, policy: str, folder: Path) -> None:
        super().__init__(store, policy)
        self.keeper = GateKeeper(store, Secrets(folder, {}), wall=lambda: 1_700_000_000.0)
        self.said: list[str] = []

    def after(self, now_s: float) -> None:
        """Ask."""
        found = self.keeper.run_once(now_s)
        self.said += [] if found is None else [found]

    def go(self, seconds: int) -> str:
        """The stage that it is in then."""
        return self.run(seconds).stage_id


def test_a_gate_is_asked_when_only_its_yes_is_missing_and_200_approves(store: Store, tmp_path: Path) -> None:
    """Not before the evidence is complete; then at its pace; the log names the gate as who approved."""
    receiver = Receiver(reply=reply(403))
    story = Story(store, gated(receiver), tmp_path)

    with receiver.listening():
        early = story.go(6)
        asked_early = len(receiver.received)
        held = story.go(24)
        asked = len(receiver.received)
        receiver.reply = reply(200, b"whatever")
        opened = story.go(8)
        story.go(12)

    assert (early, asked_early) == ("half", 0)
    assert held == "half"
    assert 3 <= asked <= 5  # each 5 s of about 20
    assert opened == "full"
    assert story.said[0] == "gate ci: answered 403, which holds"
    assert story.said[-1] == ""
    approvals = list(EventLog(store).read(ROLLOUT, kinds=("advance",)))[-1]
    assert "approved by gate:ci" in [item["detail"] for item in approvals.payload["actions"]]
    assert len(receiver.received) == asked + 1  # once it is open nobody asks any more


def test_what_is_asked_says_where_the_rollout_stands_and_on_what_evidence(
    store: Store, tmp_path: Path
) -> None:
    """Rollout, stage and the next one, every verdict with its numbers; signed; one id until answered."""
    receiver = Receiver(reply=reply(500))
    story = Story(store, gated(receiver, secret={"file": "key"}), tmp_path)

    with receiver.listening():
        story.go(22)

    first, second = receiver.received[:2]
    body = json.loads(first.body)
    assert first.path == "/gate"
    assert body["type"] == "rollout.approval"
    assert body["data"]["rollout_id"] == ROLLOUT
    assert body["data"]["stage"] == {"id": "half", "share": 0.5, "rung": "medium"}
    assert body["data"]["next_stage"] == {"id": "full", "share": 0.95, "rung": "medium"}
    (agree,) = body["data"]["evidence"]
    assert (agree["id"], agree["slice"], agree["verdict"], agree["bound"]) == ("agree", "long", "safe", 0.1)
    assert agree["mean"] == pytest.approx(0.0)
    assert json.loads(second.body)["id"] != body["id"]  # no answer of before fits it
    headers = sign(body["id"], first.body, KEY, 1_700_000_000)
    assert {name: first.headers[name] for name in headers} == headers


def hang(handler: BaseHTTPRequestHandler, received: Received) -> None:
    """An answer that comes too late."""
    time.sleep(1.0)
    reply(200)(handler, received)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(202), "answered 202, which holds"),
        (reply(204), "answered 204, which holds"),
        (reply(302, Location="/yes"), "answered 302, which holds"),
        (reply(500), "answered 500, which holds"),
        (hang, "no whole answer within 0.5 s"),
    ],
)
def test_every_other_answer_holds(store: Store, tmp_path: Path, answer: Reply, words: str) -> None:
    """Accepted is not approved, a redirect is not followed, and a yes after the time-out is none."""
    receiver = Receiver(reply=answer)
    story = Story(store, gated(receiver), tmp_path)

    with receiver.listening():
        assert story.go(14) == "half"

    assert words in story.said[0]
    assert {item.path for item in receiver.received} == {"/gate"}


def test_a_gate_that_is_away_holds_and_a_missing_secret_asks_nobody(store: Store, tmp_path: Path) -> None:
    """No answer is no yes; an unsigned question is never sent where a secret is named."""
    receiver = Receiver()
    story = Story(store, gated(receiver), tmp_path)
    assert story.go(14) == "half"
    assert "no answer, ConnectError" in story.said[0]

    (tmp_path / "other").mkdir()
    with Store.open(f"sqlite:///{tmp_path}/other/state.db") as fresh, receiver.listening():
        unsigned = Story(fresh, gated(receiver, secret={"file": "absent"}), tmp_path)
        assert unsigned.go(14) == "half"

    assert "file absent in" in unsigned.said[0]
    assert receiver.received == []


def test_a_replay_finds_the_yes_in_the_log_and_asks_nobody(store: Store, tmp_path: Path) -> None:
    """The recorded rollout decided again by the same policy decides the same, with the gate long gone."""
    receiver = Receiver()
    policy = gated(receiver)
    story = Story(store, policy, tmp_path)
    with receiver.listening():
        story.go(25)

    found = replay(store, ROLLOUT, load_policy(policy, "test"))

    assert found.recorded_end == found.replayed_end == "promoted"
    assert found.first_difference is None
    assert len(receiver.received) == 1
