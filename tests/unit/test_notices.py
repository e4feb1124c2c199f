"""What of the event log is news, and in which words it is told."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sentei.monitors.events import Event, EventLog
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import CallError, Secrets
from sentei.pipeline.integrations.notices import Notice, Place, read_event, read_time, told_time
from sentei.pipeline.integrations.shapes import sign, to_json_body, to_slack_body
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from sentei.policies.schema.integrations.endpoint import SecretSource
from sentei.policies.schema.policy import Policy
from sentei.policies.state import state_from_json, state_to_json
from tests.fakes_records import POLICY, ROLLOUT, START_S
from tests.stories_rollout import serve
from tests.strategies_policy import make_policy

GATED = POLICY.replace(
    "{id: half, share: 50%, rung: medium}", "{id: half, share: 50%, rung: medium, approval: {by: [ann]}}"
)


def play(
    folder: Path, seconds: int, policy: str = GATED, quiet_from: int = 10**9, **traffic: float
) -> list[Event]:
    """The events of a rollout with traffic until `quiet_from`."""
    with Store.open(f"sqlite:///{folder}/state.db") as store:
        start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT)
        runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("a"))
        for second in range(seconds):
            if second < quiet_from:
                serve(store, second, **traffic)  # type: ignore[arg-type]
            runner.tick(START_S + second + 0.5)
        return list(EventLog(store).read(ROLLOUT))


def read_all(events: list[Event], place: Place | None = None) -> tuple[list[Notice], Place]:
    """Everything that the events tell."""
    place, found = place or Place(), []
    for event in events:
        news, place = read_event(place, event)
        found += news
    return found, place


def test_an_approval_is_wanted_once_while_the_stage_waits_for_it(tmp_path: Path) -> None:
    """Growing evidence during the wait is no news; the words are those of the decision."""
    events = play(tmp_path, 60)

    found, _ = read_all(events)

    assert [(item.kind, item.stage_id, item.waits_for) for item in found] == [
        ("approval_wanted", "half", "approval")
    ]
    assert "waits for the approval of ann" in found[0].reason


def test_a_stage_over_its_longest_time_wants_an_approval(tmp_path: Path) -> None:
    """With on_max: hold only a person moves it, so it waits for the approval and people are told."""
    policy = POLICY.replace("share: 0, rung: medium}", "share: 0, rung: medium, max: 10s}")
    events = play(tmp_path, 20, policy, disagreement=0.1)

    found, _ = read_all(events)

    assert [(item.kind, item.stage_id, item.waits_for) for item in found] == [
        ("approval_wanted", "shadow", "approval")
    ]
    assert found[0].reason == "stage shadow took longer than 10s; it goes on only when approved"


def test_a_rollback_is_told_with_what_proved_it(tmp_path: Path) -> None:
    """Reason, guardrail and outcome are those of the event."""
    events = play(tmp_path, 10, disagreement=0.6)

    (found,), _ = read_all(events)

    assert (found.kind, found.outcome, found.by) == ("rolled_back", "rolled_back", "agree")
    assert found.reason.startswith("agree in long: mean 0.6 over bound 0.1")


def test_silence_is_told_in_every_phase_once_until_news_come(tmp_path: Path) -> None:
    """After no_data.grace without a record the log has an alert, which is the news; then a rollback."""
    events = play(tmp_path, 320, quiet_from=3)

    found, _ = read_all(events)

    assert [item.kind for item in found] == ["audits_blind", "rolled_back"]
    assert "no news for" in found[0].reason
    assert found[1].by == "no_data"


def test_a_reader_that_stopped_anywhere_says_the_same(tmp_path: Path) -> None:
    """A place goes through its bytes; the news and their ids do not depend on where it was read from."""
    events = play(tmp_path, 320, quiet_from=3)
    whole, end = read_all(events)

    for index in range(len(events)):
        first, place = read_all(events[:index])
        rest, last = read_all(events[index:], Place.from_json(place.to_json()))
        assert (first + rest, last) == (whole, end)
    assert len({item.notice_id for item in whole}) == len(whole)
    assert not any("." in item.notice_id for item in whole)  # the signature parts its fields by full stops


def test_a_long_hold_is_told_once_of_each_stay_and_at_its_own_time(tmp_path: Path) -> None:
    """Its time is when the limit was passed, however late somebody looks."""
    events = play(tmp_path, 60)
    _, place = read_all(events)
    assert place.stay is not None
    since_s = place.stay.since_s

    early = read_time(place, events[-1], 600.0, since_s + 599)
    found = read_time(place, events[-1], 600.0, since_s + 5000)

    assert early is None
    assert found is not None
    assert (found.kind, found.at_s, found.held_s, found.stage_id) == (
        "held_long",
        since_s + 600,
        600.0,
        "half",
    )
    assert read_time(told_time(place), events[-1], 600.0, since_s + 5000) is None
    assert read_time(place, events[-1], None, since_s + 5000) is None


def test_what_is_over_is_not_held(tmp_path: Path) -> None:
    """A rollout that was rolled back stands in its phase for ever, and that is no news."""
    events = play(tmp_path, 10, disagreement=0.6)
    _, over = read_all(events)

    assert read_time(over, events[-1], 600.0, START_S + 9000) is None


def test_dense_that_is_down_and_a_shelter_are_news(tmp_path: Path) -> None:
    """An alert says which of the two it is: dense down here, with the shelter that follows it."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as store:
        start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT)
        replicas = {"dense": 1, "sparse": 1}
        runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("a", replicas=lambda: replicas))
        for second in range(9):
            serve(store, second)
            runner.tick(START_S + second + 0.5)
        replicas["dense"] = 0
        for second in range(9, 40):
            serve(store, second, disagreement=0.9)
            runner.tick(START_S + second + 0.5)
        found, _ = read_all(list(EventLog(store).read(ROLLOUT)))

    kinds = [item.kind for item in found]
    assert kinds[-2:] == ["dense_down", "sheltered"]
    assert found[-1].phase == "sheltered"


def test_alerts_say_themselves_what_they_are_about(tmp_path: Path) -> None:
    """In whichever order they stand in an event; in logs of before, which did not say it, as it was then."""
    event = next(item for item in play(tmp_path, 320, quiet_from=3) if item.kind == "alert")
    state = replace(state_from_json(event.state), dense_down_since_s=START_S)
    alerts = [
        {"kind": "alert", "detail": "no news", "slice_id": None, "about": "audits_blind"},
        {"kind": "alert", "detail": "no dense", "slice_id": None, "about": "dense_down"},
    ]

    def told(actions: list[dict[str, Any]]) -> list[tuple[str, str]]:
        payload = {**event.payload, "actions": actions}
        found, _ = read_event(Place(), replace(event, state=state_to_json(state).decode(), payload=payload))
        return [(item.kind, item.reason) for item in found]

    before = [{**action, "detail": "", "about": None} for action in alerts]
    assert event.payload["actions"][0]["about"] == "audits_blind"
    assert told(alerts) == [("audits_blind", "no news"), ("dense_down", "no dense")]
    assert told(before) == [("dense_down", ""), ("audits_blind", "")]


@pytest.fixture
def policy() -> Policy:
    """A policy with an owner."""

    def own(document: dict[str, Any]) -> None:
        document["metadata"]["owner"] = "a & b <team>"

    return make_policy(own)


def notice(**changes: Any) -> Notice:
    """A fall of one slice."""
    found = Notice(
        notice_id="ntc_0",
        kind="slice_fell",
        at_s=1_700_000_000.25,
        rollout_id="r-1",
        event_seq=7,
        event_hash="f" * 64,
        policy_digest="d",
        phase="running",
        stage_id="half",
        reason="agree in long: <!channel> & more",
        slice_id="long",
    )
    return replace(found, **changes)


def test_the_json_body_has_stable_keys_with_units(policy: Policy) -> None:
    """Receivers parse it: type, time, and everything that says where it happened."""
    body = json.loads(to_json_body(notice(), policy))

    assert (body["id"], body["type"]) == ("ntc_0", "rollout.slice_fell")
    assert body["timestamp"] == "2023-11-14T22:13:20.250Z"
    assert body["data"] == {
        "rollout_id": "r-1",
        "policy": "two-slices",
        "owner": "a & b <team>",
        "at_s": 1_700_000_000.25,
        "event_seq": 7,
        "event_hash": "f" * 64,
        "phase": "running",
        "outcome": None,
        "stage": {"id": "half", "share": 0.5, "rung": "mild"},
        "slice": "long",
        "by": None,
        "waits_for": None,
        "held_s": None,
        "reason": "agree in long: <!channel> & more",
    }


def test_slack_gets_text_and_blocks_in_which_no_word_calls_a_channel(policy: Policy) -> None:
    """Its three signs are escaped, and nothing is longer than Slack takes."""
    body = json.loads(to_slack_body(notice(reason="<!channel> & " + "x" * 5000), policy))

    header, section, context = body["blocks"]
    assert (header["type"], section["type"], context["type"]) == ("header", "section", "context")
    assert header["text"]["text"] == "A slice fell back: r-1"
    assert "&lt;!channel&gt; &amp;" in section["text"]["text"]
    assert "<!channel>" not in json.dumps(body)
    assert len(section["text"]["text"]) < 3000
    assert "stage half, 50% at rung mild, slice long" in body["text"]
    assert "event 7, ntc_0" in context["elements"][0]["text"]


def test_slack_takes_a_reason_of_signs_that_grow_when_they_are_escaped(policy: Policy) -> None:
    """A message that Slack refuses would hold up all that follow it."""
    section = json.loads(to_slack_body(notice(reason="<&>" * 600), policy))["blocks"][1]

    assert len(section["text"]["text"]) < 3000
    assert section["text"]["text"].startswith("&lt;&amp;&gt;")


def test_the_signature_is_that_of_the_standard_webhooks_specification() -> None:
    """Its published example: any library for it verifies ours."""
    headers = sign(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        1614265330,
    )

    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


def test_a_plain_secret_is_its_own_key() -> None:
    """Without the prefix the text is the key; HMAC-SHA256 over id, time and body."""
    secret, body = "k" * 32, b"{}"
    expected = hmac.new(secret.encode(), b"ntc_1.12.{}", hashlib.sha256).digest()

    assert sign("ntc_1", body, secret, 12)["webhook-signature"] == f"v1,{base64.b64encode(expected).decode()}"


@pytest.mark.parametrize(("secret", "words"), [("short", "at least 24"), ("whsec_%%%", "no base64")])
def test_a_weak_or_broken_secret_signs_nothing(secret: str, words: str) -> None:
    """The message says what is wrong, and not what the secret is."""
    with pytest.raises(CallError, match=words) as caught:
        sign("ntc_1", b"{}", secret, 12)

    assert secret not in str(caught.value).replace("whsec_,", "")


def test_secrets_are_read_where_they_lie_at_each_use(tmp_path: Path) -> None:
    """A file that was renewed counts at once; one that is absent, empty or huge is an error with its name."""
    environ: dict[str, str] = {}
    secrets, file = Secrets(tmp_path, environ), SecretSource(file="key")

    with pytest.raises(CallError, match=r"file key in .* cannot be read: FileNotFoundError"):
        secrets.read(file)
    for text in ("first\n", "second\n"):
        (tmp_path / "key").write_text(text)
        assert secrets.read(file) == text.strip()
    (tmp_path / "key").write_text("first\nsecond")
    with pytest.raises(CallError, match="more than one line"):
        secrets.read(file)
    (tmp_path / "key").write_text("x" * 5000)
    with pytest.raises(CallError, match="larger than 4096 bytes"):
        secrets.read(file)
    with pytest.raises(CallError, match="variable SENTEI_KEY is not there"):
        secrets.read(SecretSource(env="SENTEI_KEY"))
    environ["SENTEI_KEY"] = "value"
    assert secrets.read(SecretSource(env="SENTEI_KEY")) == "value"
