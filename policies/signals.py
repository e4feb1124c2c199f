"""Value types that flow into a decision: observations, health, drift, operator commands; and the verdicts.

Everything here is a frozen dataclass with units in its names. Monitors make these values, the store and the
event log carry them as JSON, and `policies.engine.decide` reads them. No clock, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What the evidence says about one guardrail or benefit in one slice.

    Nothing observed is NO_DATA, never SAFE. Only a benefit has GAIN and NO_GAIN, and neither SAFE nor HARM.
    """

    SAFE = "safe"
    HARM = "harm"
    UNDECIDED = "undecided"
    NO_DATA = "no_data"
    STALE = "stale"
    ERROR = "error"
    SRM = "srm"
    GAIN = "gain"
    NO_GAIN = "no_gain"


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured value of one statistical unit, read from the store in the order of `seq`.

    The unit is one session in one half of a slice, at one rung, within one period of the present phase: each
    comes once, or the error bounds of the evidence do not hold. serve.* comes from both arms.
    """

    seq: int  # id in the store, strictly growing: the cursor of a rollout points at it
    value_name: str  # a name of policies.schema.METRICS, such as "audit.kl" or "serve.failed"
    slice_id: str
    rung_id: str  # the rung that was measured (for audits: the rung that was replayed)
    session_id: str
    variant: str  # "dense" or "sparse": who served it; for serve.* who it was assigned to
    at_s: float  # epoch seconds
    value: float  # in the metric's own unit; NaN is an error, not a number; inf only where "later than any"
    floor: float | None = (
        None  # the same value measured dense against dense (noise floor), where there is one
    )
    missing: bool = (
        False  # chosen for audit but never scored: worst case for promotion, left out for rollback
    )
    share: float | None = None  # the candidate's intended share when the request was assigned, as recorded
    half: str = ""  # "lower" or "upper" half of its slice by prompt length; "": not known
    reason: str = ""  # of a missing audit: why it has no score


@dataclass(frozen=True, slots=True)
class VariantHealth:
    """What one variant did in the breaker's window, for requests that were assigned to it."""

    variant: str
    window_s: float
    requests: int
    failures: (
        int  # errors, timeouts, NaN logits, empty answers: also those rescued by dense (intention to treat)
    )
    replicas_ready: int


@dataclass(frozen=True, slots=True)
class DriftSignal:
    """One Evidently check over the newest window of one column."""

    id: str  # the id of the signal in the policy
    status: str  # "clear" | "drift" | "no_data" | "error"
    score: float | None
    threshold: float | None
    window_units: int
    window_id: int  # grows by one with each full window: the same window is not counted twice
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MetricSample:
    """What a metric of one's own was at one moment, as it was written down."""

    seq: int  # id in the store, strictly growing
    metric_id: str  # the id of the guardrail in the policy
    at_s: float  # epoch seconds when it was asked for
    status: str  # "ok" | "no_data" | "stale" | "error"
    value: float | None  # None unless ok
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SliceTraffic:
    """How new sessions of one slice were assigned since the rollout's cursor, for the sample-ratio test."""

    slice_id: str
    share: float  # the intended candidate share while these were assigned
    candidate: int
    total: int


@dataclass(frozen=True, slots=True)
class SliceLengths:
    """How many requests of one slice were served since the cursor, and how many of them in its upper half."""

    slice_id: str
    requests: int
    upper: int


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's order, read from the store's inbox: pause, resume, promote, abort, approve, retry.

    Or the yes of an approval's webhook: kind `gate`, which no operator can give.
    """

    seq: int
    kind: str
    by: str
    reason: str = ""  # of a gate: the stay that it was asked about


@dataclass(frozen=True, slots=True)
class Signals:
    """All that one tick has read; `decide` gets nothing else of the world."""

    observations: tuple[Observation, ...] = ()
    health: tuple[VariantHealth, ...] = ()
    drift: tuple[DriftSignal, ...] = ()
    traffic: tuple[SliceTraffic, ...] = ()
    commands: tuple[Command, ...] = ()
    samples: tuple[MetricSample, ...] = ()  # of metrics of one's own, oldest first
    cursor: int = 0  # highest Observation.seq that this tick has read
    newest_data_at_s: float | None = None  # when the newest record or score was written
    unscored_since_s: float | None = None  # since when audits are due and none was scored; None: none waits
    lengths: tuple[SliceLengths, ...] = ()
    artifact: str = ""  # digest of what the sparse replicas run; "": nobody said
    has_lease: bool = True  # this controller holds the fencing lease
    read_error: str | None = None  # the store could not be read: data is unknown, not zero


@dataclass(frozen=True, slots=True)
class SliceRoute:
    """Where requests of one slice go: `share` of the sessions to the candidate at `rung_id`."""

    slice_id: str
    min_tokens: int  # inclusive
    max_tokens: int  # exclusive
    share: float
    rung_id: str  # "dense" where the slice is pinned or has fallen back
    audit_share: float  # probability that a request served by dense is audited
    audit_share_sparse: float = 0.0  # and one served by sparse


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """What the ingress obeys; a table that is not renewed within `lease_s` means dense for everybody."""

    rollout_id: str
    version: int  # fencing: grows with every change, never goes back
    salt: str
    lease_s: float
    routes: tuple[SliceRoute, ...]
    artifact: str = ""  # digest of what was proven: a sparse replica that runs another gets nobody
