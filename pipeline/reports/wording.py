"""Numbers and outcomes in words that a manager reads without a glossary."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sentei.pipeline.reports.figures import Savings

OUTCOMES = {
    "promoted": "Promoted",
    "rolled_back": "Rolled back to dense",
    "replaced": "Replaced by a newer rollout",
    "running": "Still running",
    "paused": "Paused",
}
VERDICT_WORDS = {
    "safe": "proven safe",
    "harm": "harm proven",
    "undecided": "no harm seen, not proven",
    "no_data": "no data",
    "stale": "data too old",
    "error": "cannot be judged",
    "srm": "assignment is off",
}


def outcome_words(outcome: str) -> str:
    """Return the outcome as a heading."""
    return OUTCOMES.get(outcome, outcome)


def headline(outcome: str, share: float, saved: Savings) -> str:
    """Return the report in one sentence."""
    gain = _gain(saved)
    if outcome == "promoted":
        return f"Sparse attention passed every gate and serves {share:.0%} of the routed sessions{gain}."
    if outcome == "rolled_back":
        return "Sparse attention broke a guardrail; every request is answered by dense attention again."
    if outcome == "replaced":
        return "A newer rollout took its place; what it had proven and saved until then is below."
    return f"Not decided yet: sparse attention serves {share:.0%} of the routed sessions{gain}."


def need_words(verdict: str) -> str:
    """Return a verdict in words."""
    return VERDICT_WORDS.get(verdict, verdict)


def _gain(saved: Savings) -> str:
    change = saved.paired_compute_change
    if change is None:
        change = saved.compute_change
    if change is None:
        return ""
    return f", with {abs(change):.0%} {'less' if change < 0 else 'more'} model time on the same requests"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:,.2f} s" if value >= 1000 else f"{value:,.0f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def moment(at_s: float) -> str:
    """Return a moment in UTC for people."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


FILTERS: dict[str, Callable[..., Any]] = {
    "percent": _percent,
    "change": _change,
    "number": _number,
    "ms": _ms,
    "duration": _duration,
    "moment": moment,
}
