"""Guardrails of one's own: a PromQL query, a bound, and for how long it must be kept or broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from sentei.policies.schema.faults import Fault, Path
from sentei.policies.schema.integrations.endpoint import (
    LONGEST_CALL_S,
    Endpoint,
    SecretSource,
    call_time_faults,
    endpoint_faults,
    source_faults,
)
from sentei.policies.schema.operations import Identifier, Section
from sentei.policies.schema.units import Seconds, format_duration

MAX_QUERY_CHARS = 2000
LEAST_EVERY_S, LONGEST_WINDOW_S = 1.0, 7 * 86_400.0
LEAST_SAMPLES = 2  # in a window: one alone says nothing of a stretch of time
STALE_AFTER = 3.0  # times `every`: a sample that is older is no news


def parse_limit(value: object) -> float:
    """A finite number of any sign; texts and booleans are refused."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return float(value)
    raise ValueError("a finite number is wanted, in the unit of the query")


Limit = Annotated[float, BeforeValidator(parse_limit)]


class PrometheusBound(Section):
    """What is acceptable; max, min or both."""

    max: Limit | None = Field(default=None, description="the largest acceptable value")
    min: Limit | None = Field(default=None, description="the smallest acceptable value")

    def keeps(self, value: float) -> bool:
        """Whether the value is within the bound, its ends included."""
        return (self.max is None or value <= self.max) and (self.min is None or value >= self.min)

    def __str__(self) -> str:
        parts = [
            f"{word} {value:g}" for word, value in (("min", self.min), ("max", self.max)) if value is not None
        ]
        return " and ".join(parts)


class PrometheusGuardrail(Endpoint):
    """Within the bound for a whole window it lets a stage end, out of it for a whole window it acts."""

    id: Identifier
    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)] = Field(
        description="PromQL that gives one number: a scalar, or a vector of one series"
    )
    bound: PrometheusBound
    window: Seconds = Field(description="for how long it must be so, before it counts")
    action: Literal["hold", "rollback"] = "hold"
    every: Seconds = Field(default=30.0, description="between two queries")
    timeout: Seconds = Field(default=10.0, description="longest time of one query")
    token: SecretSource | None = Field(default=None, description="sent as a bearer token")

    @property
    def stale_s(self) -> float:
        """How old the newest sample may be: a round of queries waits for its slowest."""
        return STALE_AFTER * self.every + LONGEST_CALL_S


def prometheus_faults(path: Path, item: PrometheusGuardrail) -> Iterator[Fault]:
    """What is wrong with a guardrail of one's own."""
    yield from endpoint_faults(path, item)
    if item.url is not None and urlsplit(item.url).query:
        yield Fault(
            (*path, "url"), item.url, "is the address before /api/v1/query; the query stands in `query`"
        )
    if item.token is not None:
        yield from source_faults((*path, "token"), item.token)
    if item.bound.max is None and item.bound.min is None:
        yield Fault((*path, "bound"), None, "give max, min or both")
    elif item.bound.max is not None and item.bound.min is not None and item.bound.min >= item.bound.max:
        yield Fault((*path, "bound", "min"), item.bound.min, f"must lie below max, {item.bound.max:g}")
    if not item.query.strip():
        yield Fault((*path, "query"), item.query, "is empty")
    yield from call_time_faults((*path, "timeout"), item.timeout)
    if item.every < LEAST_EVERY_S:
        yield Fault((*path, "every"), format_duration(item.every), "must be at least 1s")
    elif not LEAST_SAMPLES * item.every <= item.window <= LONGEST_WINDOW_S:
        message = (
            f"must be at least {LEAST_SAMPLES} times every ({format_duration(item.every)}) and at most 7d"
        )
        yield Fault((*path, "window"), format_duration(item.window), message)
