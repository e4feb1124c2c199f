"""A world of one's own for `policy simulate`: effect sizes, correlation, regressions, drift, outages."""

from __future__ import annotations

import re
from dataclasses import replace

from sentei.policies.simulation.world import Effect, Scenario
from sentei.policies.spec.units import format_duration, parse_duration

REQUESTS = 20  # of a session whose requests agree by a given correlation
_EFFECT = re.compile(r"(?P<gate>[a-z][a-z0-9_-]*)=(?P<factor>\d+(\.\d+)?)(@(?P<place>[a-z][a-z0-9_-]*))?")


def own_scenario(
    effects: list[str],
    *,
    begins_at: int = 0,
    grows_over: int = 0,
    correlation: float | None = None,
    missing: float = 0.0,
    outage: str | None = None,
) -> Scenario | None:
    """The scenario "own" of those options, or None if nothing was asked for; ValueError names a bad one."""
    found = tuple(_effect(text, begins_at, grows_over) for text in effects)
    if not found and (begins_at or grows_over):
        raise ValueError("--begins-at and --grows-over belong to an --effect, such as --effect agree=2")
    if not found and correlation is None and not missing and outage is None:
        return None
    said = {
        f"from session {begins_at} of the slice on": begins_at,
        f"growing over {grows_over} sessions": grows_over,
        f"requests of a session correlated by {correlation}": correlation,
        f"a share of {missing:g} of the audits never scored": missing,
        f"nothing arrives from {outage}": outage,
    }
    own = Scenario(
        "own",
        "; ".join([", ".join(effects)] * bool(effects) + [words for words, given in said.items() if given]),
        found,
        missing=missing,
        silence=None if outage is None else _hours(outage),
    )
    if correlation is None:
        return own
    # The correlation inside a session is 1 / (1 + concentration) of its Beta distribution.
    return replace(own, concentration=1 / correlation - 1, requests=REQUESTS)


def _effect(text: str, begins_at: int, grows_over: int) -> Effect:
    match = _EFFECT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--effect looks like agree=2 or agree=1.25@long (guardrail, times, slice), not {text!r}"
        )
    factor = float(match["factor"])
    return Effect(match["gate"], factor, match["place"], begins_at=begins_at, grows_over=grows_over)


def _hours(text: str) -> tuple[float, float]:
    parts = text.split("-")
    if len(parts) != 2:
        raise ValueError(f"--outage looks like 30m-90m (from, to), not {text!r}")
    begin_s, end_s = (parse_duration(part) for part in parts)
    if begin_s >= end_s:
        raise ValueError(
            f"--outage must end after it begins, not {format_duration(begin_s)} to {format_duration(end_s)}"
        )
    return begin_s / 3600, end_s / 3600
