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


class RequestBreaker(Section):
    """What one failing request does; the only behaviour there is, written out for the reader."""

    before_first_token: Literal["retry_on_control"] = "retry_on_control"
    max_retries: Literal[1] = 1
    count_as: Literal["candidate_failure"] = "candidate_failure"


class VariantBreaker(Section):
    """A blunt stop for catastrophes; no statistics."""

    window: Seconds
    min_requests: Positive
    failure_share: Share
    no_replica_for: Seconds = Field(default=30.0, description="sparse without a ready replica")
    action: Literal["rollback"] = "rollback"


class Breaker(Section):
    """Immediate protection."""

    request: RequestBreaker = RequestBreaker()
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


class Quarantine(Section):
    """A digest and rung that failed cannot start again by itself."""

    key: Literal["policy_digest+rung"] = "policy_digest+rung"
    release: Literal["manual"] = "manual"


class Retry(Section):
    """How often, and how soon, an operator may try a rolled-back rollout again; evidence starts afresh."""

    max: Count = 0
    cool_off: Seconds = 0.0
    fresh_evidence: Literal[True] = True


class Rollback(Section):
    """How traffic goes back."""

    mode: Literal["immediate"] = "immediate"
    quarantine: Quarantine = Quarantine()
    retry: Retry = Retry()


def _readable_window(value: str) -> str:
    parse_window(value)
    return value


class Schedule(Section):
    """When the controller looks, and when it must not grow traffic (it always protects)."""

    check_every: Seconds = 60.0
    misfire: Literal["run_once_now"] = "run_once_now"
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
