"""The values that a guardrail may watch and the columns that a drift signal may watch: a closed list.

A misspelt metric is an error when the policy is loaded; elsewhere it would be a gate that never fires.
In every metric here a higher value is worse, so every bound is an upper one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["quality", "operational", "assignment", "benefit"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One observable value; its direction is fixed: higher is worse."""

    name: str
    family: Family  # quality belongs to (rung, slice) and carries over; operational starts afresh per stage
    unit: str
    upper: float | None  # its natural upper end; None: it needs a cap or a threshold
    has_floor: bool  # whether each value comes with the same value measured dense against dense
    is_event: bool  # whether it is 0 or 1
    summary: str


_ALL = (
    Metric(
        "audit.token_disagreement", "quality", "share", 1.0, True, False, "tokens that dense would not pick"
    ),
    Metric("audit.kl", "quality", "nats", None, True, False, "mean KL(dense || sparse) over served tokens"),
    Metric("audit.dropped_mass_mean", "quality", "share", 1.0, False, False, "attention mass dropped, mean"),
    Metric(
        "audit.dropped_mass_p99", "quality", "share", 1.0, False, False, "attention mass dropped, p99 row"
    ),
    Metric(
        "audit.compute_ratio",
        "benefit",
        "ratio",
        None,
        False,
        False,
        "sparse over dense seconds of one audit",
    ),
    Metric("serve.failed", "operational", "0 or 1", 1.0, False, True, "failed, also when dense rescued it"),
    Metric("serve.ttft_ms", "operational", "ms", None, False, False, "time to first token"),
    Metric("serve.tpot_ms", "operational", "ms", None, False, False, "time per output token"),
    Metric("serve.total_ms", "operational", "ms", None, False, False, "time of the whole answer"),
    Metric("assignment", "assignment", "0 or 1", 1.0, False, True, "went to the candidate (sample ratio)"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

COLUMNS: dict[str, Literal["quality", "input"]] = {
    "token_disagreement": "quality",
    "kl": "quality",
    "dropped_mass_mean": "quality",
    "dropped_mass_p99": "quality",
    "completion_tokens": "quality",
    "prompt_tokens": "input",
}
