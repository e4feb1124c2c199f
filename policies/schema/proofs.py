"""The rules about proof: what a policy asks for before it grows must be able to say something."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sentei.policies.evidence import BETTING_CUT, PAIRED_CUT, units_to_notice
from sentei.policies.schema.budget import Tested, harm_alpha
from sentei.policies.schema.faults import Fault, Path
from sentei.policies.schema.metrics import METRICS
from sentei.policies.schema.sections import (
    Advance,
    Audit,
    Benefit,
    Guardrail,
    Guardrails,
    LadderRung,
    Slice,
    Slices,
    Stage,
)


def family(item: Guardrail) -> str:
    """The family of its metric, "" where there is no such metric."""
    return METRICS[item.value].family if item.value in METRICS else ""


def shadow_proves_something(stages: tuple[Stage, ...], guardrails: Guardrails) -> Iterator[Fault]:
    """A stage without traffic has only quality to judge; without a quality guardrail it would pass unseen."""
    if stages[0].share == 0 and not any(family(item) == "quality" for item in guardrails.items):
        yield Fault(
            ("stages", 0, "share"), 0.0, "a stage without traffic needs a guardrail on an audit.* value"
        )


def promotion_is_proven(advance: Advance, guardrails: Guardrails) -> Iterator[Fault]:
    """Under all_safe at least one guardrail really is asked for proof."""
    if advance.need != "all_safe":
        return
    asked = [item for item in guardrails.items if item.advance != "no_harm" and family(item) != "assignment"]
    if not asked:
        yield Fault(
            ("advance", "need"),
            advance.need,
            "no guardrail is asked for proof of safety; say no_harm, or ask one",
        )


def last_stage_is_proven(stages: tuple[Stage, ...]) -> Iterator[Fault]:
    """A stage may leave the proof to a later one, so the last one may not."""
    if stages[-1].need is not None:
        path: Path = ("stages", len(stages) - 1, "need")
        yield Fault(
            path, stages[-1].need, "the last stage must prove what an earlier one did not; leave it out"
        )


@dataclass(frozen=True, slots=True)
class _Outline:
    """The sections that the error budget is made of, before there is a policy."""

    mode: str
    stages: tuple[Stage, ...]
    guardrails: Guardrails
    rung_ids: tuple[str, ...]
    routed_slices: tuple[Slice, ...]
    benefit: tuple[Benefit, ...] = ()

    @property
    def spec(self) -> _Outline:
        return self

    @property
    def is_sound(self) -> bool:
        """Whether other rules have nothing to say of these sections."""
        items = self.guardrails.items
        own, total = sum(item.alpha or 0.0 for item in items), self.guardrails.alpha_total
        has_names = all(item.value in METRICS for item in items)
        return (
            has_names
            and own < total
            and bool(self.routed_slices)
            and {s.rung for s in self.stages} <= {*self.rung_ids}
        )


def least_units(outline: Tested, item: Guardrail, kl_cap: float) -> int:
    """How many units a quality guardrail must see before "no harm" says anything: F1 at twice the bound."""
    bound = item.bound
    limit = None if bound is None else bound.excess_over_floor or bound.max
    if limit is None or bound is None:
        return 1
    scale = kl_cap if item.value == "audit.kl" else 1.0
    is_paired = bound.excess_over_floor is not None
    cap = None if not is_paired else 1.0 if bound.floor_cap is None else bound.floor_cap / scale
    cut = PAIRED_CUT if is_paired else BETTING_CUT
    if not 0 < limit / scale < 1 or (cap or 0.0) > 1:
        return 1  # a bound that another rule refuses
    return units_to_notice(limit / scale, floor_cap=cap, alpha=harm_alpha(outline, item), cut=cut)


def no_harm_is_no_empty_gate(
    mode: str,
    ladder: tuple[LadderRung, ...],
    slices: Slices,
    stages: tuple[Stage, ...],
    advance: Advance,
    audit: Audit,
    guardrails: Guardrails,
) -> Iterator[Fault]:
    """Where safety need not be proven, harm must have had the time to show."""
    routed = tuple(item for item in slices.buckets if not item.is_pinned)
    outline = _Outline(mode, stages, guardrails, tuple(rung.id for rung in ladder), routed)
    if not outline.is_sound:
        return
    may_skip = any(stage.need == "no_harm" for stage in stages)
    for item in guardrails.items:
        asked = item.advance or advance.need
        if family(item) != "quality" or (asked == "all_safe" and not may_skip):
            continue
        least = least_units(outline, item, audit.values.kl.cap)
        if advance.min_units < least:
            message = (
                f'must be at least {least}: "{item.id}" is asked for no_harm only, and before so many units '
                "even twice its bound would often not have shown"
            )
            yield Fault(("advance", "min_units"), advance.min_units, message)
