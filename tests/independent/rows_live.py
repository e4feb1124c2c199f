"""B10 and B13: the app itself in processes of its own, with clients that only look from outside."""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx

from tests.independent.counting import Count, Progress, Row

REPEATS = 5
LOOK_S = 3.0  # after an order: whoever is sent to sparse then is seen
EVERY_S = 0.05
LIMIT_S = 1.0
READY_S = 120.0
POLICY = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: abort}
spec:
  ladder: [{id: mild}]
  slices: {buckets: [{id: long, range: [0, 8192]}]}
  assignment: {salt: abort}
  stages:
    - {id: most, share: 90%, rung: mild, hold_min: 1h}
    - {id: full, share: 95%, rung: mild, hold_min: 1h}
  advance: {need: all_safe, min_units: 1000}
  audit: {select: {fraction: 1%}}
  guardrails:
    items:
      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.5, floor_cap: 0.1},
         test: betting_paired, action: rollback}
  breaker: {variant: {window: 30s, min_requests: 100, failure_share: 90%, no_replica_for: 120s}}
  data: {max_age: 10m, no_data: {grace: 10m, then: hold, after: 60m, finally: rollback}, monitor_lease: 120s}
  schedule: {check_every: 1s}
"""


def rows() -> tuple[Row, ...]:
    """All that only the running app can show."""
    at_rate, overload = {"rate": 1.2, "overload": 0.0}, {"rate": None, "overload": 2.0}
    found = [
        Row(
            "B10",
            "a fault at half of the traffic, 1.2 requests a second: not caught within 30 s",
            "within 30 s",
            partial(_fault, 30.0, at_rate),
            3,
            is_live=True,
            key="rate",
        ),
        Row(
            "B10",
            "a fault at half of the traffic, twice what the machine serves: not caught within 60 s",
            "within 60 s",
            partial(_fault, 60.0, overload),
            3,
            is_live=True,
            key="overload",
        ),
    ]
    for state in ("alive", "dead", "stopped"):
        about = (
            f"abort, two ingresses, controller {state}: a request sent later than 1 s after it went to sparse"
        )
        found.append(
            Row("B13", about, "within 1 s", partial(_aborts, state), REPEATS, is_live=True, key=state)
        )
    return tuple(found)


def _fault(limit_s: float, traffic: dict[str, Any], trials: int, progress: Progress) -> Count:
    story = import_module("tests.load_story")
    times: list[float] = []
    for number in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            found = story.run(Path(folder), **traffic)
        is_caught = found["healthy_before"] and found["outcome"] == "rolled_back"
        times.append(found["caught_s"] if is_caught else float("inf"))
        progress(number + 1, trials)
    return Count(sum(took > limit_s for took in times), trials, _seconds(times))


def _seconds(times: list[float]) -> str:
    return f"{', '.join(f'{took:.1f}' for took in sorted(times))} s"


class Probes:
    """Requests of new sessions on connections of their own, twenty a second; who answered those sent when."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._tag = secrets.token_hex(4)
        self.seen: list[tuple[float, str]] = []

    def __enter__(self) -> Probes:
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(30)

    def sparse_after(self, at_s: float) -> list[float]:
        """How long after that moment requests were sent that sparse answered."""
        return [sent_s - at_s for sent_s, who in list(self.seen) if who == "sparse" and sent_s >= at_s]

    def _send_all(self) -> None:
        threads, number = [], 0
        while not self._is_over.wait(EVERY_S):
            number += 1
            thread = threading.Thread(target=self._send, args=(number,), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(30)

    def _send(self, number: int) -> None:
        body = {"model": "pocket", "prompt": "def add(a, b):", "max_tokens": 1, "temperature": 0}
        headers = {"x-session-id": f"{self._tag}-{number}", "connection": "close"}
        sent_s = time.monotonic()
        with suppress(httpx.HTTPError):
            answer = httpx.post(
                f"{self._url}/v1/completions", json=body, headers=headers, timeout=30, trust_env=False
            )
            self.seen.append((sent_s, answer.headers.get("x-sentei-variant", "")))


def _wait(is_there: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + READY_S
    while not is_there():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what} did not come within {READY_S:g} s")
        time.sleep(0.25)


def _aborts(state: str, trials: int, progress: Progress) -> Count:
    """Abort so many rollouts of one app, and look when the last request went to sparse."""
    adapters, models = import_module("sentei.kernels.hf.adapter"), import_module("sentei.pipeline.models")
    servers = import_module("sentei.pipeline.demo.local_server")
    client = import_module("sentei.pipeline.rollout.client")
    ladders = import_module("tests.trial_ladders")
    late, lasts = 0, list[float]()
    with tempfile.TemporaryDirectory() as parent:
        folder, token = Path(parent), secrets.token_urlsafe(24)
        model = models.resolve_model("pocket").model
        adapters.save_adapter(ladders.exact_adapter(model, {"mild": 1e-3}), folder / "adapter")
        config = {
            "model": "pocket",
            "adapter": str(folder / "adapter"),
            "store_url": f"sqlite:///{folder / 'state.db'}",
            "mlflow_uri": "off",
            "ingress_replicas": 2,
            "tick_every_s": 0.5,
        }
        environment = {
            "SENTEI_HOME": str(folder / "home"),
            "SENTEI_ADMIN_TOKEN": token,
            "RAY_AUTH_MODE": "disabled",
        }
        with servers.LocalServer(config, folder / "server", environment=environment) as server:
            admin = client.AdminClient(server.url, token)
            for number in range(trials):
                last_s = _abort_once(server.url, admin, token, state)
                lasts.append(last_s)
                late += last_s > LIMIT_S
                progress(number + 1, trials)
            admin.close()
    return Count(
        late,
        trials,
        f"last request to sparse after {statistics.median(lasts):.2f} s, {max(lasts):.2f} s at most",
    )


def _abort_once(url: str, admin: Any, token: str, state: str) -> float:
    rollout_id = admin.start_rollout(POLICY, release_quarantine=True)["rollout_id"]
    with Probes(url) as probes:
        _wait(lambda: len([who for _, who in probes.seen[-40:] if who == "sparse"]) > 20, "sparse")
        headers = {"authorization": f"Bearer {token}"}
        status = httpx.get(f"{url}/admin/v1/status", headers=headers, timeout=30, trust_env=False).json()
        pid = status["workers"]["controller"]["pid"]
        if state != "alive":
            os.kill(pid, signal.SIGSTOP if state == "stopped" else signal.SIGKILL)
        try:
            at_s = time.monotonic()
            admin.command(rollout_id, "abort", reason="drill")
            time.sleep(LOOK_S)
        finally:
            if state == "stopped":
                os.kill(pid, signal.SIGCONT)
    found = probes.sparse_after(at_s)
    _wait(lambda: all(item["outcome"] for item in admin.rollouts()), "the end in the log")
    return max(found, default=0.0)
