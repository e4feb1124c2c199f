"""What tests of real processes need of this machine: a free port, and to wait until something is so."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

EVERY_S = 0.2


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(is_done: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """Poll until something is so; returns how many seconds it took, raises TimeoutError that names it."""
    began_s = time.monotonic()
    while not is_done():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(EVERY_S)
    return time.monotonic() - began_s
