"""The base of every section, and those that say how a rollout is run: breaker, data, rollback, schedule."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt

from sentei.policies.schema.units import Seconds, Share, WeeklyWindow, parse_window

Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Positive = Annotated[StrictInt, Field(ge=1, le=10**9)]
Count = Annotated[StrictInt, Field(ge=0, le=10**9)]


class Section(BaseModel):
    """A part of the policy: immutable, and no unknown key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, ser_json_inf_nan="constants"
    )


class VariantBreaker(Section):
    """A blunt stop for catastrophes, without statistics: everything is rolled back."""

    window: Seconds
    min_requests: Positive
    failure_share: Share
    no_replica_for: Seconds = Field(default=30.0, description="sparse without a ready replica")


class Breaker(Section):
    """Immediate protection."""

    variant: VariantBreaker


class NoData(Section):
    """What silence does: after `grace` do `then`, after `after` do `finally`."""

    grace: Seconds
    then: Literal["hold", "rollback"] = "hold"
    after: Seconds
    last: Literal["hold", "rollback"] = Field(default="rollback", alias="finally")


class Data(Section):
    """What "no news" means."""

    max_age: Seconds
    no_data: NoData
    monitor_lease: Seconds = Field(
        description="the router goes dense when the table is not renewed for so long"
    )


class Retry(Section):
    """How often, and how soon, an operator may try a rolled-back rollout again; evidence starts afresh."""

    max: Count = 0
    cool_off: Seconds = 0.0


class Rollback(Section):
    """What leads out of a rollback."""

    retry: Retry = Retry()


def _readable_window(value: str) -> str:
    parse_window(value)
    return value


class Schedule(Section):
    """When the controller looks, and when it must not grow traffic (it always protects)."""

    check_every: Seconds = 60.0
    freeze: tuple[Annotated[str, AfterValidator(_readable_window)], ...] = ()

    @cached_property
    def windows(self) -> tuple[WeeklyWindow, ...]:
        """The freeze windows, parsed."""
        return tuple(parse_window(text) for text in self.freeze)


class MlflowRecord(Section):
    """Where MLflow keeps the mirror: one parent run per rollout, one child run per stage."""

    experiment: Annotated[str, Field(min_length=1, max_length=128)]


class Record(Section):
    """What is kept."""

    mlflow: MlflowRecord = MlflowRecord(experiment="sentei-rollouts")
