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


class AuditStatus(StrEnum):
    """Whether an audited request could be scored."""

    SCORED = "scored"
    MISSING = "missing"
    ERROR = "error"


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
    compute_s: float = 0.0  # model seconds spent on it, audits not included
    attention: str = ""  # JSON: what its attention kept, layer by layer; "" where nothing was thinned


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


FAILED_OUTCOMES = frozenset({Outcome.FAILED, Outcome.FALLBACK_BEFORE, Outcome.FALLBACK_MID})
