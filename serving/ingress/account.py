"""What is written down of a request: its arrival, its record, the job for the auditor."""

from __future__ import annotations

from sentei.monitors.records import Arrival, Outcome, RequestRecord
from sentei.serving.engine.attention_use import to_json
from sentei.serving.engine.request import FinishReason
from sentei.serving.errors import RequestError
from sentei.serving.front.journal import Choice, Ticket
from sentei.serving.ingress.answer import Progress, Question, Sent
from sentei.serving.ingress.router import Assignment
from sentei.serving.ports import AuditJob


def sent_before(choice: Choice, ticket: Ticket, now_s: float) -> Sent:
    """Return what a client has of an answer that another ingress began."""
    finish = FinishReason(choice.finish) if choice.finish is not None else None
    ago_s = max(0.0, now_s - ticket.first_at_s)
    return Sent(tuple(choice.ids), finish, ticket.ttft_s, ago_s, choice.compute_s)


def arrival_of(assigned: Assignment, unit: str, *, at_s: float) -> Arrival:
    """Return a session's first arrival in a slice."""
    return Arrival(assigned.rollout_id, unit, assigned.slice_id, at_s, assigned.share, assigned.variant)


def record_of(question: Question, progress: Progress, *, at_s: float, total_ms: float) -> RequestRecord:
    """Return the record of an answer that has ended."""
    assigned = question.assignment
    return RequestRecord(
        request_id=question.request_id,
        session_id=question.unit,
        rollout_id=assigned.rollout_id,
        at_s=at_s,
        slice_id=assigned.slice_id,
        variant_assigned=assigned.variant,
        variant_served=progress.variant,
        rung_id=assigned.rung_id,
        share=assigned.share,
        prompt_tokens=len(question.prompt_ids),
        completion_tokens=len(progress.ids),
        ttft_ms=progress.ttft_ms(),
        tpot_ms=progress.tpot_ms(),
        total_ms=total_ms,
        outcome=progress.outcome,
        error=progress.error[:500],
        chosen_for_audit=assigned.is_audited,
        audit_probability=assigned.audit_probability,
        compute_s=progress.compute_s,
        attention=to_json(progress.attention),
    )


def audit_job_of(question: Question, progress: Progress, max_tokens: int) -> AuditJob:
    """Return the audit of a span of an answer, from the place that the draw chose."""
    assigned = question.assignment
    start = int(assigned.span_place * (max(0, len(progress.ids) - max_tokens) + 1))
    return AuditJob(
        request_id=question.request_id,
        session_id=question.unit,
        rollout_id=assigned.rollout_id,
        slice_id=assigned.slice_id,
        rung_id=assigned.rung_id,
        variant_served=progress.variant,
        prompt_ids=question.prompt_ids,
        served_ids=tuple(progress.ids[start : start + max_tokens]),
        earlier_ids=tuple(progress.ids[:start]),
        share=assigned.share,
        probability=assigned.audit_probability,
        artifact=assigned.artifact,
        traceparent=progress.span.traceparent,
    )


def is_turned_away(error: RequestError, progress: Progress) -> bool:
    """Whether a request got no answer for a reason that has nothing to do with what sparse answers.

    It was refused, or there was no room for it, or dense cannot answer it either. Its audit is none that is
    missing: there is no answer to judge. Where sparse failed first, one is missing.
    """
    if progress.ids:
        return False
    if progress.outcome is Outcome.UNANSWERABLE:
        return True
    return error.status < 500 and (progress.outcome is Outcome.OK or progress.failed_by == "busy")
