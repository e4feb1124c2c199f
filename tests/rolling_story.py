"""A rolling update of the whole app under way: which ingresses ran when, and whether anybody was refused.

Run as `python -m tests.rolling_story CONFIG.yaml`; prints one JSON document. The app is deployed a second
time with another setting, as `ray serve deploy` does after an edit, while short requests go on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from sentei.serving.app import build
from sentei.serving.local import _deploy, read_options, running_app
from tests.soak.cluster import TITLES

LOOK_S = 0.1


class Watcher:
    """Looks at the ingresses' processes, and asks each time for a short answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._ask)]
        self.pids: list[tuple[float, list[int]]] = []
        self.models: set[str] = set()  # what GET /v1/models said: the same, whoever was asked
        self.refused: list[str] = []
        self.answered = 0

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)

    def _look(self) -> None:
        root = psutil.Process(os.getpid())
        while not self._is_over.wait(LOOK_S):
            found = []
            for process in root.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "".join(process.cmdline()[:1]).startswith(TITLES["ingress"]):
                        found.append(process.pid)
            self.pids.append((time.monotonic(), sorted(found)))

    def _ask(self) -> None:
        body = {"model": "tiny", "prompt": "def main", "max_tokens": 4}
        while not self._is_over.wait(LOOK_S):
            with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as client:
                try:
                    self.models.add(client.get("/v1/models").text)
                    response = client.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    self.refused.append(type(error).__name__)
                    continue
            self.answered += response.status_code == httpx.codes.OK
            if response.status_code != httpx.codes.OK:
                self.refused.append(f"{response.status_code} {response.text[:100]}")


def run(config: Path) -> dict[str, Any]:
    """Deploy twice; returns what was seen during the second time."""
    options = read_options(config)
    with running_app(options) as url, Watcher(url) as watcher:
        time.sleep(2)
        before = watcher.pids[-1][1]
        again = options.model_copy(update={"drift_every_s": options.drift_every_s + 1})
        _deploy(build(again.app_args()))
        end_s = time.monotonic() + 120
        while set(before) & set(watcher.pids[-1][1]) and time.monotonic() < end_s:
            time.sleep(LOOK_S)
        time.sleep(2)
    old_gone_s = next(at_s for at_s, pids in watcher.pids if not set(before) & set(pids))
    first_gone_s = next((at_s for at_s, pids in watcher.pids if not set(before) <= set(pids)), old_gone_s)
    first_new_s = next(at_s for at_s, pids in watcher.pids if set(pids) - set(before))
    return {
        "before": before,
        "after": watcher.pids[-1][1],
        "new_before_old_ended_s": round(first_gone_s - first_new_s, 1),
        "fewest": min(len(pids) for _, pids in watcher.pids),
        "models": len(watcher.models),
        "answered": watcher.answered,
        "refused": watcher.refused,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
