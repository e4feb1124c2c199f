"""Numbers and outcomes in words that a manager reads without a glossary."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sentei.pipeline.reports.figures import Savings

OUTCOMES = {
    "promoted": "Promoted",
    "rolled_back": "Rolled back to dense",
    "held": "Held: no gain",
    "replaced": "Replaced by a newer rollout",
    "running": "Still running",
    "paused": "Paused",
    "sheltered": "Sheltered: dense is down",
}
VERDICT_WORDS = {
    "safe": "proven safe",
    "harm": "harm proven",
    "undecided": "no harm seen, not proven",
    "no_data": "no data",
    "stale": "data too old",
    "error": "cannot be judged",
    "srm": "assignment is off",
    "gain": "saving proven",
    "no_gain": "proven: no gain",
}


def outcome_words(outcome: str) -> str:
    """Return the outcome as a heading."""
    return OUTCOMES.get(outcome, outcome)


def headline(outcome: str, share: float, saved: Savings) -> str:
    """Return the report in one sentence."""
    gain = _gain(saved)
    if outcome == "promoted":
        return f"Sparse attention passed every gate and serves {share:.0%} of the routed sessions{gain}."
    if outcome == "held":
        who = f"{share:.0%} of the routed sessions stay on it" if share else "nobody is served by it"
        return f"Sparse attention does not pay here{gain}: it goes no further, and {who}."
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
        return ""
    return f", with {abs(change):.0%} {'less' if change < 0 else 'more'} model time on the same requests"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if abs(value) < 5e-7:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:,.2f} s" if value >= 1000 else f"{value:,.0f} ms"


def _quantity(value: float, unit: str) -> str:
    """Return a value of the first screen with its unit."""
    if unit == "usd":
        return f"{value:.3g} USD"
    if unit == "mib":
        return f"{value:,.0f} MiB"
    if unit == "percent":
        return f"{value:+.2f}%"
    if unit == "ms":
        return _ms(value)
    if unit == "nats":
        return f"{_number(value)} nats"
    if unit == "ratio":
        return f"{value:.3g} times"
    if unit.startswith("share"):
        return f"{value:.1%}"
    return f"{_number(value)} {unit}"


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
    "quantity": _quantity,
    "duration": _duration,
    "moment": moment,
}
