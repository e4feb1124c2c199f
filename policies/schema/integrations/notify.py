"""The section `notify`: who hears of what a rollout does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from sentei.policies.schema.faults import Fault, Path
from sentei.policies.schema.integrations.endpoint import (
    Endpoint,
    SecretSource,
    call_time_faults,
    endpoint_faults,
    source_faults,
)
from sentei.policies.schema.operations import Identifier, Section
from sentei.policies.schema.units import Seconds

Happening = Literal[
    "rolled_back",
    "slice_fell",
    "sheltered",
    "paused",
    "dense_down",
    "audits_blind",
    "metric_lost",
    "approval_wanted",
    "promoted",
]
HAPPENINGS: tuple[Happening, ...] = get_args(Happening)
HELD_LONG = "held_long"  # beside these: of receivers that say how long is long
LEAST_HOLD_S = 60.0


class Webhook(Endpoint):
    """One receiver: it gets each event at least once, in the order of the log."""

    id: Identifier
    format: Literal["json", "slack"] = Field(default="json", description="shape of the body")
    secret: SecretSource | None = Field(
        default=None, description="of format json: the key of the signature (HMAC-SHA256)"
    )
    events: Annotated[tuple[Happening, ...], Field(min_length=1)] = Field(
        default=HAPPENINGS, description="what it is told"
    )
    hold_longer_than: Seconds | None = Field(
        default=None, description="then it is told that a stage neither ended nor was rolled back for so long"
    )
    timeout: Seconds = Field(default=5.0, description="longest time of one delivery")


class Notify(Section):
    """Who is told; a receiver that is down delays no decision, and gets everything when it is back."""

    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=8)] = ()


def receivers_are_sound(notify: Notify) -> Iterator[Fault]:
    """Each receiver has one address, one shape with the secret that it needs, and its own id."""
    for word, count in Counter(item.id for item in notify.webhooks).items():
        if count > 1:
            yield Fault(
                ("notify", "webhooks"), word, f'webhook id "{word}" is used {count} times; ids are unique'
            )
    for index, item in enumerate(notify.webhooks):
        path: Path = ("notify", "webhooks", index)
        yield from endpoint_faults(path, item)
        yield from _secret_faults(path, item)
        yield from call_time_faults((*path, "timeout"), item.timeout)
        if item.hold_longer_than is not None and item.hold_longer_than < LEAST_HOLD_S:
            yield Fault((*path, "hold_longer_than"), item.hold_longer_than, "must be at least 1m")
        for word, count in Counter(item.events).items():
            if count > 1:
                yield Fault((*path, "events"), word, f'"{word}" is given {count} times')


def _secret_faults(path: Path, item: Webhook) -> Iterator[Fault]:
    if item.format == "slack" and item.secret is not None:
        message = "Slack checks no signature, its URL is the secret; leave secret out"
        yield Fault((*path, "secret"), None, message)
    elif item.format == "json" and item.secret is None:
        message = "is required, such as {file: webhook-key}: else nobody can tell who sent it"
        yield Fault((*path, "secret"), None, message)
    elif item.secret is not None:
        yield from source_faults((*path, "secret"), item.secret)
