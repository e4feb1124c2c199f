"""Notifications to a real HTTP server: at least once, in order, signed, never in a decision's way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.integrations import calls
from sentei.pipeline.integrations.calls import CallError, Secrets, call
from sentei.pipeline.integrations.notices import Place
from sentei.pipeline.integrations.notifier import MAX_BACKOFF_S, PLACE, Notifier
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.serving.rollout.controller import Controller
from tests.fakes_records import POLICY, ROLLOUT, START_S
from tests.fakes_serving import FakeClock
from tests.http_receiver import Received, Receiver, reply
from tests.stories_rollout import serve

KEY = "0123456789abcdef0123456789abcdef"
STEP_S = 10
GATED = POLICY.replace("share: 95%, rung: medium,", "share: 95%, rung: medium, approval: {by: [ann]},")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    """A folder with one key."""
    (tmp_path / "key").write_text(KEY)
    return Secrets(tmp_path, {})


def told(receiver: Receiver, policy: str = GATED, **more: Any) -> str:
    """A policy that tells one receiver."""
    hook = {"id": "oncall", "url": f"{receiver.url}/hook", "secret": {"file": "key"}} | more
    return f"{policy}  notify: {json.dumps({'webhooks': [hook]})}\n"


def bodies(receiver: Receiver) -> list[dict[str, Any]]:
    """What came, parsed."""
    return [json.loads(item.body) for item in receiver.received]


class Story:
    """A rollout by a simulated clock; the notifier looks after each tick, as its job would."""

    def __init__(self, store: Store, policy: str, notifier: Notifier, rollout_id: str = ROLLOUT) -> None:
        self.store, self.notifier, self.second = store, notifier, 0
        start_rollout(store, policy, now_s=START_S, rollout_id=rollout_id)
        self.runner = RolloutRunner.open(store, rollout_id, RunnerOptions("a"))
        self.num_decisions = 0

    def go(self, seconds: int, *, disagreement: float = 0.0, num_sessions: int = 45) -> None:
        """Traffic and a tick every ten seconds."""
        for _ in range(0, seconds, STEP_S):
            self.second += STEP_S
            serve(self.store, self.second, disagreement=disagreement, num_sessions=num_sessions)
            result = self.runner.tick(START_S + self.second + 0.5)
            self.num_decisions += result.decision is not None
            self.notifier.run_once(START_S + self.second + 0.6)

    def order(self, kind: str) -> None:
        """An operator's order."""
        self.store.add_command(ROLLOUT, kind, by="ann", at_s=START_S + self.second)


def test_a_receiver_that_was_down_for_ten_minutes_gets_everything_in_order(
    store: Store, secrets: Secrets
) -> None:
    """Nothing is lost or out of order, decisions went on, and a repeat has the id of the first try."""
    receiver = Receiver()
    story = Story(store, told(receiver), Notifier(store, secrets))

    story.go(60)  # shadow, half, full: it waits for ann
    story.order("pause")
    story.go(120)
    story.order("resume")
    story.go(120)
    story.order("approve")
    story.go(60)
    story.go(240, disagreement=0.6)  # promoted, and then it turns bad
    assert (story.second, receiver.received) == (600, [])
    assert story.num_decisions == 60
    with receiver.listening():
        receiver.reply = reply(503)
        story.go(int(MAX_BACKOFF_S))
        refused = len(receiver.received)
        receiver.reply = reply(204)
        story.go(int(MAX_BACKOFF_S) + STEP_S)

    told_first, all_told = bodies(receiver)[:refused], bodies(receiver)
    taken = all_told[refused:]
    assert refused >= 1
    assert [item["type"] for item in taken] == [
        "rollout.approval_wanted",
        "rollout.paused",
        "rollout.approval_wanted",
        "rollout.promoted",
        "rollout.rolled_back",
    ]
    seqs = [item["data"]["event_seq"] for item in taken]
    assert seqs == sorted(seqs)
    assert len({item["id"] for item in taken}) == len(taken)
    assert {item["id"] for item in told_first} == {
        taken[0]["id"]
    }  # the same one again and again, never the next
    assert [item.headers["webhook-id"] for item in receiver.received] == [item["id"] for item in all_told]


def test_each_delivery_is_signed_over_id_time_and_body(store: Store, secrets: Secrets) -> None:
    """A receiver can tell who sent it and when it was tried."""
    receiver = Receiver()
    story = Story(store, told(receiver, POLICY), Notifier(store, secrets, wall=lambda: 1_700_000_000.9))

    with receiver.listening():
        story.go(60)

    (got,) = receiver.received
    signed = f"{got.headers['webhook-id']}.1700000000.".encode() + got.body
    expected = base64.b64encode(hmac.new(KEY.encode(), signed, hashlib.sha256).digest()).decode()
    assert got.headers["webhook-timestamp"] == "1700000000"
    assert got.headers["webhook-signature"] == f"v1,{expected}"
    assert (got.method, got.path, got.headers["content-type"]) == ("POST", "/hook", "application/json")


def test_a_restart_goes_on_behind_what_was_taken(store: Store, secrets: Secrets) -> None:
    """The place is in the store: a new process repeats nothing and leaves nothing out."""
    receiver = Receiver()
    story = Story(store, told(receiver), Notifier(store, secrets))

    with receiver.listening():
        story.go(60)
        first = len(receiver.received)
        story.notifier = Notifier(store, secrets)
        story.order("approve")
        story.go(60)

    kinds = [item["type"] for item in bodies(receiver)]
    assert first == 1
    assert kinds == ["rollout.approval_wanted", "rollout.promoted"]


def test_a_crash_before_the_place_was_kept_repeats_with_the_same_id(store: Store, secrets: Secrets) -> None:
    """At least once: the receiver had it, we did not know, and the id tells."""
    receiver = Receiver()
    story = Story(store, told(receiver), Notifier(store, secrets))

    def hang_up(handler: BaseHTTPRequestHandler, received: Received) -> None:
        handler.connection.close()

    receiver.reply = hang_up
    with receiver.listening():
        story.go(50)
        receiver.reply = reply(200)
        story.go(70)

    ids = [item["id"] for item in bodies(receiver)]
    assert len(ids) >= 2
    assert len(set(ids)) == 1


def test_rollouts_one_after_another_end_with_their_own_logs(store: Store, secrets: Secrets) -> None:
    """Down over the change, it is told the old rollout's end first, and each place is at its log's end."""
    receiver = Receiver()
    notifier = Notifier(store, secrets)
    first = Story(store, told(receiver), notifier)
    first.go(60)
    first.order("abort")
    first.go(10)
    second = Story(store, told(receiver, GATED.replace("salt: test", "salt: two")), notifier, rollout_id="r2")
    second.go(20)

    with receiver.listening():
        second.go(int(MAX_BACKOFF_S) + STEP_S)
        second.store.add_command("r2", "abort", by="ann", at_s=START_S)
        second.go(20)

    found = [(item["data"]["rollout_id"], item["type"]) for item in bodies(receiver)]
    assert found[:2] == [(ROLLOUT, "rollout.approval_wanted"), (ROLLOUT, "rollout.rolled_back")]
    assert {rollout_id for rollout_id, _ in found[2:]} == {"r2"}
    log = EventLog(store)
    for rollout_id in (ROLLOUT, "r2"):
        latest = log.latest(rollout_id)
        assert latest is not None
        assert Place.from_json(store.read_value(f"{PLACE}{rollout_id}.oncall")).seq == latest.seq


def test_an_old_rollout_that_cannot_be_read_keeps_nothing_of_the_newest_back(
    store: Store, secrets: Secrets
) -> None:
    """It is named; what happens now is told."""
    receiver = Receiver()
    first = Story(store, told(receiver), Notifier(store, secrets))
    first.go(60)
    first.order("abort")
    first.go(10)
    notifier = Notifier(store, secrets)  # as after a restart
    second = Story(store, told(receiver, GATED.replace("salt: test", "salt: two")), notifier, rollout_id="r2")
    second.go(10)
    token = store.acquire_lease("a", ttl_s=3.0, now_s=START_S + 10)
    state = json.dumps({"schema": 99})  # of another version, say
    EventLog(store).append(ROLLOUT, "note", payload={}, state_after=state, token=token or 0, at_s=START_S)

    with receiver.listening():
        second.go(60 + int(MAX_BACKOFF_S))
        result = notifier.run_once(START_S + 400)

    assert {item["data"]["rollout_id"] for item in bodies(receiver)} == {"r2"}
    assert any(ROLLOUT in reason for reason in result.reasons)


def test_a_receiver_that_an_edit_adds_hears_from_then_on(store: Store, secrets: Secrets) -> None:
    """What was before it is not news to it."""
    old, new = Receiver(), Receiver()
    story = Story(store, told(old), Notifier(store, secrets))
    with old.listening(), new.listening():
        story.go(60)
        late = json.dumps({"id": "late", "url": new.url, "secret": {"file": "key"}})
        policy = told(old).removesuffix("]}\n") + f", {late}]}}\n"
        store.add_revision(ROLLOUT, policy, by="ann", at_s=START_S)
        story.go(20)
        story.order("approve")
        story.go(60)

    kinds = [item["type"] for item in bodies(old)]
    assert (kinds[0], kinds[-1]) == ("rollout.approval_wanted", "rollout.promoted")
    assert bodies(new)[-1]["type"] == "rollout.promoted"
    events = [event.seq for event in EventLog(store).read(ROLLOUT, kinds=("edit",))]
    assert all(item["data"]["event_seq"] > events[0] for item in bodies(new))


def test_a_hold_that_is_longer_than_the_limit_is_told_also_without_an_event(
    store: Store, secrets: Secrets
) -> None:
    """A rollout that waits for a person writes nothing more; after the limit somebody hears, once."""
    receiver = Receiver()
    story = Story(store, told(receiver, events=["promoted"], hold_longer_than="5m"), Notifier(store, secrets))

    with receiver.listening():
        story.go(60)
        waiting = len(receiver.received)
        story.go(600)

    (body,) = bodies(receiver)
    assert waiting == 0
    assert (body["type"], body["data"]["held_s"], body["data"]["stage"]["id"]) == (
        "rollout.held_long",
        300.0,
        "full",
    )
    assert "waits for the approval of ann" in body["data"]["reason"]


def test_slack_is_told_in_its_own_shape_without_a_signature(store: Store, tmp_path: Path) -> None:
    """Its URL is the secret, lies in a file, and is in no policy and no log line."""
    receiver = Receiver(reply=reply(200, b"ok"))
    (tmp_path / "chat").write_text(f"{receiver.url}/services/T0/B0/very-secret\n")
    hook = {"id": "chat", "format": "slack", "url_from": {"file": "chat"}}
    policy = f"{GATED}  notify: {json.dumps({'webhooks': [hook]})}\n"
    story = Story(store, policy, Notifier(store, Secrets(tmp_path, {})))

    with receiver.listening():
        story.go(60)

    (got,) = receiver.received
    assert got.path == "/services/T0/B0/very-secret"
    assert "webhook-signature" not in got.headers
    assert json.loads(got.body)["text"].startswith(
        f"An approval is wanted: {ROLLOUT} (stage full, 95% at rung medium)"
    )


def test_no_word_of_a_secret_url_is_logged(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither httpx nor we write it, whether it answers, refuses, or is away."""
    caplog.set_level(logging.DEBUG)
    receiver = Receiver(reply=reply(404, b"no_service: very-secret"))
    (tmp_path / "chat").write_text(f"{receiver.url}/services/very-secret")
    hook = {"id": "chat", "format": "slack", "url_from": {"file": "chat"}}
    notifier = Notifier(store, Secrets(tmp_path, {}))
    story = Story(store, f"{GATED}  notify: {json.dumps({'webhooks': [hook]})}\n", notifier)

    story.go(60)
    away = notifier.run_once(START_S + 500).reasons
    with receiver.listening():
        refused = notifier.run_once(START_S + 900).reasons

    assert "no answer" in away[0]
    assert refused == ("webhook chat: answered 404",)
    assert "very-secret" not in caplog.text


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ({"secret": {"file": "absent"}}, "file absent in .* cannot be read"),
        ({"url": None, "url_from": {"env": "SENTEI_NO_URL"}}, "variable SENTEI_NO_URL is not there"),
        ({"url": None, "url_from": {"file": "key"}}, "the URL of file key: a URL looks like"),
    ],
)
def test_without_its_secret_nothing_is_sent(
    store: Store, secrets: Secrets, hook: dict[str, Any], words: str
) -> None:
    """Never unsigned, never to another place: the reason is said, and it goes on once the secret is there."""
    receiver = Receiver()
    notifier = Notifier(store, secrets)
    story = Story(store, told(receiver, **hook), notifier)

    with receiver.listening():
        story.go(60)
        reasons = notifier.run_once(START_S + 900).reasons

    assert receiver.received == []
    (reason,) = reasons
    assert re.search(words, reason)
    assert KEY not in reason


def test_a_redirect_is_refused_and_its_target_never_called(store: Store, secrets: Secrets) -> None:
    """Who could answer for the receiver must not send our news, or our requests, elsewhere."""
    target, receiver = Receiver(), Receiver()
    receiver.reply = reply(307, Location=f"{target.url}/elsewhere")
    notifier = Notifier(store, secrets)
    story = Story(store, told(receiver), notifier)

    with target.listening(), receiver.listening():
        story.go(60)
        reasons = notifier.run_once(START_S + 900).reasons

    assert reasons == ("webhook oncall: answered 307; redirects are not followed",)
    assert target.received == []


def drip(handler: BaseHTTPRequestHandler, received: Received) -> None:
    """A header's bytes, one now and then, without an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
    for _ in range(200):
        handler.wfile.write(b"a")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: BaseHTTPRequestHandler, received: Received) -> None:
    """A body without an end."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"x" * 65_536)


def test_an_answer_ends_in_time_and_in_size() -> None:
    """Bytes that drip do not renew the limit; a body without end is not read where nobody wants it."""
    with Receiver(reply=drip).listening() as slow:
        began_s = time.monotonic()
        with pytest.raises(CallError, match=r"no whole answer within 0\.5 s"):
            asyncio.run(call("POST", slow.url, headers={}, timeout_s=0.5))
        slow_s = time.monotonic() - began_s
    with Receiver(reply=endless).listening() as large:
        assert asyncio.run(call("POST", large.url, headers={}, timeout_s=5.0)).status == 200
        with pytest.raises(CallError, match="the answer is larger than 1000 bytes"):
            asyncio.run(call("POST", large.url, headers={}, timeout_s=5.0, max_bytes=1000))

    assert slow_s < 3


def test_a_receiver_that_hangs_delays_no_decision(store: Store, secrets: Secrets, tmp_path: Path) -> None:
    """While a delivery waits for its answer the controller ticks on at the policy's pace."""

    def hang(handler: BaseHTTPRequestHandler, received: Received) -> None:
        time.sleep(3)

    receiver = Receiver(reply=hang)
    policy = POLICY.replace("check_every: 1s", "check_every: 100ms").replace(
        "grace: 60s, after: 300s", "grace: 1ms, after: 300s"
    )

    async def run() -> tuple[int, int]:
        start_rollout(store, told(receiver, policy, timeout="5s"), now_s=time.time(), rollout_id=ROLLOUT)
        controller = Controller(
            store, mirror=None, reports=tmp_path, notifier=Notifier(store, secrets), monotonic=time.monotonic
        )
        # The loop's own pool is as small as on a machine of one core and as busy as it gets.
        crowded = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(crowded)
        crowded.submit(time.sleep, 3)
        controller.start(tick_every_s=0.1, drift_every_s=60, mirror_every_s=60, notify_every_s=0.1)
        while not receiver.received:
            await asyncio.sleep(0.02)
        before = controller.num_ticks
        await asyncio.sleep(2)
        ticks, tries = controller.num_ticks - before, len(receiver.received)
        controller.stop()
        return ticks, tries

    with receiver.listening():
        ticks, tries = asyncio.run(asyncio.wait_for(run(), 60))

    assert tries == 1  # it still waits for the first answer
    assert ticks >= 8


def test_a_controller_without_the_lease_tells_nobody(store: Store, secrets: Secrets, tmp_path: Path) -> None:
    """Of two controllers one decides, and the same one tells."""
    receiver, clock = Receiver(), FakeClock()
    clock.now_s = START_S
    story = Story(store, told(receiver), Notifier(store, secrets))
    story.go(60)
    idle = Controller(store, mirror=None, reports=tmp_path, notifier=Notifier(store, secrets), clock=clock)
    clock.now_s = START_S + story.second + 0.6

    with receiver.listening():
        idle.tick()
        idle.notify()
        none = len(receiver.received)
        clock.now_s += 600
        idle.tick()
        idle.notify()

    assert none == 0
    assert len(receiver.received) >= 1
    assert idle.status()["notify_error"] == ""


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that signs itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_https_is_only_spoken_with_whom_the_system_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's certificate is refused before a byte of ours is sent; SSL_CERT_FILE names one's own."""
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Receiver(tls=context)
    url = f"https://localhost:{receiver.port}/hook"

    with receiver.listening():
        calls._tls.cache_clear()
        with pytest.raises(CallError, match="certificate verify failed"):
            asyncio.run(call("POST", url, headers={}, content=b"news", timeout_s=5.0))
        strangers = len(receiver.received)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        calls._tls.cache_clear()
        answer = asyncio.run(call("POST", url, headers={}, content=b"news", timeout_s=5.0))
    calls._tls.cache_clear()

    assert strangers == 0
    assert answer.is_ok
    assert [item.body for item in receiver.received] == [b"news"]
