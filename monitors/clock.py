"""Time that does not step, and that all processes of one machine share, also across their restarts.

Wall clocks step. A monotonic clock does not, but what it counts from is the start of the machine. So the
first process that opens a store on a machine writes down at which epoch second that machine's monotonic clock
was 0, and every later one, until the machine starts again, reads it there (`Store.clock`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


class SteadyClock:
    """Epoch seconds as of one reading of the wall clock, plus what has passed since, whatever it does later.

    Holds, windows and leases are differences of such times, so a step of the wall clock in either direction
    neither shortens nor lengthens one that is under way. With `offset_s`, the epoch second at which
    `monotonic` was 0, it goes on where another process of the same machine began.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        offset_s: float | None = None,
    ) -> None:
        self._monotonic = monotonic
        self._offset_s = wall() - monotonic() if offset_s is None else offset_s

    def __call__(self) -> float:
        """Return the time in epoch seconds."""
        return self._offset_s + self._monotonic()

    def not_before(self, at_s: float) -> None:
        """Go on from `at_s` at the earliest, so that what was written before stays in the past."""
        self._offset_s += max(0.0, at_s - self())


def machine_id() -> str:
    """Return a name of this start of this machine: who has it shares one monotonic clock; "" if unknown.

    A time namespace shifts the monotonic clock of those within, so it is part of the name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}.{os.stat('/proc/self/ns/time').st_ino:x}"
    except (OSError, UnicodeDecodeError):
        return ""
