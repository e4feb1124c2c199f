"""A real Postgres server for tests: Debian's binaries, loopback only, a temporary folder, never as root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.machine import free_port

USER = "sentei"
START_S = 30.0


def find_binary(name: str) -> str | None:
    """Where Postgres keeps its programs; Debian leaves them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


class PostgresServer:
    """One running server; each test takes a database of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._num_databases = 0

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def copy(self, source: str, target: str) -> None:
        """Make or replace the database `target` as a copy of `source`, which nobody may be using."""
        self.execute(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)")
        self.execute(f"CREATE DATABASE {target} TEMPLATE {source}")

    def execute(self, statement: str) -> None:
        """Run one statement outside a transaction."""
        import psycopg

        place = f"host=127.0.0.1 port={self.port} user={USER} dbname=postgres"
        with psycopg.connect(place, autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]


@contextmanager
def run_postgres() -> Iterator[PostgresServer]:
    """Start a server in a temporary folder, and stop it and remove the folder at the end."""
    folder = Path(tempfile.mkdtemp(prefix="sentei-postgres-"))
    data, user = folder / "data", _user()
    if user is not None:
        shutil.chown(folder, user)
    _run([_binary("initdb"), "-D", str(data), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8"], user)
    port = free_port()
    # Nothing here must survive a power cut; what a killed client leaves behind does not depend on fsync.
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [_binary("postgres"), "-D", str(data), *options],
            user=user,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        _wait(process, port, folder / "log")
        yield PostgresServer(port)
    finally:
        process.terminate()
        process.wait(START_S)
        shutil.rmtree(folder, ignore_errors=True)


def _binary(name: str) -> str:
    found = find_binary(name)
    assert found is not None
    return found


def _user() -> str | None:
    """Postgres refuses to run as root: Debian's own user then, or nobody."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _run(command: list[str], user: str | None) -> None:
    done = subprocess.run(command, user=user, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user={USER} dbname=postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"Postgres did not start: {log.read_text()}")
