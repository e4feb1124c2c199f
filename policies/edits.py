"""Edits of a running policy: what may change while users are on sparse, and what it does to the state.

Only a *safer* edit applies live: less traffic, a milder rung, a tighter bound, a longer wait, a harder
action. The table SAFER names every field that may change and in which direction; a field that is not in it
needs a new rollout. All refusals come at once, each with the field, both values and what is allowed.

Evidence is about a bound. Proof of safety under a looser bound says nothing about a tighter one, so it starts
afresh; a bet against a looser bound stays a fair bet against a tighter one, so evidence of harm is kept and
goes on with the new bound (a beta-binomial count cannot, and starts afresh). If share or rung of the present
stage changes, the stage starts its clock again, with fresh operational evidence (F15).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from sentei.errors import SenteiError
from sentei.policies.evidence import BetaBinomial, Betting
from sentei.policies.intake import new_cell, scaled_bound, start_phase
from sentei.policies.machine import Event, next_phase
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Benefit, Guardrail
from sentei.policies.state import ALL_SLICES, Cell, DriftTrack, MetricTrack, RolloutState

_ACTIONS = ("freeze", "previous_rung", "rollback_slice", "rollback")  # later is harder


@dataclass(frozen=True, slots=True)
class Direction:
    """One way in which a field may change; None stands for a field that is not set."""

    words: str
    is_safer: Callable[[Any, Any], bool]


LOWER = Direction("may only fall", lambda old, new: None not in (old, new) and new < old)
HIGHER = Direction("may only grow", lambda old, new: None not in (old, new) and new > old)
EARLIER = Direction(
    "may only be set, or get shorter", lambda old, new: new is not None and (old is None or new < old)
)
LATER = Direction("may only be set, or get longer", lambda old, new: new is not None and new > (old or 0.0))
ADDED = Direction("may only be added", lambda old, _new: old is None)
MORE = Direction("may only get more entries", lambda old, new: set(new) > set(old))
HARDER = Direction(f"may only get harder: {' < '.join(_ACTIONS)}", lambda old, new: _rank(new) > _rank(old))
ANY = Direction("may change", lambda _old, _new: True)
GATE = Direction(
    "may only be added, name fewer people, or come after the evidence",
    lambda old, new: _is_tighter_gate(old, new),
)


def _only(word: str) -> Direction:
    return Direction(f'may only become "{word}"', lambda _old, new: new == word)


MILDER = Direction("may only get milder", lambda old, new: new is not None and (old is None or new < old))

TIGHTER_MAX = Direction(
    "may only be set, or fall", lambda old, new: new is not None and (old is None or new < old)
)
TIGHTER_MIN = Direction(
    "may only be set, or grow", lambda old, new: new is not None and (old is None or new > old)
)

SAFER: Mapping[str, Direction] = {
    "metadata.owner": ANY,
    "spec.stages[*].share": LOWER,
    "spec.stages[*].rung": MILDER,
    "spec.stages[*].audit": HIGHER,
    "spec.stages[*].need": Direction("may only be taken out", lambda _old, new: new is None),
    "spec.stages[*].hold_min": HIGHER,
    "spec.stages[*].max": EARLIER,
    "spec.stages[*].bake": LATER,
    "spec.stages[*].approval": GATE,
    "spec.slices.buckets[*].pin": _only("control"),
    "spec.slices.buckets[*].max_rung": MILDER,
    "spec.advance.need": _only("all_safe"),
    "spec.advance.min_units": HIGHER,
    "spec.advance.min_served_units": HIGHER,
    "spec.advance.on_max": _only("rollback"),
    "spec.audit.select.fraction": HIGHER,
    "spec.audit.missing.max_share": LOWER,
    "spec.guardrails.detector_arl": LOWER,
    "spec.guardrails.items[*].bound.max": LOWER,
    "spec.guardrails.items[*].bound.excess_over_floor": LOWER,
    "spec.guardrails.items[*].bound.ratio": LOWER,
    "spec.guardrails.items[*].action": HARDER,
    "spec.guardrails.items[*].advance": _only("all_safe"),
    "spec.guardrails.prometheus[*]": ADDED,
    "spec.guardrails.prometheus[*].bound.max": TIGHTER_MAX,
    "spec.guardrails.prometheus[*].bound.min": TIGHTER_MIN,
    "spec.guardrails.prometheus[*].action": _only("rollback"),
    "spec.benefit[*]": ADDED,
    "spec.benefit[*].want.max": LOWER,
    "spec.benefit[*].need": _only("proven"),
    "spec.signals[*]": ADDED,
    "spec.signals[*].action": _only("rollback"),
    "spec.signals[*].consecutive": LOWER,
    "spec.signals[*].no_data": _only("hold"),
    "spec.breaker.variant.min_requests": LOWER,
    "spec.breaker.variant.failure_share": LOWER,
    "spec.breaker.variant.no_replica_for": LOWER,
    "spec.data.max_age": LOWER,
    "spec.data.no_data.grace": LOWER,
    "spec.data.no_data.then": _only("rollback"),
    "spec.data.no_data.after": LOWER,
    "spec.data.no_data.finally": _only("rollback"),
    "spec.data.monitor_lease": LOWER,
    "spec.rollback.retry.max": LOWER,
    "spec.rollback.retry.cool_off": HIGHER,
    "spec.schedule.check_every": LOWER,
    "spec.schedule.freeze": MORE,
    "spec.notify.webhooks[*]": ADDED,
    "spec.notify.webhooks[*].url": ANY,
    "spec.notify.webhooks[*].url_from": ANY,
    "spec.notify.webhooks[*].secret": ANY,
    "spec.notify.webhooks[*].format": ANY,
    "spec.notify.webhooks[*].events": MORE,
    "spec.notify.webhooks[*].hold_longer_than": EARLIER,
    "spec.notify.webhooks[*].timeout": ANY,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One field that an edit changes; `refusal` says why it cannot apply live, "" if it can."""

    path: str
    old: object
    new: object
    refusal: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {_word(self.old)} -> {_word(self.new)}"
        return f"{text} {self.refusal}" if self.refusal else text


class EditError(SenteiError, ValueError):
    """An edit that cannot apply to the running rollout; `changes` are the fields that stand in the way."""

    def __init__(self, message: str, changes: Sequence[Change] = ()) -> None:
        super().__init__(message)
        self.changes = tuple(changes)


def review_edit(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Every field that differs, in the order of the table's paths, each with its refusal if it has one."""
    before, after = _comparable(old, old), _comparable(new, old)
    found = tuple(_compare(before, after, ""))
    return tuple(sorted(found, key=lambda item: item.path))


def check_edit(old: Policy, new: Policy) -> tuple[Change, ...]:
    """The changes of a safer edit; EditError if any is not, or if there are none."""
    changes = review_edit(old, new)
    unsafe = [item for item in changes if item.refusal]
    if unsafe:
        lines = "\n".join(f"  {item}" for item in unsafe)
        raise EditError(
            f"only safer edits apply to a running rollout; start a new rollout, because\n{lines}",
            unsafe,
        )
    if not changes:
        raise EditError("this is the policy that runs; nothing would change")
    return changes


def edited_state(old: Policy, new: Policy, state: RolloutState, now_s: float) -> RolloutState:
    """The state under the edited policy; EditError, or IllegalEventError in a phase that allows no edit."""
    check_edit(old, new)
    phase = next_phase(state.phase, Event.EDIT)
    failed = [item.rung_id for item in state.quarantine if item.digest == new.digest]
    if failed:
        raise EditError(f"this policy is in quarantine ({failed[0]} failed); start a new rollout")
    stage, before = new.stage(state.stage_id), old.stage(state.stage_id)
    is_restarted = (stage.share, stage.rung) != (before.share, before.rung)
    routed = {item.id for item in new.routed_slices}
    state = replace(
        state,
        phase=phase.value,
        waits_for=None,  # the next decision says so under the new policy
        policy_digest=new.digest,
        former_digests=(*state.former_digests, state.policy_digest),
        slices=tuple(item for item in state.slices if item.slice_id in routed),
        cells=tuple(_carry_cells(old, new, state)),
        drift=_tracks(new, state),
        metrics=_metric_tracks(old, new, state, now_s),
    )
    if stage.approval != before.approval:
        state = replace(state, is_approved=False, approved_by=None)
    return _restart_stage(new, state, now_s) if is_restarted else state


def _restart_stage(new: Policy, state: RolloutState, now_s: float) -> RolloutState:
    return replace(
        start_phase(new, state),
        stage_entered_s=now_s,
        paused_at_s=None if state.paused_at_s is None else now_s,
        is_approved=False,
        approved_by=None,
    )


def _tracks(new: Policy, state: RolloutState) -> tuple[DriftTrack, ...]:
    known = {track.signal_id: track for track in state.drift}
    return tuple(known.get(item.id, DriftTrack(item.id)) for item in new.spec.signals)


def _metric_tracks(old: Policy, new: Policy, state: RolloutState, now_s: float) -> tuple[MetricTrack, ...]:
    """What was within or out of another bound is read again under this one."""
    known = {track.metric_id: track for track in state.metrics}
    before = {item.id: item.bound for item in old.spec.guardrails.prometheus}
    return tuple(
        known[item.id] if before.get(item.id) == item.bound else MetricTrack(item.id, since_s=now_s)
        for item in new.spec.guardrails.prometheus
    )


def _carry_cells(old: Policy, new: Policy, state: RolloutState) -> Iterator[Cell]:
    gates: dict[str, Guardrail | Benefit] = {
        **{item.id: item for item in new.spec.guardrails.items},
        **{item.id: item for item in new.spec.benefit},
    }
    former: dict[str, Guardrail | Benefit] = {
        **{item.id: item for item in old.spec.guardrails.items},
        **{item.id: item for item in old.spec.benefit},
    }
    routed = {ALL_SLICES, *(item.id for item in new.routed_slices)}
    for cell in state.cells:
        gate = gates[cell.guardrail_id]
        if cell.slice_id not in routed:
            continue
        before = former[cell.guardrail_id]
        is_same = scaled_bound(old, before) == scaled_bound(new, gate)
        is_same &= not isinstance(gate, Benefit) or before == gate
        yield cell if is_same else _retarget(new, gate, cell, state.try_number)


def _retarget(new: Policy, gate: Guardrail | Benefit, cell: Cell, try_number: int) -> Cell:
    """Evidence of harm goes on under the tighter bound; proof of safety starts afresh."""
    fresh = new_cell(new, gate, cell.slice_id, cell.rung_id, arm=cell.arm, try_number=try_number)
    harm = cell.harm
    if isinstance(harm, Betting) and isinstance(fresh.harm, Betting):
        harm = replace(harm, bound=fresh.harm.bound)
    elif isinstance(harm, BetaBinomial):
        harm = fresh.harm
    watch = (
        None if cell.watch is None or fresh.watch is None else replace(cell.watch, bound=fresh.watch.bound)
    )
    return replace(cell, harm=harm, safe=fresh.safe, watch=watch, interval=fresh.interval)


def _comparable(policy: Policy, ladder_of: Policy) -> dict[str, Any]:
    """Plain values with defaults written out where another field gives them, and rungs as their place."""
    document: dict[str, Any] = _plain(policy)
    spec = document["spec"]
    for stage in spec["stages"]:
        stage["audit"] = policy.audit_share(policy.stage(stage["id"]))
        stage["rung"] = _Rung.of(stage["rung"], ladder_of)
    for item in spec["slices"]["buckets"]:
        item["max_rung"] = None if item["max_rung"] is None else _Rung.of(item["max_rung"], ladder_of)
    for item, guardrail in zip(spec["guardrails"]["items"], policy.spec.guardrails.items, strict=True):
        if guardrail.metric.family != "assignment":
            item["advance"] = guardrail.advance or policy.spec.advance.need
    return document


def _plain(value: Any) -> Any:
    """Models as dicts by the names of the file; numbers stay numbers (the file's form of a time is text)."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {field.alias or name: _plain(getattr(value, name)) for name, field in fields.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, slots=True, order=True)
class _Rung:
    """A rung in the order of the running ladder; a rung that is not on it is the boldest."""

    place: int
    name: str

    @classmethod
    def of(cls, name: str, policy: Policy) -> _Rung:
        places = {rung_id: place for place, rung_id in enumerate(policy.rung_ids)}
        return cls(places.get(name, len(places)), name)

    def __str__(self) -> str:
        return self.name


def _compare(old: Any, new: Any, path: str) -> Iterator[Change]:
    direction = SAFER.get(re.sub(r"\[[^]]*]", "[*]", path))
    if isinstance(old, dict) and isinstance(new, dict) and direction not in (GATE, ANY):
        for name in {**old, **new}:
            inner = f"{path}.{name}" if path else name
            yield from _compare(old.get(name), new.get(name), inner)
    elif _has_ids(old, new):
        yield from _compare_items(old, new, path)
    elif old != new:
        refusal = "cannot change while the rollout runs"
        if direction is not None:
            refusal = "" if direction.is_safer(old, new) else direction.words
        yield Change(path, old, new, refusal)


def _has_ids(old: Any, new: Any) -> bool:
    both = [old, new]
    return all(isinstance(item, list) for item in both) and any(
        isinstance(part, dict) and "id" in part for item in both for part in item
    )


def _compare_items(old: Sequence[Any], new: Sequence[Any], path: str) -> Iterator[Change]:
    """Entries are compared by id; they may be added where the table says so, never taken out or moved."""
    before, after = {item["id"]: item for item in old}, {item["id"]: item for item in new}
    kept = [name for name in after if name in before]
    if kept != list(before):
        yield Change(
            path, list(before), list(after), "entries cannot be taken out or moved while the rollout runs"
        )
        return
    for name in after:
        inner = f"{path}[{name}]"
        if name in before:
            yield from _compare(before[name], after[name], inner)
            continue
        is_allowed = SAFER.get(f"{path}[*]") is ADDED
        yield Change(inner, None, name, "" if is_allowed else "cannot be added while the rollout runs")


def _rank(action: str) -> int:
    return _ACTIONS.index(action)


def _is_tighter_gate(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    if new is None:
        return False
    if old is None:
        return True
    has_fewer = "anyone" in old["by"] or set(new["by"]) <= set(old["by"])
    has_fewer &= new["webhook"] in (None, old["webhook"])
    return has_fewer and (new["when"] == old["when"] or new["when"] == "after_evidence")


def _word(value: object) -> str:
    return "not set" if value is None else str(value)
