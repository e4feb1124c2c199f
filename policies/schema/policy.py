"""The `sentei/v1` RolloutPolicy: frozen pydantic models, one per section of the file.

Unknown keys are refused, every field describes itself and may say more than one thing, and the rules that tie
fields together live in `policies.schema.rules`. A policy that a rollout was started with is kept, and read by
later versions (`policies.schema.kept`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from sentei.policies.schema.integrations.notify import Notify
from sentei.policies.schema.operations import Breaker, Data, Record, Rollback, Schedule, Section
from sentei.policies.schema.rules import find_faults
from sentei.policies.schema.sections import (
    Advance,
    Assignment,
    Audit,
    Benefit,
    Guardrail,
    Guardrails,
    LadderRung,
    Metadata,
    Signal,
    Slice,
    Slices,
    Stage,
)

SERVED_PART = 0.8  # of the audits: what sparse served is proven in each stage, what dense served only watched


@dataclass(frozen=True, slots=True)
class Kept:
    """Validation context of a policy that runs already: no rule that is younger than it stops it."""

    digest: str


class Spec(Section):
    """Everything a rollout may do."""

    mode: Literal["enforce", "advise"] = "enforce"
    ladder: Annotated[tuple[LadderRung, ...], Field(min_length=1, max_length=16)]
    slices: Slices
    assignment: Assignment
    stages: Annotated[tuple[Stage, ...], Field(min_length=2, max_length=64)]
    advance: Advance
    audit: Audit
    guardrails: Guardrails
    benefit: tuple[Benefit, ...] = ()
    signals: tuple[Signal, ...] = ()
    breaker: Breaker
    data: Data
    rollback: Rollback = Rollback()
    schedule: Schedule = Schedule()
    record: Record = Record()
    notify: Notify = Notify()


class Policy(Section):
    """A whole rollout policy."""

    api_version: Literal["sentei/v1"] = Field(alias="apiVersion")
    kind: Literal["RolloutPolicy"]
    metadata: Metadata
    spec: Spec

    _kept_digest: str = ""

    @model_validator(mode="after")
    def _keeps_the_rules(self, info: ValidationInfo) -> Policy:
        if isinstance(info.context, Kept):
            if info.context.digest != self.own_digest:
                self._kept_digest = info.context.digest
            return self
        faults = find_faults({name: getattr(self.spec, name) for name in type(self.spec).model_fields})
        if faults:
            raise ValueError("; ".join(f"{fault.dotted}: {fault.message}" for fault in faults))
        return self

    @cached_property
    def digest(self) -> str:
        """Its name in states and events: of a policy that is kept, the one it was started under."""
        return self._kept_digest or self.own_digest

    @cached_property
    def own_digest(self) -> str:
        """SHA-256 of the resolved document as this version has it: spelling does not matter, defaults do."""
        text = json.dumps(to_document(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def rung_ids(self) -> tuple[str, ...]:
        """The ladder, mild to aggressive."""
        return tuple(rung.id for rung in self.spec.ladder)

    @cached_property
    def routed_slices(self) -> tuple[Slice, ...]:
        """The slices that may go to the candidate."""
        return tuple(item for item in self.spec.slices.buckets if not item.is_pinned)

    @cached_property
    def gates_by_value(self) -> dict[str, tuple[Guardrail | Benefit, ...]]:
        """Guardrails and benefits under the name of the value they watch."""
        gates: dict[str, tuple[Guardrail | Benefit, ...]] = {}
        everything: tuple[Guardrail | Benefit, ...] = (*self.spec.guardrails.items, *self.spec.benefit)
        for gate in everything:
            gates[gate.value] = (*gates.get(gate.value, ()), gate)
        return gates

    def stage(self, stage_id: str) -> Stage:
        """The stage of that id; KeyError if the policy has none."""
        return self.spec.stages[self.stage_index(stage_id)]

    def stage_index(self, stage_id: str) -> int:
        """Where in the ladder of stages it stands; KeyError if the policy has none."""
        for index, stage in enumerate(self.spec.stages):
            if stage.id == stage_id:
                return index
        raise KeyError(stage_id)

    def audit_share(self, stage: Stage) -> float:
        """The share of requests audited in that stage."""
        return self.spec.audit.select.fraction if stage.audit is None else stage.audit

    def audit_odds(self, stage: Stage) -> tuple[float, float]:
        """The probabilities that a request served by dense, and one served by sparse, is audited there.

        Where sparse serves, its answers get SERVED_PART of all audits or all that there are, dense the rest.
        """
        fraction = self.audit_share(stage)
        if stage.share == 0 or self.spec.mode == "advise":
            return fraction, 0.0
        sparse = min(1.0, fraction * SERVED_PART / stage.share)
        return min(1.0, (fraction - sparse * stage.share) / (1 - stage.share)), sparse

    def need(self, stage: Stage, gate: Guardrail | None = None) -> Literal["all_safe", "no_harm"]:
        """What a stage asks of a guardrail, or of one that says nothing of its own, before it ends."""
        if gate is not None and gate.metric.family == "assignment":
            return "no_harm"
        own = None if gate is None else gate.advance
        return stage.need or own or self.spec.advance.need

    def asks_gain(self, stage: Stage) -> bool:
        """Whether a stage must show a gain before it ends: what follows is a larger share, or `promoted`.

        A step to a bolder rung at the same share may pass a rung that is too mild to pay.
        """
        following = self.stage_index(stage.id) + 1
        stages = self.spec.stages
        return following == len(stages) or stages[following].share > stage.share


def to_document(policy: Policy) -> dict[str, Any]:
    """The policy resolved: plain values, spelled as in a file, with every default; null is "not set"."""
    document: dict[str, Any] = policy.model_dump(mode="json", by_alias=True)
    return document
