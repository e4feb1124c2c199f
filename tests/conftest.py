"""Seeds, and the bans that keep unit tests pure: no Ray, no socket, no sleeping."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import settings

from tests.postgres_server import PostgresServer, find_binary, run_postgres

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

settings.register_profile("sentei", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("sentei")

PURE = ("unit", "property")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real Postgres server on loopback, started once; skips only where there is none on this machine."""
    for name in ("initdb", "postgres"):
        if find_binary(name) is None:
            pytest.skip(f"no {name} on this machine: apt-get install postgresql")
    with run_postgres() as server:
        yield server


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a Sentei home of its own."""
    path = tmp_path / "sentei-home"
    monkeypatch.setenv("SENTEI_HOME", str(path))
    return path


@pytest.fixture(autouse=True)
def purity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sleeping and opening a network connection fail at once in unit and property tests."""
    folder = Path(str(request.node.path)).parent.name
    if folder not in PURE:
        return

    def refuse_connect(self: socket.socket, address: object) -> NoReturn:
        raise RuntimeError(f"a {folder} test may not connect (to {address!r}): move it to tests/integration")

    def refuse_sleep(seconds: float) -> NoReturn:
        raise RuntimeError(f"a {folder} test may not sleep ({seconds} s): move a FakeClock instead")

    monkeypatch.setattr(socket.socket, "connect", refuse_connect)
    monkeypatch.setattr(time, "sleep", refuse_sleep)
