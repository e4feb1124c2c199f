"""A silent fault at half share under load: how long until it is rolled back? Real app, pocket model.

    python -m tests.load_story --rate 1.2       # requests a second, however slow the answers
    python -m tests.load_story --overload 2     # that many times what the machine can serve

Sends an open stream of requests, each of a session of its own, plants a fault in the sparse variant once
sparse answers its half, and waits until the rollout is rolled back. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sentei.kernels.hf.adapter import save_adapter
from sentei.monitors.store import Store
from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.demo.traffic import MixOptions, Prompt, prompt_mix
from sentei.pipeline.models import resolve_model
from sentei.pipeline.rollout.client import AdminClient
from sentei.pipeline.text.corpus import load_corpus, split_documents
from tests.trial_ladders import exact_adapter

FAULT = {"kind": "pooled_keys_lost", "past_tokens": 1024}
MIX = MixOptions(prompt_tokens=(1280, 1536, 2048), answer_tokens=8, text_tokens=16)
WARM_S = 20.0
CAPACITY_S = 20.0
LIMIT_S = 180.0
POLICY = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: load}
spec:
  ladder: [{id: mild}]
  slices: {buckets: [{id: long, range: [512, 8192]}]}
  assignment: {unit: session_id, salt: load}
  stages:
    - {id: half, share: 50%, rung: mild, hold_min: 1h}
    - {id: full, share: 95%, rung: mild, hold_min: 1h}
  advance: {need: all_safe, min_units: 1000}
  audit: {select: {fraction: 1.0}}
  guardrails:
    alpha_total: 0.05
    detector_arl: 10000
    items:
      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.10, floor_cap: 0.10},
         test: betting_paired, action: rollback}
  breaker: {variant: {window: 30s, min_requests: 50, failure_share: 90%, no_replica_for: 120s}}
  data:
    max_age: 60s
    no_data: {grace: 10m, then: hold, after: 60m, finally: rollback}
    monitor_lease: 10s
  schedule: {check_every: 1s}
"""


@dataclass
class Stream:
    """Requests at a steady rate in a thread of its own; counts what became of them."""

    url: str
    rate: float
    prompts: Iterator[Prompt]
    is_over: threading.Event = field(default_factory=threading.Event)
    answered: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    newest: str = ""  # who gave the newest answer

    def __enter__(self) -> Stream:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send_all()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._thread.join(60)

    async def _send_all(self) -> None:
        many = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False, limits=many) as client:
            tasks, next_s = set[asyncio.Task[None]](), time.monotonic()
            while not self.is_over.is_set():
                prompt = await asyncio.to_thread(next, self.prompts)
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                next_s += 1.0 / self.rate
                task = asyncio.create_task(self._send(client, prompt))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, client: httpx.AsyncClient, prompt: Prompt) -> None:
        body = {"model": "pocket", "prompt": prompt.text, "max_tokens": prompt.max_tokens, "temperature": 0}
        response = await client.post(
            "/v1/completions", json=body, headers={"x-session-id": prompt.session_id}
        )
        if response.status_code != httpx.codes.OK:
            self.refused += 1
            return
        variant = response.headers["x-sentei-variant"]
        self.newest = variant
        self.answered[variant] = self.answered.get(variant, 0) + 1


def measure_capacity(url: str, prompts: Iterator[Prompt]) -> float:
    """Answers a second when there is always one more request waiting, audits included."""
    with Stream(url, 20.0, prompts) as stream:
        time.sleep(CAPACITY_S / 2)
        before = sum(stream.answered.values())
        time.sleep(CAPACITY_S)
        after = sum(stream.answered.values())
    return (after - before) / CAPACITY_S


def run(folder: Path, *, rate: float | None, overload: float) -> dict[str, Any]:
    """Tell the story once."""
    loaded = resolve_model("pocket")
    save_adapter(exact_adapter(loaded.model, {"mild": 1e-3}), folder / "adapter")
    token = secrets.token_urlsafe(24)
    config = {
        "model": "pocket",
        "adapter": str(folder / "adapter"),
        "attention": "best",
        "store_url": f"sqlite:///{folder / 'state.db'}",
        "mlflow_uri": "off",
        "allow_faults": True,
    }
    environment = {
        "SENTEI_HOME": str(folder / "home"),
        "SENTEI_ADMIN_TOKEN": token,
        "RAY_AUTH_MODE": "disabled",
    }
    _, documents = split_documents(load_corpus())
    prompts = prompt_mix(loaded.tokenizer, documents, options=MIX, seed=1, prefix=secrets.token_hex(4))
    with LocalServer(config, folder / "server", environment=environment) as server:
        admin = AdminClient(server.url, token)
        rollout_id = admin.start_rollout(POLICY)["rollout_id"]
        capacity = measure_capacity(server.url, prompts) if rate is None else None
        rate = rate if capacity is None else overload * capacity
        assert rate is not None
        with Stream(server.url, rate, prompts) as stream:
            time.sleep(WARM_S)
            healthy = admin.rollout(rollout_id)
            admin.plant_fault(FAULT)
            planted_s = time.monotonic()
            while (found := admin.rollout(rollout_id))["outcome"] is None and _since(planted_s) < LIMIT_S:
                time.sleep(0.25)
            caught_s = _since(planted_s)
        admin.close()
    with Store.open(str(config["store_url"])) as store:
        audits, requests = store.read_audits(rollout_id), store.read_requests(rollout_id)
    reasons = [row["reason"] or row["status"] for row in audits if row["status"] != "scored"]
    return {
        "rate_per_s": round(rate, 2),
        "capacity_per_s": None if capacity is None else round(capacity, 2),
        "healthy_before": healthy["outcome"] is None,
        "outcome": found["outcome"],
        "caught_s": round(caught_s, 1),
        "reason": found["reason"],
        "answered": stream.answered,
        "refused": stream.refused,
        "ttft_ms_median": statistics.median(r["ttft_ms"] for r in requests if r["ttft_ms"] is not None),
        "audits_scored": sum(row["status"] == "scored" for row in audits),
        "audits_not_scored": {reason: reasons.count(reason) for reason in set(reasons)},
        "requests_drawn_pct": round(100 * sum(bool(r["chosen_for_audit"]) for r in requests) / len(requests)),
    }


def _since(at_s: float) -> float:
    return time.monotonic() - at_s


def main() -> None:
    """Run the story in a folder of its own and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument(
        "--overload", type=float, default=2.0, help="without --rate: times what can be served"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), rate=options.rate, overload=options.overload), indent=1))


if __name__ == "__main__":
    main()
