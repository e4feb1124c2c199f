"""Time that does not step: read once from the wall clock, then counted on a monotonic one."""

from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """Epoch seconds as of the start of the process, plus what has passed since, whatever the wall clock does.

    Holds, windows and leases are differences of such times, so a step of the wall clock in either direction
    neither shortens nor lengthens one that is under way.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._offset_s = wall() - monotonic()

    def __call__(self) -> float:
        """Return the time in epoch seconds."""
        return self._offset_s + self._monotonic()

    def not_before(self, at_s: float) -> None:
        """Go on from `at_s` at the earliest, so that what was written before stays in the past."""
        self._offset_s += max(0.0, at_s - self())
