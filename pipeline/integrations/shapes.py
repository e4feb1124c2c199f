"""The bodies of notices: JSON, signed as the Standard Webhooks specification has it, and Slack's blocks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from datetime import UTC, datetime
from typing import Any

from sentei.pipeline.integrations.calls import CallError
from sentei.pipeline.integrations.notices import Notice
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.units import format_duration

KEY_PREFIX = "whsec_"
LEAST_KEY_BYTES = 24
MAX_REASON_CHARS = 2000
MAX_SLACK_CHARS = 2500  # of a section's 3,000, after which Slack refuses the message
_TITLES = {
    "rolled_back": "Rolled back to dense",
    "slice_fell": "A slice fell back",
    "sheltered": "Rollback owed: dense is down",
    "paused": "Paused",
    "dense_down": "Dense is down",
    "audits_blind": "No news, or no audit is scored",
    "metric_lost": "A metric gives no number",
    "approval_wanted": "An approval is wanted",
    "promoted": "Promoted",
    "held_long": "Held for long",
}


def to_json_body(notice: Notice, policy: Policy) -> bytes:
    """One JSON document: stable keys, units in names, times also as people read them."""
    stage = policy.stage(notice.stage_id)
    document = {
        "id": notice.notice_id,
        "type": f"rollout.{notice.kind}",
        "timestamp": readable_moment(notice.at_s),
        "data": {
            "rollout_id": notice.rollout_id,
            "policy": policy.metadata.name,
            "owner": policy.metadata.owner,
            "at_s": notice.at_s,
            "event_seq": notice.event_seq,
            "event_hash": notice.event_hash,
            "phase": notice.phase,
            "outcome": notice.outcome,
            "stage": {"id": stage.id, "share": stage.share, "rung": stage.rung},
            "slice": notice.slice_id,
            "by": notice.by,
            "waits_for": notice.waits_for,
            "held_s": notice.held_s,
            "reason": _clip(notice.reason),
        },
    }
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode()


def to_slack_body(notice: Notice, policy: Policy) -> bytes:
    """A message for a Slack incoming webhook: `text` for the notification, blocks for the channel."""
    stage = policy.stage(notice.stage_id)
    title = f"{_TITLES[notice.kind]}: {notice.rollout_id}"
    where = f"stage {stage.id}, {stage.share:.0%} at rung {stage.rung}"
    if notice.slice_id is not None:
        where += f", slice {notice.slice_id}"
    if notice.held_s is not None:
        where += f", for more than {format_duration(notice.held_s)}"
    owner = f", owner {policy.metadata.owner}" if policy.metadata.owner else ""
    context = f"{readable_moment(notice.at_s)}, policy {policy.metadata.name}{owner}, "
    context += f"event {notice.event_seq}, {notice.notice_id}"
    reason = _escape(_clip(notice.reason))
    if len(reason) > MAX_SLACK_CHARS:  # signs grow fivefold when they are escaped: cut before, by as much
        reason = _escape(_clip(notice.reason)[: MAX_SLACK_CHARS // 5])
    document: dict[str, Any] = {
        "text": f"{_escape(title)} ({_escape(where)}): {reason}",
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": title[:150]}},
            {"type": "section", "text": {"type": "mrkdwn", "text": f"{reason}\n_{_escape(where)}_"}},
            {"type": "context", "elements": [{"type": "mrkdwn", "text": _escape(context)}]},
        ],
    }
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode()


def sign(message_id: str, body: bytes, secret: str, at_s: int) -> dict[str, str]:
    """The headers that say who sent it and when: webhook-id, webhook-timestamp, webhook-signature (v1)."""
    key = _key(secret)
    digest = hmac.new(
        key, b".".join((message_id.encode(), str(at_s).encode(), body)), hashlib.sha256
    ).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def _key(secret: str) -> bytes:
    """The bytes of a secret: base64 after `whsec_`, else the text itself."""
    try:
        is_coded = secret.startswith(KEY_PREFIX)
        key = (
            base64.b64decode(secret.removeprefix(KEY_PREFIX), validate=True) if is_coded else secret.encode()
        )
    except binascii.Error as error:
        raise CallError(f"the secret starts with {KEY_PREFIX}, but what follows is no base64") from error
    if len(key) < LEAST_KEY_BYTES:
        raise CallError(f"the secret has {len(key)} bytes; at least {LEAST_KEY_BYTES} are wanted")
    return key


def readable_moment(at_s: float) -> str:
    """Epoch seconds as RFC 3339 has them, to the millisecond, in UTC."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _clip(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARS else f"{text[: MAX_REASON_CHARS - 3]}..."


def _escape(text: str) -> str:
    """Slack's three signs; so no text can call a channel or hide an address behind a word."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
