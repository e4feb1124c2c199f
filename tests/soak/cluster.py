"""The whole app in processes of its own that can be found by their part, and killed or stopped one by one."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.rollout.client import AdminClient
from tests.machine import free_port

# The titles that Ray gives its processes; the names of the parts are ours.
TITLES = {
    "dense": "ray::ServeReplica:sentei:Dense",
    "sparse": "ray::ServeReplica:sentei:Sparse",
    "auditor": "ray::ServeReplica:sentei:Auditor",
    "controller": "ray::ServeReplica:sentei:Controller",
    "ingress": "ray::ServeReplica:sentei:Ingress",
    "proxy": "ray::ProxyActor",
}
CUT = re.compile(r"the ingress of \S+ went away after (\d+) pieces")
TOKEN = "soak-token-of-a-drill"


class Cluster:
    """One app at one address; it can be killed as a whole and started again on what it left behind."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self._config = {"port": free_port(), **config}
        self._folder = folder
        self._server: LocalServer | None = None
        self._num_starts = 0
        self.url = f"http://127.0.0.1:{self._config['port']}"
        self.admin = AdminClient(self.url, TOKEN, timeout_s=120.0)  # drills starve the app

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        if self._server is not None:
            process = self._server._process
            self._server.stop()
            self._server = None
            _close_pipes(process)

    def start(self) -> float:
        """Start the app and wait for its first answer; returns how many seconds that took."""
        began_s = time.monotonic()
        self._num_starts += 1
        environment = {
            "SENTEI_HOME": str(self._folder / "home"),
            "SENTEI_ADMIN_TOKEN": TOKEN,
            "RAY_AUTH_MODE": "disabled",
        }
        folder = self._folder / f"server-{self._num_starts}"
        self._server = LocalServer(self._config, folder, environment=environment).__enter__()
        return time.monotonic() - began_s

    def processes(self) -> list[psutil.Process]:
        """Everything that runs of the app: its program, Ray's daemons, all workers."""
        assert self._server is not None
        assert self._server._process is not None
        root = psutil.Process(self._server._process.pid)
        return [root, *root.children(recursive=True)]

    def pids(self, part: str) -> list[int]:
        """The processes of one part, oldest first."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if "".join(process.cmdline()[:1]).startswith(TITLES[part]):
                    found.append((process.create_time(), process.pid))
        return [pid for _, pid in sorted(found)]

    def num_cut_streams(self) -> int:
        """How many streams lost their ingress after their first piece, by what the proxy logged."""
        logs = [Path(f"/proc/{pid}/fd/2").resolve() for pid in self.pids("proxy")]
        found = [int(n) for log in logs for n in CUT.findall(log.read_text(errors="replace"))]
        return sum(num_pieces > 0 for num_pieces in found)

    def kill_everything(self) -> int:
        """SIGKILL to every process at once, Ray's daemons included; returns how many there were."""
        assert self._server is not None
        process = self._server._process
        assert process is not None
        found = self.processes()
        for member in found:  # stopped first: nobody sees another's end and tidies up
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGSTOP)
        for member in found:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait(10)
        psutil.wait_procs(found, timeout=10)
        _close_pipes(process)
        self._server = None
        return len(found)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _close_pipes(process: Any) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()  # else its end of the pipe warns when it is collected
