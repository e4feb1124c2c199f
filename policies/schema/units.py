"""Quantities as people write them in a policy file: durations ("30m"), shares ("2%"), weekly windows.

A bare number is refused where a duration is wanted: its unit would be a guess.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_PERCENT_SCHEMA = {"type": "string", "pattern": f"^{_PERCENT.pattern}$", "examples": ["5%"]}
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_WINDOW = re.compile(
    r"(?P<d1>[A-Z][a-z]{2}) (?P<h1>\d{2}):(?P<m1>\d{2})-"
    r"(?P<d2>[A-Z][a-z]{2}) (?P<h2>\d{2}):(?P<m2>\d{2}) (?P<tz>\S+)"
)
_WEEK_MINUTES = 7 * 24 * 60
_PERSON_CHARS = 128


def parse_duration(value: object) -> float:
    """Seconds of a text such as "30m"; raises ValueError with the forms that are allowed."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a duration is a number with a unit, such as "250ms", "20s", "30m", "12h" or "2d"')
    return float(match[1]) * _UNIT_S[match[2]]


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back to the same number of seconds."""
    for unit in ("d", "h", "m", "s", "ms"):
        count = seconds / _UNIT_S[unit]
        if count >= 1 and count == int(count) and int(count) * _UNIT_S[unit] == seconds:
            return f"{int(count)}{unit}"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


def parse_share(value: object) -> float:
    """A share between 0 and 1, written as 0.02 or "2%"."""
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value)
        if match is not None and float(match[1]) <= 100:
            return float(match[1]) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError('a share is a number from 0 to 1, such as 0.02, or a percentage such as "2%"')


def parse_number(value: object) -> float:
    """A finite number above 0, plain or as a percentage; other texts and booleans are refused."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)) is not None and float(match[1]) > 0:
        return float(match[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise ValueError('a number above 0 is wanted, such as 0.05, or a percentage such as "5%"')


def why_no_person(value: str) -> str | None:
    """Why a text is no name that people can tell apart, or None: plain letters, of one script only.

    A Cyrillic "а" in a Latin name looks like another person; who may approve must be plain to see.
    """
    if not 0 < len(value) <= _PERSON_CHARS or value != value.strip():
        return f"a name has 1 to {_PERSON_CHARS} characters and no blanks around it"
    if not value.isprintable() or unicodedata.normalize("NFKC", value) != value:
        return "it has signs that look like others; write it in plain letters"
    scripts = {unicodedata.name(sign, "unnamed").split()[0] for sign in value if sign.isalpha()}
    return (
        f"it mixes letters of {' and '.join(sorted(scripts))}; use one script" if len(scripts) > 1 else None
    )


Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    WithJsonSchema(
        {"type": "string", "pattern": f"^{_DURATION.pattern}$", "examples": ["20s", "30m", "12h"]}
    ),
]
Share = Annotated[
    float,
    BeforeValidator(parse_share),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, _PERCENT_SCHEMA]}),
]
Number = Annotated[
    float,
    BeforeValidator(parse_number),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _PERCENT_SCHEMA]}),
]


@dataclass(frozen=True, slots=True)
class WeeklyWindow:
    """A stretch of every week in one time zone; it may run over the end of the week."""

    begin_minute: int
    end_minute: int
    zone: tzinfo

    def has(self, now_s: float) -> bool:
        """Whether the moment lies in the window (its begin counts, its end does not)."""
        local = datetime.fromtimestamp(now_s, self.zone)
        minute = local.weekday() * 1440 + local.hour * 60 + local.minute
        length = (self.end_minute - self.begin_minute) % _WEEK_MINUTES
        return (minute - self.begin_minute) % _WEEK_MINUTES < length


def parse_window(value: str) -> WeeklyWindow:
    """A weekly window such as "Fri 16:00-Mon 08:00 Europe/London"."""
    match = _WINDOW.fullmatch(value)
    if match is None:
        raise ValueError('a freeze window looks like "Fri 16:00-Mon 08:00 Europe/London"')
    edges = []
    for day, hour, minute in (("d1", "h1", "m1"), ("d2", "h2", "m2")):
        if match[day] not in _DAYS or int(match[hour]) > 23 or int(match[minute]) > 59:
            raise ValueError(f'"{match[day]} {match[hour]}:{match[minute]}" is no day and time of a week')
        edges.append(_DAYS.index(match[day]) * 1440 + int(match[hour]) * 60 + int(match[minute]))
    if edges[0] == edges[1]:
        raise ValueError("a freeze window must not be empty")
    return WeeklyWindow(edges[0], edges[1], _zone(match["tz"]))


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f'"{name}" is no time zone that this machine knows; "UTC" always works') from error
