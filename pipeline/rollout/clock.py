"""A wall clock that is set, in either direction, changes no hold, no bake and no silence of a rollout.

Each event keeps, beside its time, how long the machine had been up. The next tick on the same boot of that
machine knows from it how much time has really passed; where the wall clock says otherwise it was set, and the
times that the rollout remembers move with it. On another machine, or after a reboot, only a clock that lies
before the newest event is known to be wrong: then no time has passed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sentei.policies.state import RolloutState

CLOCK = "clock"
MIN_STEP_S = 1.0  # less than this is how clocks are read and slewed
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HISTORY = frozenset({"started_s"})  # when something was, for people; no duration is taken from it


@dataclass(frozen=True, slots=True)
class Uptime:
    """Seconds since a boot, and which boot; comparable between processes of one machine."""

    boot: str
    seconds: float


def read_uptime() -> Uptime | None:
    """Read the clock that nobody sets and that runs on while the machine sleeps; None where there is none."""
    try:
        return Uptime(_BOOT_ID.read_text(encoding="ascii").strip(), time.clock_gettime(time.CLOCK_BOOTTIME))
    except (OSError, AttributeError):
        return None


def find_step(at_s: float, kept: Mapping[str, Any] | None, now_s: float, uptime: Uptime | None) -> float:
    """Return by how many seconds the wall clock was set since an event at `at_s` that kept an uptime."""
    if uptime is not None and kept is not None and kept["boot"] == uptime.boot:
        step = now_s - at_s - (uptime.seconds - kept["seconds"])
    else:
        step = min(now_s - at_s, 0.0)
    return step if abs(step) > MIN_STEP_S else 0.0


def moved(state: RolloutState, step_s: float) -> RolloutState:
    """Return the state with every moment that a duration is taken from moved by as much as the clock."""
    times = {
        item.name: getattr(state, item.name) + step_s
        for item in fields(state)
        if item.name.endswith("_s") and item.name not in _HISTORY and getattr(state, item.name) is not None
    }
    return replace(state, **times)
