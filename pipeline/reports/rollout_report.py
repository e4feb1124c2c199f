"""The comparison report: what was decided and why, whether it is safe, what it saved, what it cost.

One dataclass holds everything; the page and the JSON file show the same numbers. The page needs no
network and no script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError
from sentei.monitors.events import BrokenChainError, Event, EventLog
from sentei.monitors.records import DriftResult, Rollout
from sentei.monitors.store import Store
from sentei.pipeline.plain import to_plain
from sentei.pipeline.reports.figures import (
    AuditOverhead,
    QualityFigures,
    Savings,
    SliceFigures,
    audit_overhead,
    find_rung,
    newest_quality,
    quality_figures,
    savings,
    slice_figures,
)
from sentei.pipeline.reports.first_screen import FirstScreen, first_screen
from sentei.pipeline.reports.pages import render_template
from sentei.pipeline.reports.saving_chart import draw_saving
from sentei.pipeline.reports.share_chart import draw_share
from sentei.pipeline.reports.wording import headline, need_words, outcome_words
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import EVIDENCE, HOLD
from sentei.pipeline.rollout.succession import REPLACED
from sentei.policies.engine import routing
from sentei.policies.schema.policy import Policy
from sentei.policies.state import RolloutState, state_from_json

EVENT_KINDS_HIDDEN = frozenset({EVIDENCE, HOLD})
ADAPTER_NAME = "adapter"  # in what is kept about a rollout: the folder that sparse was started with
EVALUATION_FILE = "evaluation.json"


class ReportError(SenteiError):
    """A report that cannot be made; the message names the rollout and the way out."""


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One event that changed something."""

    seq: int
    at_s: float
    kind: str
    stage_id: str
    share: float
    reason: str


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """Where requests of one slice go now."""

    slice_id: str
    tokens: str
    share: float
    rung_id: str
    fell_back_by: str  # "" where it did not


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the report says."""

    rollout: Rollout
    policy_name: str
    policy_digest: str
    generated_at_s: float
    started_s: float
    ended_s: float | None
    outcome: str  # "promoted", "rolled_back", "held", "replaced", or the phase where it has not ended
    decided: str  # the same as its own evidence had it, before another rollout took its place
    by: str
    reason: str
    headline: str
    first_screen: FirstScreen
    stage_id: str
    share_now: float
    share_peak: float
    verdicts: tuple[Mapping[str, Any], ...]
    gains: tuple[Mapping[str, Any], ...]  # the verdicts on the policy's benefits
    routes: tuple[RouteEntry, ...]
    slices: tuple[SliceFigures, ...]
    quality: tuple[QualityFigures, ...]
    rung_id: (
        str  # the rung that it reached: of the newest score, whose saving and quality are shown; "" before
    )
    savings: Savings
    audit: AuditOverhead
    drift: tuple[DriftResult, ...]
    timeline: tuple[TimelineEntry, ...]
    shares: tuple[tuple[float, float], ...]  # (time, share) over all events
    num_events: int
    chain: str  # "verified", or what is broken
    evaluation: Mapping[str, Any] | None
    pruned_before_s: float | None = None  # records of before were deleted: the figures cover what is left

    @property
    def evaluated_rung(self) -> Mapping[str, Any] | None:
        """What the evaluation has measured of the rung that it reached."""
        return find_rung(self.evaluation, self.rung_id)

    @property
    def is_gain_proven(self) -> bool:
        """Whether the gain was proven in every routed slice when it was decided."""
        return bool(self.gains) and all(item["verdict"] == "gain" for item in self.gains)


def build_report(
    store: Store,
    rollout_id: str,
    *,
    now_s: float | None = None,
    evaluation: Mapping[str, Any] | None = None,
    upto_event: int | None = None,
) -> Report:
    """Gather a rollout's report from the store; `evaluation` is the document of `sentei evaluate`.

    With `upto_event` the report holds what was known when that event was decided, however late it is made.
    """
    rollout = store.read_rollout(rollout_id)
    log = EventLog(store)
    events = [event for event in log.read(rollout_id) if upto_event is None or event.seq <= upto_event]
    if rollout is None or not events:
        known = ", ".join(repr(r.rollout_id) for r in store.read_rollouts()) or "none"
        raise ReportError(f"rollout {rollout_id!r} has no events in {store.url}; the store holds: {known}.")
    book = PolicyBook(store)
    states = [state_from_json(event.state) for event in events]
    last = states[-1]
    policy = book.find(rollout_id, last.policy_digest)
    shares = [routed_share(book.find(rollout_id, state.policy_digest), state) for state in states]
    requests, audits = store.read_requests(rollout_id), store.read_audits(rollout_id)
    if (end := store.read_end(rollout_id)) is not None:
        requests, audits = ([row for row in rows if row["seq"] < end] for rows in (requests, audits))
    drift = [result for _, result in store.read_drift(rollout_id)]
    if upto_event is not None:
        requests, audits = ([row for row in rows if row["seq"] <= last.cursor] for rows in (requests, audits))
        drift = [result for result in drift if result.at_s <= events[-1].at_s]
    slices = slice_figures(requests, [item.id for item in policy.spec.slices.buckets])
    quality = quality_figures(audits)
    newest = newest_quality(quality)
    saved, rung_id = savings(slices, newest), newest[-1].rung_id if newest else ""
    own = next((i for i in range(len(states) - 1, -1, -1) if states[i].outcome != REPLACED), len(states) - 1)
    outcome, decided = (state.outcome or state.phase for state in (last, states[own]))
    verdicts, gains = _verdicts(policy, events, states)
    measured = evaluation if evaluation is not None else _evaluation_of(rollout)
    return Report(
        rollout=rollout,
        policy_name=policy.metadata.name,
        policy_digest=policy.digest,
        generated_at_s=events[-1].at_s if now_s is None else now_s,
        started_s=last.started_s,
        ended_s=last.ended_s,
        outcome=outcome,
        decided=decided,
        by=states[own].by or "",
        reason=states[own].reason if states[own].outcome else str(events[own].payload.get("reason", "")),
        headline=headline(decided if states[own].outcome else outcome, shares[own], saved),
        first_screen=first_screen(
            slices=slices,
            newest=newest,
            rung_id=rung_id,
            savings=saved,
            verdicts=verdicts,
            gains=gains,
            evaluation=measured,
        ),
        stage_id=last.stage_id,
        share_now=shares[-1],
        share_peak=max(shares),
        verdicts=verdicts,
        gains=gains,
        routes=_routes(policy, last),
        slices=slices,
        quality=quality,
        rung_id=rung_id,
        savings=saved,
        audit=audit_overhead(requests, audits),
        drift=tuple(drift),
        timeline=_timeline(events, states, shares),
        shares=tuple((event.at_s, share) for event, share in zip(events, shares, strict=True)),
        num_events=len(events),
        chain=_chain(log),
        evaluation=measured,
        pruned_before_s=store.read_pruned(rollout_id),
    )


def render_html(report: Report) -> str:
    """Return the report as one page without scripts, fonts or pictures from elsewhere."""
    return render_template(
        "report.html",
        r=report,
        chart=draw_share(report.shares, report.timeline),
        picture=draw_saving(report.first_screen),
        need=need_words,
        outcome_words=outcome_words(report.decided),
    )


def render_json(report: Report) -> str:
    """Return the report as JSON with stable keys."""
    return json.dumps(to_plain(report), indent=2, sort_keys=True, ensure_ascii=False)


def save_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `<rollout>.html` and `<rollout>.json`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    html_path = folder / f"{report.rollout.rollout_id}.html"
    json_path = folder / f"{report.rollout.rollout_id}.json"
    html_path.write_text(render_html(report), encoding="utf-8")
    json_path.write_text(render_json(report), encoding="utf-8")
    return html_path, json_path


def routed_share(policy: Policy, state: RolloutState) -> float:
    """Return the largest candidate share of any slice in this state; none once another rollout took over."""
    return 0.0 if state.outcome == REPLACED else max(route.share for route in routing(policy, state).routes)


Verdicts = tuple[Mapping[str, Any], ...]


def _verdicts(
    policy: Policy, events: Sequence[Event], states: Sequence[RolloutState]
) -> tuple[Verdicts, Verdicts]:
    """The verdicts on guardrails and on benefits that stand."""
    guardrails = {item.id: item for item in policy.spec.guardrails.items}
    benefits = {item.id: item for item in policy.spec.benefit}
    found = [dict(verdict) for verdict in _standing_verdicts(events, states)]
    own = (_described(verdict, guardrails[verdict["id"]]) for verdict in found if verdict["id"] in guardrails)
    return tuple(own), tuple(verdict for verdict in found if verdict["id"] in benefits)


def _standing_verdicts(events: Sequence[Event], states: Sequence[RolloutState]) -> Verdicts:
    """Those of the newest event that ended it, unless it goes on since; else the newest of this try."""
    past = [state.outcome for state in states]
    went_on = max((i for i, outcome in enumerate(past) if outcome is None), default=-1)
    told = [
        i
        for i, event in enumerate(events)
        if event.payload.get("verdicts") and states[i].retries == states[-1].retries
    ]
    ends = [i for i in told if i > went_on and (i == 0 or past[i] != past[i - 1])]
    chosen = (ends or told)[-1:]
    return tuple(events[chosen[0]].payload["verdicts"]) if chosen else ()


def _evaluation_of(rollout: Rollout) -> Mapping[str, Any] | None:
    """The evaluation that lies beside the adapter that sparse ran, where this machine has it."""
    folder = rollout.about.get(ADAPTER_NAME)
    path = Path(folder) / EVALUATION_FILE if folder else None
    if path is None or not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _described(verdict: dict[str, Any], item: Any) -> Mapping[str, Any]:
    bound = item.bound
    kind = "sample ratio"
    if bound is not None:
        kind = next(
            name for name in ("max", "excess_over_floor", "ratio") if getattr(bound, name) is not None
        )
    unit = "share of sessions" if item.metric.is_event else item.metric.unit
    if bound is not None and bound.over:
        unit = f"share of sessions over {bound.over:g} s"
    verdict |= proven_range(verdict)
    return {**verdict, "value": item.value, "unit": unit, "bound_kind": kind, "about": item.metric.summary}


def proven_range(verdict: Mapping[str, Any]) -> dict[str, float]:
    """The interval of a mean cut at its bound where the verdict has proven on which side of it the mean lies.

    Interval and proof are two tests of the same units; each is right, and the sharper one holds.
    """
    low, high, bound = verdict.get("low"), verdict.get("high"), verdict["bound"]
    if low is None or high is None:
        return {}
    if verdict["verdict"] == "safe":
        return {"low": min(low, bound), "high": min(high, bound)}
    if verdict["verdict"] == "harm" and verdict["log_e_harm"] >= verdict["threshold"]:
        return {"low": max(low, bound), "high": max(high, bound)}
    return {}


def _routes(policy: Policy, state: RolloutState) -> tuple[RouteEntry, ...]:
    fallen = {item.slice_id: item.by or "" for item in state.slices}
    return tuple(
        RouteEntry(
            slice_id=route.slice_id,
            tokens=f"{route.min_tokens:,} to {route.max_tokens:,}",
            share=0.0 if state.outcome == REPLACED else route.share,
            rung_id=route.rung_id,
            fell_back_by=fallen.get(route.slice_id, ""),
        )
        for route in routing(policy, state).routes
    )


def _timeline(
    events: Sequence[Event], states: Sequence[RolloutState], shares: Sequence[float]
) -> tuple[TimelineEntry, ...]:
    return tuple(
        TimelineEntry(
            event.seq, event.at_s, event.kind, state.stage_id, share, str(event.payload.get("reason", ""))
        )
        for event, state, share in zip(events, states, shares, strict=True)
        if event.kind not in EVENT_KINDS_HIDDEN
    )


def _chain(log: EventLog) -> str:
    try:
        log.verify()
    except BrokenChainError as error:
        return str(error)
    return "verified"
