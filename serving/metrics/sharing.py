"""Ingresses share their counts through the store, so that whichever of them is asked tells of all.

Ray's proxy sends each scrape to any ingress. A counter that only one of them knew would come and go; a sum
would fall when one ends, and Prometheus would take that for a restart. So each writes its counts down every
few seconds, as series that carry its name, and each shows what all have written.

A counter must never be seen to fall. So an ingress shows of itself what it has written down, not more:
another one, asked next, could not show more either. Where it cannot write for so long that others have
stopped to show it, it shows what it knows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sentei.monitors.errors import MonitorError
from sentei.serving.metrics.names import Sample
from sentei.serving.ports import RecordStore

log = logging.getLogger(__name__)

PREFIX = "metrics."  # + process: what it has counted
EVERY_S = 5.0
FRESH_S = 30.0  # what was written longer ago is of a process that is gone, or cut off
ALONE_S = 40.0  # after so long without a write an ingress shows of itself what nobody else shows
KEEP_S = 600.0  # what is older is deleted by the next process that starts


class SharedCounts:
    """Writes the counts of one process down, and reads those of all."""

    def __init__(
        self,
        store: RecordStore,
        process: str,
        read_own: Callable[[], list[Sample]],
        *,
        now_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._process = process
        self._read_own = read_own
        self._now_s = now_s
        self._clock = clock
        self._writing = threading.Lock()  # an older write must not end after a newer one
        self._written: list[Sample] = []
        self._written_at_s = clock() - ALONE_S

    async def run(self, on_error: Callable[[], None]) -> None:
        """Write and go on writing; an error is counted and the next write tries again."""
        await asyncio.to_thread(self._quietly, self._clean, on_error)
        while True:
            await asyncio.to_thread(self._quietly, self.write, on_error)
            await asyncio.sleep(EVERY_S)

    def write(self) -> None:
        """Write the counts down; raises StoreError."""
        with self._writing:
            samples = self._read_own()
            text = json.dumps({"at_s": self._now_s(), "samples": samples}, separators=(",", ":"))
            self._store.save_value(f"{PREFIX}{self._process}", text)
            self._written, self._written_at_s = samples, self._clock()

    def own(self) -> list[Sample]:
        """Return what may be shown of this process."""
        is_alone = self._clock() - self._written_at_s >= ALONE_S
        return self._read_own() if is_alone else self._written

    def others(self) -> list[Sample]:
        """Return what the other live processes have written; raises StoreError."""
        oldest_s, found = self._now_s() - FRESH_S, list[Sample]()
        for name, text in self._store.read_values(PREFIX).items():
            entry = _parse(text)
            if name != f"{PREFIX}{self._process}" and entry["at_s"] >= oldest_s:
                found += [(sample, labels, value) for sample, labels, value in entry["samples"]]
        return found

    def _clean(self) -> None:
        oldest_s = self._now_s() - KEEP_S
        for name, text in self._store.read_values(PREFIX).items():
            if _parse(text)["at_s"] < oldest_s:
                self._store.delete_value(name)

    @staticmethod
    def _quietly(job: Callable[[], None], on_error: Callable[[], None]) -> None:
        try:
            job()
        except MonitorError as error:
            log.warning("counts could not be shared: %s", error)
            on_error()


def _parse(text: str) -> dict[str, Any]:
    """Return an entry; one that another version wrote in another way is none."""
    try:
        entry: dict[str, Any] = json.loads(text)
        if isinstance(entry["at_s"], int | float) and isinstance(entry["samples"], list):
            return entry
    except (ValueError, TypeError, KeyError):
        pass
    return {"at_s": 0.0, "samples": []}
