"""Starting on a busy machine: saying what is waited for, trying again, naming the cause."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from sentei.serving.errors import StartError

SAY_EVERY_S = 10.0
TRIES = 5

Result = TypeVar("Result")


class StartUp:
    """What a start is doing, told at once and then again every few seconds until it is done."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = SAY_EVERY_S) -> None:
        self._say = say
        self._every_s = every_s

    @contextmanager
    def waiting_for(self, what: Callable[[], str]) -> Iterator[None]:
        """Say what is waited for as long as the block runs; `what` is asked each time."""
        is_done = threading.Event()

        def tell() -> None:
            is_first = True
            while is_first or not is_done.wait(self._every_s):
                text = what()
                self._say(f"waiting for {text}" if is_first else f"waiting for {text}{_load()}")
                is_first = False

        teller = threading.Thread(target=tell, name="sentei-start", daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_done.set()
            teller.join()

    def again(
        self,
        what: str,
        work: Callable[[], Result],
        *,
        catch: tuple[type[Exception], ...],
        undo: Callable[[], None] = lambda: None,
    ) -> Result:
        """Do a piece of work, again where it fails; raises StartError that names the last cause."""
        for i in range(1, TRIES + 1):
            try:
                with self.waiting_for(lambda: what):
                    return work()
            except catch as error:
                cause, last = f"{type(error).__name__}: {_first_line(error)}", error
                self._say(f"{what} failed in try {i} of {TRIES} ({cause})")
                undo()
        raise StartError(f"{what} did not start in {TRIES} tries; the last one ended with {cause}") from last


def missing(deployments: Mapping[str, tuple[str, str]]) -> str:
    """Say which of the app's parts, given as name to (status, message), are not up yet."""
    found = [f"{name} ({status.lower()})" for name, (status, _) in deployments.items() if status != "HEALTHY"]
    return ", ".join(found) or "the app"


def cause_of(deployments: Mapping[str, tuple[str, str]]) -> str:
    """Return what the failed parts of the app say of it: of a traceback its last line."""
    causes = [
        f"{name}: {_last_line(message)}"
        for name, (status, message) in deployments.items()
        if status in ("DEPLOY_FAILED", "UNHEALTHY") and message.strip()
    ]
    return "; ".join(causes)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no words")[:300]


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    # A traceback's own last line names the error; Serve puts words of its own before it.
    return lines[-1][:500]


def _load() -> str:
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" ({busy:.0f} processes want this machine's {cores} cores)" if busy > cores else ""
