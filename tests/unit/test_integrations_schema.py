"""What a policy may say of the outside: addresses, secrets by name, receivers; each refusal in words."""

from __future__ import annotations

from typing import Any

import pytest

from sentei.policies.edits import check_edit, review_edit
from sentei.policies.review.advice import find_advice
from sentei.policies.review.forecast import Expected, forecast
from sentei.policies.review.sentences import explain
from sentei.policies.schema.integrations.endpoint import why_no_url
from sentei.policies.schema.integrations.notify import HAPPENINGS
from sentei.policies.schema.load import PolicyError
from sentei.policies.schema.policy import Policy
from sentei.policies.simulation.plan import make_plan
from tests.strategies_policy import make_policy, put

HOOK = {"id": "oncall", "url": "https://hooks.example.com/x", "secret": {"file": "key"}}
CHAT = {"id": "chat", "format": "slack", "url_from": {"env": "SENTEI_CHAT_URL"}}


def hooks(*items: dict[str, Any]) -> Policy:
    """A policy that tells these."""
    return make_policy(put("notify.webhooks", list(items)))


def faults(*items: dict[str, Any]) -> list[str]:
    """What is wrong with them, each with its place."""
    with pytest.raises(PolicyError) as caught:
        hooks(*items)
    return [f"{item.path}: {item.message}" for item in caught.value.errors]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/a?b=c",
        "https://[2001:db8::1]:8443/",
        "http://127.0.0.1:9000/hook",
        "http://localhost/hook",
        "http://[::1]/hook",
    ],
)
def test_https_and_loopback_may_be_called(url: str) -> None:
    """Plain http never leaves the machine."""
    assert why_no_url(url) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://hooks.example.com/x", "plain http is for loopback only"),
        ("http://10.0.0.1/x", "plain http is for loopback only"),
        ("http://127.0.0.1.example.com/x", "plain http is for loopback only"),
        ("http://localhost.example.com/x", "plain http is for loopback only"),
        ("ftp://hooks.example.com/x", "a URL looks like"),
        ("file:///etc/passwd", "a URL looks like"),
        ("https:///x", "a URL looks like"),
        ("hooks.example.com", "a URL looks like"),
        ("https://ann:secret@hooks.example.com/", "no user and no password"),
        ("https://hooks.example.com/#top", "a fragment"),
        ("https://hooks.example.com:99999/", "this is no URL"),
        ("https://[::1/", "this is no URL"),
        ("https://hooks.example.com/\r\nx-evil: 1", "plain characters"),
        ("https://hооks.example.com/", "plain characters"),
        ("https://hooks.example.com/a b", "plain characters"),
        ("https://" + "x" * 2048, "plain characters"),
        ("", "plain characters"),
    ],
)
def test_other_addresses_are_refused_by_their_reason(url: str, words: str) -> None:
    """Schemes, users, tricks with names and line ends."""
    assert words in (why_no_url(url) or "")


@pytest.mark.parametrize(
    ("item", "place", "words"),
    [
        ({"url": None}, "url", "exactly one of url and url_from"),
        ({"url_from": {"file": "x"}}, "url", "exactly one of url and url_from"),
        ({"url": "http://hooks.example.com"}, "url", "use https"),
        ({"url": "https://hooks.slack.com/services/T/B/x"}, "url", "it is a secret"),
        ({"secret": None}, "secret", "is required"),
        ({"secret": {}}, "secret", "exactly one of file and env"),
        ({"secret": {"file": "a", "env": "SENTEI_A"}}, "secret", "exactly one of file and env"),
        ({"secret": {"file": "../etc/passwd"}}, "secret.file", "pattern"),
        ({"secret": {"env": "AWS_SECRET_ACCESS_KEY"}}, "secret.env", "pattern"),
        ({"secret": {"env": "SENTEI_USER_KEY"}}, "secret.env", "a secret of the app's own"),
        ({"url_from": {"env": "SENTEI_API_KEYS"}, "url": None}, "url_from.env", "a secret of the app's own"),
        ({"format": "slack"}, "secret", "Slack checks no signature"),
        ({"timeout": "60s"}, "timeout", "must lie in 100ms to 30s"),
        ({"hold_longer_than": "10s"}, "hold_longer_than", "at least 1m"),
        ({"events": []}, "events", "at least 1"),
        ({"events": ["promoted", "promoted"]}, "events", '"promoted" is given 2 times'),
        ({"events": ["promotion"]}, "events[0]", "promoted"),
        ({"url_from": {}, "url": None}, "url_from", "exactly one of file and env"),
    ],
)
def test_a_receiver_that_cannot_be_told_is_refused_by_its_field(
    item: dict[str, Any], place: str, words: str
) -> None:
    """`policy lint` says field and way out."""
    found = faults(HOOK | item)

    assert any(text.startswith(f"spec.notify.webhooks[0].{place}: ") and words in text for text in found), (
        found
    )


def test_two_receivers_of_one_id_are_refused() -> None:
    """An id names a place in the log."""
    assert faults(HOOK, HOOK) == ['spec.notify.webhooks: webhook id "oncall" is used 2 times; ids are unique']


def test_what_is_not_said_has_a_default_that_tells_all() -> None:
    """All happenings, JSON, five seconds, and no limit of a hold."""
    (item,) = hooks(HOOK).spec.notify.webhooks

    assert (item.events, item.format, item.timeout, item.hold_longer_than) == (HAPPENINGS, "json", 5.0, None)


def test_explain_says_who_is_told_what_and_no_more_of_a_url_than_its_host() -> None:
    """A page that is passed around names the place, not the path."""
    policy = hooks(HOOK | {"events": ["rolled_back"], "hold_longer_than": "6h"}, CHAT)

    text = "\n".join(explain(policy, forecast(policy, Expected())))

    assert (
        "oncall (hooks.example.com) gets JSON signed with file key of rolled back and a stage held for 6h"
        in text
    )
    assert "chat (the URL of variable SENTEI_CHAT_URL) gets a Slack message of" in text
    assert "hooks.example.com/x" not in text


def test_lint_warns_of_news_that_are_none_and_of_people_who_do_not_hear() -> None:
    """A limit below what a stage always takes; an approval that nobody is told of."""

    def change(document: dict[str, Any]) -> None:
        put("notify.webhooks", [HOOK | {"events": ["promoted"], "hold_longer_than": "1m"}])(document)
        put("stages.3.bake", "2h")(document)

    remarks = find_advice(make_policy(change), Expected())

    found = {".".join(map(str, item.path)): item.message for item in remarks}

    assert (
        "stage full always takes 2h: each rollout is told of it"
        in found["notify.webhooks.0.hold_longer_than"]
    )
    assert "stage half-medium waits for an approval, and no webhook" in found["notify.webhooks"]


def test_a_receiver_may_be_added_and_moved_live_and_not_taken_out() -> None:
    """Who is told may change while the rollout runs; that somebody is told may not end."""
    old = hooks(HOOK)

    added = check_edit(old, hooks(HOOK, CHAT))
    moved = check_edit(old, hooks(HOOK | {"url": "https://new.example.com/"}))

    assert [item.path for item in added] == ["spec.notify.webhooks[chat]"]
    assert [item.path for item in moved] == ["spec.notify.webhooks[oncall].url"]
    with pytest.raises(ValueError, match="cannot be taken out"):
        check_edit(hooks(HOOK, CHAT), old)


def gate(**changes: Any) -> dict[str, Any]:
    """The webhook of an approval."""
    return {"id": "ci", "url": "https://ci.example.com/gate"} | changes


@pytest.mark.parametrize(
    ("approval", "place", "words"),
    [
        ({}, "by", "nobody could approve"),
        ({"by": ["gate:ci"]}, "by[0]", '"gate:" is how the log names a webhook'),
        ({"webhook": gate(url="http://ci.example.com")}, "webhook.url", "use https"),
        ({"webhook": gate(url=None)}, "webhook.url", "exactly one of"),
        ({"webhook": gate(every="10ms")}, "webhook.every", "at least 1s"),
        ({"webhook": gate(timeout="2m")}, "webhook.timeout", "must lie in"),
        ({"webhook": gate(secret={})}, "webhook.secret", "exactly one of file and env"),
        ({"webhook": gate(retries=3)}, "webhook.retries", "unknown key"),
    ],
)
def test_a_gate_that_cannot_be_asked_is_refused_by_its_field(
    approval: dict[str, Any], place: str, words: str
) -> None:
    """People, a webhook, or both; nothing that says nothing."""
    with pytest.raises(PolicyError) as caught:
        make_policy(put("stages.2.approval", approval))

    found = [f"{item.path}: {item.message}" for item in caught.value.errors]
    assert any(text.startswith(f"spec.stages[2].approval.{place}: ") and words in text for text in found), (
        found
    )


def test_explain_names_the_gate_beside_the_people() -> None:
    """Who may open it, and where it is asked."""
    policy = make_policy(put("stages.2.approval", {"by": ["ann"], "webhook": gate()}))

    text = "\n".join(explain(policy, forecast(policy, Expected())))

    assert "then ann or gate:ci (ci.example.com) must approve" in text


@pytest.mark.parametrize(
    ("old", "new", "is_safer"),
    [
        ({"by": ["ann"], "webhook": gate()}, {"by": ["ann"]}, True),
        ({"by": ["ann"], "webhook": gate()}, {"webhook": gate()}, True),
        ({"by": ["ann"]}, {"by": ["ann"], "webhook": gate()}, False),
        ({"webhook": gate()}, {"webhook": gate(url="https://other.example.com")}, False),
        (None, {"webhook": gate()}, True),
    ],
)
def test_a_gate_that_runs_may_only_be_opened_by_fewer(old: Any, new: Any, is_safer: bool) -> None:
    """A webhook is one more who may open it, and another address is another one."""
    before, after = (make_policy(put("stages.2.approval", item)) for item in (old, new))

    (change,) = review_edit(before, after)

    assert (change.refusal == "") is is_safer


def metric(**changes: Any) -> dict[str, Any]:
    """A metric of one's own."""
    found = {"id": "cart", "url": "https://prometheus.example.com", "query": "up", "bound": {"max": 1}}
    return found | {"window": "5m"} | changes


@pytest.mark.parametrize(
    ("item", "place", "words"),
    [
        ({"bound": {}}, "bound", "give max, min or both"),
        ({"bound": {"min": 2, "max": 1}}, "bound.min", "must lie below max, 1"),
        ({"bound": {"max": "5%"}}, "bound.max", "a finite number is wanted"),
        ({"bound": {"max": True}}, "bound.max", "a finite number is wanted"),
        ({"query": "  "}, "query", "is empty"),
        ({"query": "x" * 2001}, "query", "at most 2000"),
        ({"window": "30s"}, "window", "at least 2 times every (30s)"),
        ({"window": "8d"}, "window", "at most 7d"),
        ({"every": "10ms"}, "every", "at least 1s"),
        ({"timeout": "1h"}, "timeout", "must lie in"),
        ({"url": "https://prometheus.example.com/?a=b"}, "url", "before /api/v1/query"),
        ({"url": "http://prometheus.example.com"}, "url", "use https"),
        ({"token": {}}, "token", "exactly one of file and env"),
        ({"token": {"env": "SENTEI_ADMIN_TOKEN"}}, "token.env", "a secret of the app's own"),
        ({"action": "freeze"}, "action", "rollback"),
    ],
)
def test_a_metric_that_cannot_be_asked_for_is_refused_by_its_field(
    item: dict[str, Any], place: str, words: str
) -> None:
    """`policy lint` says field and way out."""
    with pytest.raises(PolicyError) as caught:
        make_policy(put("guardrails.prometheus", [metric(**item)]))

    found = [f"{error.path}: {error.message}" for error in caught.value.errors]
    assert any(
        text.startswith(f"spec.guardrails.prometheus[0].{place}: ") and words in text for text in found
    ), found


def test_a_metric_has_an_id_of_its_own_among_all_gates() -> None:
    """An id says who rolled back."""
    with pytest.raises(PolicyError, match='id "agree" is used 2 times'):
        make_policy(put("guardrails.prometheus", [metric(id="agree")]))


def test_explain_and_forecast_count_the_window_of_a_metric() -> None:
    """A stage takes a window at least; the sentence says bound, pace and what it does."""
    policy = make_policy(
        put("guardrails.prometheus", [metric(bound={"min": -1, "max": 2}, action="rollback")])
    )

    stages = forecast(policy, Expected())

    assert [stage.best_s for stage in stages] == [300.0] * 4
    assert list(make_plan(policy).dwell_s) == [300.0] * 4
    assert (
        "cart, asked of prometheus.example.com each 30s: growth waits until it was within its bound "
        "(min -1 and max 2) for 5m of the stage; out of it for 5m: everybody goes back to dense. "
        "No number never passes."
    ) in "\n".join(explain(policy, stages))
