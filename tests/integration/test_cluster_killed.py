"""The whole cluster killed at once, and a sparse replica in the middle of a stream: what is lost of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.serving.ingress.router import position
from tests.integration.test_serving_ray import save_tiny_model
from tests.machine import wait_for
from tests.soak.cluster import TITLES, Cluster, kill
from tests.soak.streams import Answer, ask

NUM_TOKENS = 500
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
      - {{id: errors, value: serve.failed, bound: {{max: 10%}}, test: beta_binomial, per: all,
          action: rollback, advance: no_harm}}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the app keeps what it has."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """The app with a tiny model and two ingresses, on a store that outlives it."""
    save_tiny_model(folder / "tiny", folder / "adapter")
    config = {
        "model": str(folder / "tiny"),
        "adapter": str(folder / "adapter"),
        # In bf16 two tokens of a random model tie every few dozen, and one pass over what was sent breaks
        # such a tie otherwise than the steps did.
        "dtype": "float32",
        "store_url": store_url(folder),
        "mlflow_uri": "off",
        "tick_every_s": 0.5,
        "ingress_replicas": 2,
    }
    with Cluster(config, folder) as running:
        yield running


def store_url(folder: Path) -> str:
    """The app's store, which a test may read too."""
    return f"sqlite:///{folder / 'state.db'}"


def stream(cluster: Cluster, strike: Callable[[], None] | None = None, **fields: Any) -> Answer:
    """One greedy stream of a session of the share; after its tenth token `strike` is called."""
    has_struck = False

    def seen(answer: Answer) -> None:
        nonlocal has_struck
        if strike is not None and len(answer.tokens) >= 10 and not has_struck:
            has_struck = True
            strike()

    async def get() -> Answer:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False) as client:
            session = next(s for s in map(str, range(1000)) if position(s, SALT) < 0.5)
            return await ask(client, Answer(session, PROMPT, NUM_TOKENS), seen=seen, **fields)

    return asyncio.run(get())


def start(cluster: Cluster, text: str) -> str:
    """Start a rollout after what ran before, and wait until sparse answers."""
    for found in cluster.admin.rollouts():
        if found["outcome"] is None:
            cluster.admin.command(found["rollout_id"], "abort")
    wait_for(lambda: all(r["outcome"] for r in cluster.admin.rollouts()), "what ran before ends")
    rollout_id = str(cluster.admin.start_rollout(text, release_quarantine=True)["rollout_id"])
    wait_for(lambda: stream(cluster).makers[:1] == ["sparse/mild"], "sparse answers its share")
    return rollout_id


@pytest.mark.timeout(600)
def test_replicas_have_the_priority_of_their_program(cluster: Cluster) -> None:
    """Ray would run them at niceness 15: a single busy process beside the app would take all the time."""
    program = cluster.processes()[0].nice()
    replicas = [psutil.Process(pid).nice() for part in TITLES for pid in cluster.pids(part)]

    assert replicas == [program] * 7


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["sparse", "ingress"])
def test_killed_in_mid_stream_the_answer_goes_on_with_the_same_tokens(cluster: Cluster, part: str) -> None:
    """What a stream passes through is killed under it: the client gets an undisturbed run's tokens."""
    start(cluster, POLICY.replace("hold_min: 15s", "hold_min: 1h"))
    undisturbed = stream(cluster)
    pids = cluster.pids(part)

    def strike() -> None:
        for pid in pids:
            kill(pid)

    found = stream(cluster, strike)

    assert (undisturbed.fault, found.fault) == ("", "")
    assert undisturbed.makers == ["sparse/mild"] * NUM_TOKENS
    assert found.tokens == undisturbed.tokens
    assert found.text == undisturbed.text
    assert found.makers[0] == "sparse/mild"
    # A new ingress trusts no table before it has seen the lease renewed, so dense goes on.
    ends = {"sparse": {"dense/dense"}, "ingress": {"dense/dense", "sparse/mild"}}
    assert found.makers[-1] in ends[part]
    assert not set(pids) & set(cluster.pids(part)), "it was killed"
    wait_for(lambda: len(cluster.pids(part)) == len(pids), f"{part} is back", timeout_s=120)


class Traffic:
    """Short requests, a few a second, half of them of sessions that were here before."""

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
def test_rollout_goes_on_after_the_whole_cluster_was_killed(cluster: Cluster, folder: Path) -> None:
    """Everything killed in mid-rollout: back within two minutes, at its stage, and on to its end."""
    rollout_id = start(cluster, POLICY)
    with Traffic(cluster.url) as traffic:
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
    with Store.open(store_url(folder)) as store:
        length = EventLog(store).verify()
    print(f"killed {num_killed} processes; sparse back after {back_s:.1f} s; {length} events")
    assert (before["stage_id"], before["outcome"], after["outcome"]) == ("half", None, None)
    assert back_s < 120
    assert (found["outcome"], found["stage_id"]) == ("promoted", "full")
