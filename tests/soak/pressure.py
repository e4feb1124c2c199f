"""What honest callers, operators and memory feel of an attack.

Of 300 half-sent bodies, 50 prompts of 3 MB and 500 connections at once:

    python -m tests.soak.pressure --rounds 6

The pocket model answers one honest caller after the other, in rounds without and with the attack, which runs
in a process of its own. Prints one JSON document: medians and spread of both kinds of rounds, the slowest
health check and abort, and the memory of each process before, under and after the attack.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.soak.cluster import TOKEN, Cluster

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
HALF = HEAD.format(9).encode() + b"{"
NUM_HALF, NUM_LARGE, NUM_CONNECTIONS = 300, 50, 500
LARGE_BYTES = 3_000_000
ROUND_S = 10.0
AGAIN_S = 1.0  # what the server gives up is begun anew so long after
CALM_S = 8.0  # after an attack: its last bodies end
MEMORY_WITHIN_S = 60.0
PARTS = ("proxy", "ingress")


async def attack(port: int, seconds: float) -> dict[str, int]:
    """Keep all of it up for a while: what the server gives up is begun anew. Counts what came back."""
    found: dict[str, int] = {}
    end_s = time.monotonic() + seconds

    def count(what: str) -> None:
        found[what] = found.get(what, 0) + 1

    async def half() -> None:
        while time.monotonic() < end_s:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(HALF)
                with suppress(TimeoutError):
                    async with asyncio.timeout(end_s - time.monotonic()):
                        line = await reader.readline()
                        count(f"half {line.decode(errors='replace').split(' ')[1] if line else 'cut'}")
                writer.close()
            await asyncio.sleep(AGAIN_S)

    async def large() -> None:
        body = b'{"model": "pocket", "max_tokens": 1, "prompt": "' + b"a " * (LARGE_BYTES // 2) + b'"}'
        while time.monotonic() < end_s:
            with suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                async with asyncio.timeout(120):
                    with suppress(OSError):
                        writer.write(HEAD.format(len(body)).encode() + body)
                        await writer.drain()
                    line = await reader.readline()
                    count(f"large {line.decode(errors='replace').split(' ')[1] if line else 'cut'}")
                writer.close()
            await asyncio.sleep(AGAIN_S)

    async def connection() -> None:
        with suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(max(1.0, end_s - time.monotonic())):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
                line = await reader.readline()
                count(f"connection {line.decode(errors='replace').split(' ')[1] if line else 'cut'}")
                await reader.read()
            writer.close()

    await asyncio.gather(
        *(half() for _ in range(NUM_HALF)),
        *(large() for _ in range(NUM_LARGE)),
        *(connection() for _ in range(NUM_CONNECTIONS)),
        return_exceptions=True,
    )
    return found


class Caller:
    """Asks one thing after the other in a thread of its own, and keeps how long each took."""

    def __init__(self, url: str, what: str) -> None:
        self._url, self._what = url, what
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.took_s: list[float] = []
        self.faults: list[str] = []

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(130)

    def _run(self) -> None:
        headers = {"authorization": f"Bearer {TOKEN}"} if self._what == "abort" else {}
        # A connection for each call, as callers have that come anew.
        while not self._is_over.is_set():
            began_s = time.monotonic()
            try:
                with httpx.Client(
                    base_url=self._url, timeout=120, trust_env=False, headers=headers
                ) as client:
                    status = self._ask(client)
            except httpx.HTTPError as error:
                self.faults.append(f"{self._what} {type(error).__name__}")
            else:
                if status == (404 if self._what == "abort" else 200):
                    self.took_s.append(time.monotonic() - began_s)
                else:
                    self.faults.append(f"{self._what} {status}")
            self._is_over.wait(0.05 if self._what == "honest" else 0.5)

    def _ask(self, client: httpx.Client) -> int:
        if self._what == "healthz":
            return client.get("/healthz").status_code
        if self._what == "abort":  # of a rollout that is none: read, checked against the store, refused
            return client.post("/admin/v1/rollouts/none/commands", json={"kind": "abort"}).status_code
        body = {"model": "pocket", "prompt": "def main(argv):", "max_tokens": 16, "temperature": 0}
        return client.post("/v1/completions", json=body).status_code


def memory(cluster: Cluster) -> dict[str, list[int]]:
    """Resident MiB that are the process's own, of each part's processes."""
    return {
        part: [psutil.Process(pid).memory_full_info().uss >> 20 for pid in cluster.pids(part)]
        for part in PARTS
    }


def run(folder: Path, given: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Measure rounds without and with the attack in turn."""
    config = {
        "model": "pocket",
        "mlflow_uri": "off",
        "ingress_replicas": 2,
        "store_url": f"sqlite:///{folder / 's.db'}",
    }
    found: dict[str, Any] = {"calm": [], "attacked": []}
    with Cluster(config, folder) as cluster:
        port = int(cluster.url.rsplit(":", 1)[1])
        with Caller(cluster.url, "honest"):
            time.sleep(4)
        before = memory(cluster)
        slowest = {"healthz": 0.0, "abort": 0.0}
        honest: dict[str, list[float]] = {"calm": [], "attacked": []}
        faults: list[str] = []
        for i in range(given.rounds):
            for kind in ("calm", "attacked"):
                with (
                    Caller(cluster.url, "honest") as asked,
                    Caller(cluster.url, "healthz") as health,
                    Caller(cluster.url, "abort") as abort,
                ):
                    if kind == "attacked":
                        command = [sys.executable, "-m", "tests.soak.pressure", "--attack", str(port)]
                        attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                        counts = json.loads(attacker.communicate()[0])
                        found["came_back"] = counts
                    else:
                        time.sleep(ROUND_S)
                took = asked.took_s
                honest[kind] += took
                faults += [*asked.faults, *health.faults, *abort.faults] if kind == "attacked" else []
                found[kind].append({"n": len(took), "median_s": median(took)})
                if kind == "attacked":
                    slowest["healthz"] = max([slowest["healthz"], *health.took_s])
                    slowest["abort"] = max([slowest["abort"], *abort.took_s])
                    found.setdefault("memory_mib_at_end_of_attack", memory(cluster))
                say(f"round {i} {kind}: {found[kind][-1]} {slowest} {faults[-3:]}")
                time.sleep(CALM_S if kind == "attacked" else 0)
        time.sleep(max(0.0, MEMORY_WITHIN_S - CALM_S))
        after = memory(cluster)
        if given.then:
            environment = {**os.environ, "SENTEI_ADMIN_TOKEN": TOKEN}
            done = subprocess.run(given.then, shell=True, env=environment, capture_output=True, text=True)
            found["then"] = (done.stdout + done.stderr).splitlines()
    # A round in which nobody got an answer has no median, and no ratio may pass over it.
    rounds = {kind: [item["median_s"] for item in found[kind]] for kind in ("calm", "attacked")}
    calm, attacked = (None if None in each else statistics.median(each) for each in rounds.values())
    return {
        **found,
        "honest": {kind: spread(took) for kind, took in honest.items()},
        "times_slower": round(attacked / calm, 2) if attacked is not None and calm is not None else None,
        "slowest_s": {name: round(value, 3) for name, value in slowest.items()},
        "faults": dict(Counter(faults)),
        "memory_mib": {"before": before, "a_minute_after": after},
    }


def median(took_s: list[float]) -> float | None:
    """The median; None of nothing."""
    return round(statistics.median(took_s), 4) if took_s else None


def spread(took_s: list[float]) -> dict[str, float]:
    """Median, and the 20th, 80th and 95th percentile; the count alone where there is nothing."""
    if not took_s:
        return {"n": 0}
    ranked = sorted(took_s)
    at = {f"p{p}_s": round(ranked[int(p / 100 * (len(ranked) - 1))], 4) for p in (20, 50, 80, 95)}
    return {"n": len(ranked), **at}


def main() -> None:
    """Measure, or attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--then", help="shell command to run while the app is still up, SENTEI_ADMIN_TOKEN set"
    )
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        print(json.dumps(asyncio.run(attack(given.attack, ROUND_S))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), given, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
