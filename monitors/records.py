"""What is written down: one record per request, one score per audited request, one result per drift check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended for the user; both fallbacks were answered by dense after the candidate failed."""

    OK = "ok"
    FAILED = "failed"
    FALLBACK_BEFORE = "fallback_before"
    FALLBACK_MID = "fallback_mid"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # no server could answer this request: the caller's own mistake
    UNANSWERABLE = "unanswerable"  # dense fails on it, so it says nothing of the candidate


class AuditStatus(StrEnum):
    """Whether an audited request could be scored."""

    SCORED = "scored"
    MISSING = "missing"
    ERROR = "error"


class Missing(StrEnum):
    """Why a chosen request has no score."""

    NO_TOKENS = "no_tokens"  # nothing was served: the user left, or nobody could answer
    NO_AUDITOR = "no_auditor"  # none runs, or it did not answer
    QUEUE_FULL = "queue_full"
    EXPIRED = "expired"  # it waited too long for its replay to be news
    ROLLOUT_ENDED = "rollout_ended"
    STOPPED = "auditor_stopped"
    TIMEOUT = "timeout"  # no score came, and nobody said why


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as it was assigned, served and ended; no text of it is kept."""

    request_id: str
    session_id: str
    rollout_id: str  # "" where no rollout was running
    at_s: float  # epoch seconds when it ended
    slice_id: str
    variant_assigned: str  # "dense" or "sparse": counted here whoever answered (intention to treat)
    variant_served: str  # who sent the last token
    rung_id: str  # the rung of the slice's route, also for dense-assigned requests
    share: float  # the intended candidate share when it was assigned
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    total_ms: float
    outcome: str  # a value of Outcome
    error: str = ""
    chosen_for_audit: bool = False
    audit_probability: float = 0.0  # with which it was drawn for an audit, before it was served
    compute_s: float = 0.0  # model seconds spent on it, audits not included
    attention: str = ""  # JSON: what its attention kept, layer by layer; "" where nothing was thinned


@dataclass(frozen=True, slots=True)
class Arrival:
    """A session that came to a slice for the first time: written when it was assigned, not when answered.

    Written at the end, the faster variant would be seen sooner, and a correct split would look skewed.
    """

    rollout_id: str
    session_id: str
    slice_id: str
    at_s: float  # epoch seconds
    share: float  # the intended candidate share when it was assigned
    variant_assigned: str


@dataclass(frozen=True, slots=True)
class AuditScore:
    """Served tokens replayed through dense twice and through the sparse rung once; no numbers: not scored."""

    request_id: str
    session_id: str
    rollout_id: str
    at_s: float
    slice_id: str
    rung_id: str  # the rung that was replayed
    variant_served: str
    status: str  # a value of AuditStatus
    tokens: int = 0
    token_disagreement: float | None = None
    token_disagreement_floor: float | None = None
    kl: float | None = None  # nats per token, capped
    kl_floor: float | None = None
    first_divergence: int | None = None  # index of the first token that sparse would not have chosen
    dropped_mass_mean: float | None = None  # of sampled rows, heads and layers: share of dense's attention
    dropped_mass_p99: float | None = None
    dense_compute_s: float = 0.0
    sparse_compute_s: float = 0.0
    prompt_tokens: int = 0
    share: float = 0.0  # the intended candidate share when the request was assigned
    audit_probability: float = 0.0  # with which the request was drawn
    span_start: int = 0  # served tokens before the replayed ones
    reason: str = ""  # why there is no score: a value of Missing, or what failed
    artifact: str = ""  # digest of what the sparse replica ran


@dataclass(frozen=True, slots=True)
class DriftResult:
    """One finished drift check as it is kept, with the path of its HTML report."""

    rollout_id: str
    signal_id: str
    at_s: float
    status: str
    score: float | None
    threshold: float | None
    window_units: int
    window_id: int
    detail: str = ""
    html_path: str = ""


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One answer to the query of a metric of one's own; no value unless status is "ok"."""

    rollout_id: str
    metric_id: str
    at_s: float
    status: str
    value: float | None
    detail: str = ""


# An id names a folder and a tag, so its letters are few. A policy's name with the moment is shorter.
ROLLOUT_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout as it was asked for: the policy text is kept word for word, for people.

    What decides is the resolved policy in the event that started it (`pipeline.rollout.revisions`).
    """

    rollout_id: str
    policy_text: str
    created_at_s: float
    about: dict[str, str]  # model, adapter, git sha and the like, for the records


@dataclass(frozen=True, slots=True)
class Revision:
    """One edit of a running rollout's policy, as it was asked for."""

    seq: int
    rollout_id: str
    at_s: float
    by: str
    policy_text: str


ARTIFACT = "artifact.sparse"  # the named value that says what the sparse replicas run
FAILED_OUTCOMES = frozenset({Outcome.FAILED, Outcome.FALLBACK_BEFORE, Outcome.FALLBACK_MID})
