"""Writes records in a thread of its own, so that no stream waits for a disk; lost records are counted."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from sentei.monitors.errors import MonitorError
from sentei.monitors.records import Arrival, AuditScore, RequestRecord
from sentei.serving.ports import RecordStore

log = logging.getLogger(__name__)

RETRY_S = (0.1, 0.5, 2.0)
Record = RequestRecord | AuditScore | Arrival


class RecordWriter:
    """A bounded queue before the store; `dropped` says how many records were lost, and the log says why."""

    def __init__(
        self, store: RecordStore, *, max_waiting: int = 10_000, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._store = store
        self._queue: queue.Queue[Record | None] = queue.Queue(max_waiting)
        self._sleep = sleep
        self._thread: threading.Thread | None = None
        self.written = 0
        self.dropped = 0
        self.num_errors = 0  # tries that failed

    def start(self) -> None:
        """Start writing."""
        self._thread = threading.Thread(target=self._run, name="sentei-records", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Write what waits, then end."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def put(self, record: Record) -> bool:
        """Queue a record without waiting; False if there was no room, which is counted."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._drop(record, "the queue is full")
            return False
        return True

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        return self._queue.qsize()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            self.write(record)

    def write(self, record: Record) -> None:
        """Write one record now, with a few tries; a writer may try again because records are written once."""
        for pause_s in (*RETRY_S, None):
            try:
                self._add(record)
            except MonitorError as error:
                self.num_errors += 1
                if pause_s is None:
                    self._drop(record, str(error))
                    return
                self._sleep(pause_s)
            else:
                self.written += 1
                return

    def _add(self, record: Record) -> None:
        match record:
            case RequestRecord():
                self._store.add_request(record)
            case Arrival():
                self._store.add_arrival(record)
            case AuditScore():
                self._store.add_audit(record)

    def _drop(self, record: Record, reason: str) -> None:
        self.dropped += 1
        whose = "a new session" if isinstance(record, Arrival) else f"request {record.request_id}"
        log.error("record of %s lost (%d so far): %s", whose, self.dropped, reason)
