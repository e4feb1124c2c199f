"""The sections of a rollout policy: who, where, how fast, on what evidence."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictInt

from sentei.policies.schema.integrations.gate import ApprovalWebhook
from sentei.policies.schema.integrations.prometheus import PrometheusGuardrail
from sentei.policies.schema.metrics import METRICS, Metric
from sentei.policies.schema.operations import Count, Identifier, Positive, Section
from sentei.policies.schema.units import Number, Seconds, Share

TestKind = Literal["betting", "betting_paired", "beta_binomial", "event_split", "split_ramp"]
GuardrailAction = Literal["previous_rung", "rollback_slice", "rollback", "freeze"]


class Metadata(Section):
    """Who owns the rollout."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
    owner: str | None = None


class LadderRung(Section):
    """One rung of the adapter's ladder, by its id."""

    id: Identifier


class Slice(Section):
    """A bucket of prompt lengths with its own evidence and its own fallback."""

    id: Identifier
    range: tuple[Count, Positive] = Field(description="[from, to) in prompt tokens")
    pin: Literal["control"] | None = Field(default=None, description="never routed to the candidate")
    max_rung: Identifier | None = Field(default=None, description="the boldest rung this slice may use")

    @property
    def is_pinned(self) -> bool:
        """Whether the slice always stays dense."""
        return self.pin is not None

    @property
    def middle(self) -> float:
        """The length that halves it before anything was served: the geometric middle, as lengths spread."""
        return math.sqrt(max(self.range[0], 1) * self.range[1])


class Slices(Section):
    """How requests are told apart; the buckets cover every length once."""

    by: Literal["prompt_tokens"] = Field(default="prompt_tokens", description="what the ranges count")
    buckets: Annotated[tuple[Slice, ...], Field(min_length=1, max_length=32)]


class Assignment(Section):
    """Who gets the candidate: hash(unit, salt) < share, so growth keeps members."""

    unit: Literal["session_id"] = "session_id"
    salt: Annotated[str, Field(min_length=1, max_length=64)]


class Approval(Section):
    """A gate that `by` (people; "anyone": all with access) or a webhook may open: the first yes counts."""

    by: tuple[str, ...] = Field(default=(), description="who may open it; at least one, or a webhook")
    webhook: ApprovalWebhook | None = Field(default=None, description="a system that is asked")
    when: Literal["after_evidence", "any_time"] = "after_evidence"

    @property
    def names(self) -> tuple[str, ...]:
        """Who may open it, as the log names them."""
        return self.by if self.webhook is None else (*self.by, self.webhook.approver)


class Stage(Section):
    """One step: a share of sessions at one rung."""

    id: Identifier
    share: Share
    rung: Identifier
    audit: Share | None = Field(
        default=None, description="share of requests audited; default audit.select.fraction"
    )
    hold_min: Seconds = Field(default=0.0, description="least time in this stage")
    max: Seconds | None = Field(default=None, description="longest time in this stage, then advance.on_max")
    approval: Approval | None = None
    bake: Seconds | None = Field(default=None, description="last stage only: time to stay before `promoted`")
    need: Literal["no_harm"] | None = Field(
        default=None, description="before the last stage: safety is not proven here, but in a later one"
    )


class Advance(Section):
    """What it takes to go one stage further. There is no way to promote on inconclusive evidence."""

    need: Literal["all_safe", "no_harm"]
    min_units: Positive = Field(description="audited units per slice and stage; never delays a rollback")
    min_served_units: Count = Field(
        default=0, description="of these, served by sparse in this stage (share > 0)"
    )
    on_max: Literal["hold", "rollback"] = "hold"


class AuditSelect(Section):
    """Which requests are audited: a draw before serving says so."""

    fraction: Share = Field(description="of the requests; most of it goes to those that sparse serves")
    period: Seconds = Field(default=600.0, description="after it a session counts as a unit again")


class KlValue(Section):
    """How KL is bounded."""

    cap: Number = Field(default=2.0, description="nats; X = min(KL, cap) / cap")


class AuditValues(Section):
    """Settings of the audited values."""

    kl: KlValue = KlValue()


class MissingAudits(Section):
    """A chosen but unscored audit is the worst case for safety and left out for harm (F12)."""

    max_share: Share = Field(default=0.10, description="more missing than this: verdict ERROR, which holds")
    window: Seconds = Field(default=3600.0, description="how long a missing audit counts in that share")


class Audit(Section):
    """The paired dense-versus-sparse audit."""

    select: AuditSelect
    values: AuditValues = AuditValues()
    missing: MissingAudits = MissingAudits()


class Bound(Section):
    """What is still acceptable; exactly one of max, excess_over_floor and ratio."""

    max: Number | None = Field(default=None, description="the largest acceptable mean")
    excess_over_floor: Number | None = Field(
        default=None, description="mean of value - floor, in the metric's unit"
    )
    ratio: Annotated[Number, Field(ge=1, le=100)] | None = Field(
        None, description="sparse rate over dense rate"
    )
    over: Seconds | None = Field(
        default=None, description="count values above this time; then max is a share"
    )
    floor_cap: Number | None = Field(default=None, description="the most noise that is excused per session")


class Guardrail(Section):
    """One gate: a value, its bound, how it is tested, and what a proven breach does."""

    id: Identifier
    value: str
    bound: Bound | None = None
    test: TestKind
    per: Literal["slice", "all"] = "slice"
    action: GuardrailAction
    advance: Literal["all_safe", "no_harm"] | None = Field(default=None, description="default: advance.need")
    alpha: Annotated[Number, Field(lt=0.5)] | None = Field(
        default=None, description="own share of alpha_total"
    )

    @property
    def metric(self) -> Metric:
        """The registered metric behind `value`."""
        return METRICS[self.value]


class Guardrails(Section):
    """All gates and the error budget they share."""

    alpha_total: Annotated[Number, Field(lt=0.5)] = 0.05
    detector_arl: Annotated[StrictInt, Field(ge=100, le=10**9)] = 10_000
    items: Annotated[tuple[Guardrail, ...], Field(min_length=1, max_length=64)]
    prometheus: Annotated[tuple[PrometheusGuardrail, ...], Field(max_length=16)] = Field(
        default=(), description="metrics of one's own: thresholds, which spend nothing of alpha_total"
    )


class Want(Section):
    """What the candidate should save."""

    max: Number = Field(description="mean of the value that still counts as a gain")


class Benefit(Section):
    """Safe but useless is also a stop: no share grows before the gain is proven, and none ends the ramp."""

    id: Identifier
    value: Literal["audit.compute_ratio"]
    want: Want
    need: Literal["proven", "not_disproved"] = Field(
        default="proven", description="of the gain in every slice, before a share grows or it is promoted"
    )


class Signal(Section):
    """One Evidently check over windows of one column."""

    id: Identifier
    column: str
    action: Literal["hold", "rollback"] = "hold"
    consecutive: Annotated[StrictInt, Field(ge=1, le=100)] = 1
    window_units: Annotated[StrictInt, Field(ge=5, le=10**6)] = Field(
        default=100, description="sessions per window"
    )
    no_data: Literal["hold", "ignore"] = Field(default="hold", description="before its first full window")
