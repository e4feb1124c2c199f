"""A rollout whose controllers are killed, stopped and doubled: real processes on one database.

Run as `python -m tests.kill_story kill|pair|stop URL...`; prints one JSON document. Each controller is a
process of its own, forked from here, so that starting one costs milliseconds and SIGKILL hits nobody else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.engine import Connection

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, TickResult, start_rollout
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request
from tests.postgres_server import PostgresServer

SESSIONS = 20  # a second: each stage proves its own safety
SECONDS = 11
PAUSED_AT, RESUMED_AT, EDITED_AT, APPROVED_AT = 4, 6, 7, 7
# Every kind of wait: evidence, least time, a pause, an edit, a human, a bake.
STORY = (
    POLICY.replace(
        "{id: half, share: 50%, rung: medium}",
        "{id: half, share: 50%, rung: medium, hold_min: 2s, approval: {by: [ann]}}",
    )
    .replace("bake: 2s", "bake: 3s")
    .replace("monitor_lease: 3s", "monitor_lease: 1s")
)
SAFER = STORY.replace("min_units: 20", "min_units: 24")


class Databases(Protocol):
    """Where stories are kept: named databases that can be copied while nobody uses them."""

    def url(self, name: str) -> str:
        """The URL of a database."""

    def copy(self, source: str, target: str) -> None:
        """Make or replace `target`."""


class SqliteFiles:
    """Databases that are files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def url(self, name: str) -> str:
        """The URL of a file."""
        return f"sqlite:///{self._folder}/{name}.db"

    def copy(self, source: str, target: str) -> None:
        """Copy the file; nobody has it open, so no log of SQLite stands beside it."""
        for end in ("-wal", "-shm"):
            (self._folder / f"{target}.db{end}").unlink(missing_ok=True)
            assert not (self._folder / f"{source}.db{end}").exists()
        shutil.copyfile(self._folder / f"{source}.db", self._folder / f"{target}.db")


class FatefulStore(Store):
    """A store that sends its own process a signal at one of its write transactions."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_writes = 0
        self.fate: tuple[int, bool, signal.Signals] | None = None  # which write, inside it or after it, what

    @contextmanager
    def write(self, what: str) -> Iterator[Connection]:
        """Write; inside the transaction, or right after its commit, fate may strike."""
        self.num_writes += 1
        with super().write(what) as connection:
            yield connection
            self._strike(is_inside=True)
        self._strike(is_inside=False)

    def _strike(self, *, is_inside: bool) -> None:
        if self.fate is not None and self.fate[:2] == (self.num_writes, is_inside):
            os.kill(os.getpid(), self.fate[2])


def fork(work: Callable[[], Any]) -> int:
    """Do the work in a process of its own and return its id; it exits with 0 if nothing was raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def end(pid: int) -> int:
    """Wait for a process; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def live(store: Store, second: int) -> None:
    """What happens in one second besides the controller: traffic, and people."""
    if second == 0:
        start_rollout(store, STORY, now_s=START_S, rollout_id=ROLLOUT)
    for i in range(second * SESSIONS, (second + 1) * SESSIONS):
        store.add_request(make_request(i, at_s=START_S + second, share=0.5))
        store.add_audit(make_audit(i, at_s=START_S + second))
    for at, kind in ((PAUSED_AT, "pause"), (RESUMED_AT, "resume"), (APPROVED_AT, "approve")):
        if at == second:
            store.add_command(ROLLOUT, kind, by="ann", at_s=START_S + second)
    if second == EDITED_AT:
        store.add_revision(ROLLOUT, SAFER, by="ann", at_s=START_S + second)


def tick(store: Store, second: int, owner: str = "a") -> TickResult:
    """One tick of a controller that has just been started."""
    return RolloutRunner.open(store, ROLLOUT, RunnerOptions(owner)).tick(START_S + second + 0.5)


def go_on(url: str, second: int) -> None:
    """A new controller does the tick of that second again and lives to the end of the story."""
    with Store.open(url) as store:
        runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("a"))
        assert not runner.tick(START_S + second + 0.5).error
        for later in range(second + 1, SECONDS):
            live(store, later)
            assert not runner.tick(START_S + later + 0.5).error


def die(url: str, second: int, write: int, is_inside: bool) -> None:
    """A controller that is killed at one of the writes of one tick."""
    with FatefulStore.open(url) as store:
        store.num_writes, store.fate = 0, (write, is_inside, signal.SIGKILL)
        tick(store, second)


def tell(url: str) -> dict[str, Any]:
    """The end of a story: the last state to the byte, what happened when, and whether the chain holds."""
    with Store.open(url) as store:
        log = EventLog(store)
        events = list(log.read(ROLLOUT))
        return {
            "state": events[-1].state,
            "deeds": [[e.at_s, e.kind, e.state] for e in events if e.kind not in ("evidence", "hold")],
            "waits": [e.kind for e in events if e.kind == "hold"],
            "length": log.verify(),
            "routing": store.read_routing()[0].version,  # type: ignore[index]
            "num_states": len({e.state for e in events}),
        }


def kill_everywhere(databases: Databases) -> dict[str, Any]:
    """Kill at every write of every tick, inside it and after it; how many ended otherwise than unharmed."""
    writes = []
    with FatefulStore.open(databases.url("whole")) as store:
        pass
    for second in range(SECONDS):
        with FatefulStore.open(databases.url("whole")) as store:
            live(store, second)
        databases.copy("whole", f"before_{second}")
        with FatefulStore.open(databases.url("whole")) as store:
            store.num_writes = 0
            assert not tick(store, second).error
            writes.append(store.num_writes)
    expected = tell(databases.url("whole"))
    points = [
        (s, w, inside) for s in range(SECONDS) for w in range(1, writes[s] + 1) for inside in (True, False)
    ]
    wrong = []
    for second, write, is_inside in points:
        databases.copy(f"before_{second}", "story")
        url = databases.url("story")
        killed = end(fork(lambda s=second, w=write, i=is_inside, u=url: die(u, s, w, i)))  # type: ignore[misc]
        went_on = end(fork(lambda s=second, u=url: go_on(u, s)))  # type: ignore[misc]
        found = tell(url)
        same = all(found[name] == expected[name] for name in ("state", "deeds", "routing"))
        if killed != -signal.SIGKILL or went_on or not same or found["length"] < len(expected["deeds"]):
            wrong.append([second, write, is_inside, killed, went_on, same, found["length"]])
    return {"points": len(points), "wrong": wrong, "writes": writes, **expected}


def watch(url: str, owner: str, until_s: float, report: Path) -> None:
    """A controller on the real clock that notes each of its ticks."""
    with Store.open(url) as store, report.open("w") as file:
        runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions(owner))
        while time.time() < until_s:
            result = runner.tick(time.time())
            row = [
                time.time(),
                result.has_lease,
                result.error,
                None if result.event is None else result.event.seq,
            ]
            file.write(json.dumps(row) + "\n")
            file.flush()
            time.sleep(0.02)


def run_pair(databases: Databases, folder: Path) -> dict[str, Any]:
    """Two controllers at once on the real clock; the one that acts is killed, the other takes over."""
    url, reports = databases.url("pair"), [folder / "a.jsonl", folder / "b.jsonl"]
    with Store.open(url) as store:
        start_rollout(store, STORY, now_s=time.time(), rollout_id=ROLLOUT)
    until_s = time.time() + 4.0
    pids = [
        fork(lambda owner=owner, path=path: watch(url, owner, until_s, path))  # type: ignore[misc]
        for owner, path in zip("ab", reports, strict=True)
    ]
    time.sleep(1.5)
    with Store.open(url) as store:  # a person acts while both are there
        store.add_command(ROLLOUT, "pause", by="ann", at_s=time.time())
    time.sleep(0.3)
    leader = 0 if any(row[1] for row in _rows(reports[0])) else 1
    killed_s = time.time()
    os.kill(pids[leader], signal.SIGKILL)
    with Store.open(url) as store:
        store.add_command(ROLLOUT, "abort", by="ann", at_s=time.time())
    codes = [end(pid) for pid in pids]
    with Store.open(url) as store:
        events = [[e.kind, e.token] for e in EventLog(store).read()]
        length = EventLog(store).verify()
    acted = [[row for row in _rows(path) if row[1]] for path in reports]
    return {
        "codes": codes,
        "leader": leader,
        "follower_acted_before_s": [row[0] for row in acted[1 - leader] if row[0] < killed_s],
        "taken_over_after_s": min((row[0] for row in acted[1 - leader]), default=1e9) - killed_s,
        "errors": [row[2] for path in reports for row in _rows(path) if row[2]],
        "events": events,
        "length": length,
    }


def _rows(path: Path) -> list[Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def run_stopped(databases: Databases) -> dict[str, Any]:
    """A controller is frozen between taking the lease and writing; meanwhile another one acts."""
    url = databases.url("stop")
    with Store.open(url) as store:
        live(store, 0)
        tick(store, 0, "a")
        store.add_command(ROLLOUT, "abort", by="ann", at_s=START_S)

    def freeze() -> None:
        with FatefulStore.open(url) as store:
            store.num_writes, store.fate = 0, (1, False, signal.SIGSTOP)
            assert "StaleLeaseError" in tick(store, 1, "a").error

    pid = fork(freeze)
    os.waitpid(pid, os.WUNTRACED)
    with Store.open(url) as store:
        other = tick(store, 5, "b")
    os.kill(pid, signal.SIGCONT)
    code = end(pid)
    with Store.open(url) as store:
        log = EventLog(store)
        return {
            "code": code,
            "other": None if other.event is None else other.event.kind,
            "kinds": [event.kind for event in log.read()],
            "length": log.verify(),
            "renewals": store.read_routing()[1],  # type: ignore[index]
        }


class PostgresDatabases:
    """Databases of a running server, made when they are asked for."""

    def __init__(self, server: PostgresServer) -> None:
        self._server, self._made = server, set[str]()

    def url(self, name: str) -> str:
        """The URL of a database, which is made if need be."""
        if name not in self._made:
            self._server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            self._server.execute(f"CREATE DATABASE {name}")
            self._made.add(name)
        return self._server.url(name)

    def copy(self, source: str, target: str) -> None:
        """Make or replace `target`."""
        self._server.copy(source, target)
        self._made.add(target)


def main(scene: str, folder: str, port: str) -> None:
    """Play one scene; port 0 means SQLite."""
    databases: Databases = SqliteFiles(Path(folder))
    if port != "0":
        databases = PostgresDatabases(PostgresServer(int(port)))
    if scene == "kill":
        found = kill_everywhere(databases)
    else:
        found = run_pair(databases, Path(folder)) if scene == "pair" else run_stopped(databases)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
