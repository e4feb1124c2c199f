"""The webhook of an approval: a system that is asked whether a stage may end."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from sentei.policies.schema.faults import Fault, Path
from sentei.policies.schema.integrations.endpoint import (
    Endpoint,
    SecretSource,
    call_time_faults,
    endpoint_faults,
    source_faults,
)
from sentei.policies.schema.operations import Identifier
from sentei.policies.schema.units import Seconds

GATE_ORDER = "gate"  # the kind of command by which an answer comes in; no operator can give it
GATE_NAME = "gate:"
LEAST_EVERY_S = 1.0


class ApprovalWebhook(Endpoint):
    """Asked, by POST, while nothing but the approval is missing: 200 approves, all else holds."""

    id: Identifier
    secret: SecretSource | None = Field(default=None, description="the key that signs the question")
    every: Seconds = Field(default=30.0, description="between two questions")
    timeout: Seconds = Field(default=10.0, description="no whole answer by then holds")

    @property
    def approver(self) -> str:
        """Who approved, in the log."""
        return f"{GATE_NAME}{self.id}"


def gate_faults(path: Path, item: ApprovalWebhook) -> Iterator[Fault]:
    """What is wrong with a gate."""
    yield from endpoint_faults(path, item)
    if item.secret is not None:
        yield from source_faults((*path, "secret"), item.secret)
    yield from call_time_faults((*path, "timeout"), item.timeout)
    if item.every < LEAST_EVERY_S:
        yield Fault((*path, "every"), item.every, "must be at least 1s")
