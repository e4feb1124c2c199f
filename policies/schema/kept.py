"""The policy of a running rollout as it is kept: resolved, with every default of the version that started it.

A file leaves much to defaults, and a release may add or change them. So the event that starts a rollout, or
edits its policy, carries the whole document with its schema and its digest, and whoever takes the rollout up
reads that: same phase, same stage, same evidence. The digest is a name from then on; it is never made again.

READERS turns the document of an older schema into one of the next. A release that takes a field away, or
gives one another default, raises SCHEMA and adds a reader that says what the field meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from sentei.errors import SenteiError
from sentei.policies.schema.load import PolicyError, load_policy, read_document
from sentei.policies.schema.policy import Kept, Policy, to_document

Document = dict[str, Any]

SCHEMA = 4

# Schema 1 kept the text only, and knew words that had exactly one legal value.
_GONE_1 = (
    "spec.variants",
    "spec.assignment.on_slice_change",
    "spec.audit.select.by",
    "spec.audit.noise_floor",
    "spec.audit.missing.promote",
    "spec.audit.missing.rollback",
    "spec.benefit.per",
    "spec.benefit.if_disproved",
    "spec.signals.source",
    "spec.signals.calibrate",
    "spec.breaker.request",
    "spec.breaker.variant.action",
    "spec.rollback.mode",
    "spec.rollback.quarantine",
    "spec.rollback.retry.fresh_evidence",
    "spec.schedule.misfire",
)
_DEFAULTS_1: Document = {  # of spec; a list holds the defaults of each of its items
    "mode": "enforce",
    "assignment": {"unit": "session_id"},
    "stages": [{"hold_min": "0s"}],
    "advance": {"min_served_units": 0, "on_max": "hold"},
    "audit": {"values": {"kl": {"cap": 2.0}}, "missing": {"max_share": 0.10}},
    "guardrails": {"alpha_total": 0.05, "detector_arl": 10_000, "items": [{"per": "slice"}]},
    "signals": [{"action": "hold", "consecutive": 1, "window_units": 100, "no_data": "hold"}],
    "breaker": {"variant": {"no_replica_for": "30s"}},
    "data": {"no_data": {"then": "hold", "finally": "rollback"}},
    "rollback": {"retry": {"max": 0, "cool_off": "0s"}},
    "schedule": {"check_every": "60s", "freeze": []},
    "record": {"mlflow": {"experiment": "sentei-rollouts"}},
}

_DEFAULTS_3: Document = {"benefit": [{"need": "not_disproved"}]}
_DEFAULTS_2: Document = {"audit": {"select": {"period": "10m"}, "missing": {"window": "1h"}}}


class KeptPolicyError(SenteiError, ValueError):
    """A kept policy that this version cannot read."""


def keep_policy(policy: Policy, text: str) -> Document:
    """What an event says of the policy that it starts or takes; `text` is the file, for people."""
    return {
        "policy_digest": policy.digest,
        "policy_schema": SCHEMA,
        "policy": to_document(policy),
        "policy_text": text,
    }


def read_kept(payload: Mapping[str, Any]) -> Policy:
    """The policy behind such an event of this or any older version; KeptPolicyError if it is newer."""
    schema, digest = payload.get("policy_schema", 1), payload["policy_digest"]
    if schema == 1:
        return _read(1, read_document(payload["policy_text"]), digest)
    return _read(schema, payload["policy"], digest)


def read_text(text: str, source: str) -> Policy:
    """The policy of a rollout that has not begun: a file of this version or of schema 1; PolicyError else."""
    try:
        return load_policy(text, source)
    except PolicyError as error:
        try:
            return _read(1, read_document(text, source), digest="")
        except (ValidationError, AttributeError, KeyError, TypeError):
            raise error from None


def _read(schema: int, document: Document, digest: str) -> Policy:
    if schema > SCHEMA:
        raise KeptPolicyError(
            f"policy {digest[:12]} is kept in schema {schema}, this Sentei reads up to {SCHEMA}: "
            "use the Sentei that started the rollout, or a newer one"
        )
    for number in range(schema, SCHEMA):
        document = READERS[number](document)
    return Policy.model_validate(document, context=Kept(digest))


def _from_1(document: Document) -> Document:
    """Take the words away that could say one thing only, and write out the defaults of then."""
    for path in _GONE_1:
        _drop(document, path.split("."))
    _fill(document["spec"], _DEFAULTS_1)
    for stage in document["spec"]["stages"]:
        if stage.get("approval"):
            _fill(stage, {"approval": {"when": "after_evidence"}})
    return document


def _drop(place: Any, path: list[str]) -> None:
    """Take out what stands at that path; a path goes through every item of a list."""
    for item in place if isinstance(place, list) else [place]:
        if isinstance(item, dict) and len(path) == 1:
            item.pop(path[0], None)
        elif isinstance(item, dict) and item.get(path[0]) is not None:
            _drop(item[path[0]], path[1:])


def _fill(place: Document, defaults: Document) -> None:
    """Write every default that is absent."""
    for name, default in defaults.items():
        if isinstance(default, list) and default:
            for item in place.get(name, []):
                _fill(item, default[0])
        elif isinstance(default, dict):
            _fill(place.setdefault(name, {}), default)
        else:
            place.setdefault(name, default)


def _from_2(document: Document) -> Document:
    """A session was a unit once for ever, a missing audit for ever missing; now both have a time."""
    _fill(document["spec"], _DEFAULTS_2)
    return document


def _from_3(document: Document) -> Document:
    """A gain had to be not disproved; now it has to be proven."""
    _fill(document["spec"], _DEFAULTS_3)
    return document


READERS: Mapping[int, Callable[[Document], Document]] = {1: _from_1, 2: _from_2, 3: _from_3}
