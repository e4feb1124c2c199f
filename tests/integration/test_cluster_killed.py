"""The whole cluster killed at once, and a sparse replica in the middle of a stream: what is lost of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.serving.router import position
from tests.integration.test_serving_ray import save_tiny_model
from tests.soak.cluster import Cluster, kill, wait_for
from tests.soak.streams import Answer, ask

PROMPT = "def add(a, b): return a + b\n" * 12
SALT = "killed"
POLICY = f"""
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {{name: killed}}
spec:
  ladder: [{{id: mild}}]
  slices: {{buckets: [{{id: all, range: [0, 1024]}}]}}
  assignment: {{unit: session_id, salt: {SALT}}}
  stages:
    - {{id: half, share: 50%, rung: mild, hold_min: 15s, need: no_harm}}
    - {{id: full, share: 95%, rung: mild, hold_min: 2s, bake: 3s}}
  advance: {{need: all_safe, min_units: 30}}
  audit: {{select: {{fraction: 1.0}}}}
  guardrails:
    alpha_total: 0.05
    detector_arl: 10000
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: 0.3, floor_cap: 0.1}},
          test: betting_paired, action: rollback}}
      - {{id: quality, value: audit.kl, bound: {{excess_over_floor: 0.3, floor_cap: 0.2}},
          test: betting_paired, action: rollback}}
      - {{id: errors, value: serve.failed, bound: {{max: 10%}}, test: beta_binomial, per: all, action: rollback,
          advance: no_harm}}
      - {{id: ttft, value: serve.ttft_ms, bound: {{over: 20s, max: 10%}}, test: beta_binomial, per: slice,
          action: rollback, advance: no_harm}}
      - {{id: srm, value: assignment, test: split_ramp, per: slice, alpha: 0.001, action: freeze}}
  breaker: {{variant: {{window: 30s, min_requests: 100, failure_share: 90%, no_replica_for: 120s}}}}
  data:
    max_age: 60s
    no_data: {{grace: 60s, then: hold, after: 10m, finally: rollback}}
    monitor_lease: 3s
  schedule: {{check_every: 1s}}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The app with a tiny model and two ingresses, on a store that outlives it."""
    save_tiny_model(tmp_path / "tiny", tmp_path / "adapter")
    config = {
        "model": str(tmp_path / "tiny"),
        "adapter": str(tmp_path / "adapter"),
        "store_url": store_url(tmp_path),
        "mlflow_uri": "off",
        "tick_every_s": 0.5,
        "ingress_replicas": 2,
    }
    with Cluster(config, tmp_path) as running:
        yield running


def store_url(folder: Path) -> str:
    """The app's store, which a test may read too."""
    return f"sqlite:///{folder / 'state.db'}"


class Traffic:
    """Short requests, a few a second, half of them of sessions that were here before; whatever becomes of them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.variants: list[str] = []  # who answered, in order

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _send(self) -> None:
        i = 0
        with httpx.Client(base_url=self._url, timeout=10, trust_env=False) as client:
            while not self._is_over.wait(0.1):
                i += 1
                body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
                try:
                    response = client.post(
                        "/v1/completions", json=body, headers={"x-session-id": f"s{i // 2 * (1 + i % 2)}"}
                    )
                except httpx.HTTPError:
                    continue
                self.variants.append(response.headers.get("x-sentei-variant", "none"))


@pytest.mark.timeout(600)
def test_rollout_goes_on_after_the_whole_cluster_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    """Everything killed in mid-rollout: back within two minutes, at its stage, and on to its end."""
    rollout_id = cluster.admin.start_rollout(POLICY)["rollout_id"]
    with Traffic(cluster.url) as traffic:
        wait_for(lambda: traffic.variants[-1:] == ["sparse"], "sparse answers its share")
        time.sleep(5)
        before = cluster.admin.rollout(rollout_id)
        num_killed = cluster.kill_everything()
        began_s = time.monotonic()
        traffic.variants.clear()

        cluster.start()
        wait_for(lambda: "sparse" in traffic.variants, "sparse answers again")
        back_s = time.monotonic() - began_s
        after = cluster.admin.rollout(rollout_id)
        wait_for(lambda: cluster.admin.rollout(rollout_id)["outcome"] is not None, "it ends", timeout_s=180)

    found = cluster.admin.rollout(rollout_id)
    with Store.open(store_url(tmp_path)) as store:
        length = EventLog(store).verify()
    print(f"killed {num_killed} processes; sparse back after {back_s:.1f} s; {length} events")
    assert (before["stage_id"], before["outcome"], after["outcome"]) == ("half", None, None)
    assert back_s < 120
    assert (found["outcome"], found["stage_id"]) == ("promoted", "full")
