"""The app with its neighbours of infra/: a real Postgres, MLflow server and Prometheus, on loopback.

One rollout is promoted and one, with a planted fault, is rolled back by its evidence; Prometheus scrapes both
by our configuration and rules, and brings the alert to a receiver.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.rollout.client import AdminClient
from tests.infra.tools import INFRA
from tests.integration.test_serving_ray import PROMPT, TOKEN, save_tiny_model
from tests.machine import free_port, wait_for
from tests.postgres_server import USER, PostgresServer, find_binary, run_postgres

LIMIT_S = 600.0  # 221 s where two other jobs ran beside it, most of them the starts of MLflow and the app
LOOK_TOKEN = "a-token-that-may-look"
POLICY = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: NAME}
spec:
  ladder: [{id: mild}]
  slices:
    buckets: [{id: short, range: [0, 64], pin: control}, {id: long, range: [64, 1024]}]
  assignment: {unit: session_id, salt: NAME}
  stages:
    - {id: half, share: 50%, rung: mild, hold_min: 1s}
    - {id: full, share: 95%, rung: mild, hold_min: 1s, bake: 1s}
  advance: {need: all_safe, min_units: 10}
  audit: {select: {fraction: 1.0}}
  guardrails:
    items:
      - {id: mass, value: audit.dropped_mass_mean, bound: {max: 30%}, test: betting, action: rollback}
  breaker:
    variant: {window: 30s, min_requests: 100, failure_share: 90%, no_replica_for: 120s}
  data:
    max_age: 5m
    no_data: {grace: 5m, after: 10m}
    monitor_lease: 10s
  schedule: {check_every: 1s}
"""

pytestmark = [
    pytest.mark.timeout(LIMIT_S),
    pytest.mark.skipif(
        find_binary("postgres") is None, reason="no Postgres here: apt-get install postgresql"
    ),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="none here: apt-get install prometheus"),
]


@dataclass
class Receiver:
    """What Prometheus takes for an Alertmanager: it keeps the alerts that are firing."""

    port: int = 0
    alerts: list[dict[str, Any]] = field(default_factory=list)

    def names(self) -> set[str]:
        """The alerts that have come."""
        return {alert["labels"]["alertname"] for alert in self.alerts}


@contextmanager
def run_receiver() -> Iterator[Receiver]:
    """Listen for alerts."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["content-length"]))
            receiver.alerts += json.loads(text)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()


@contextmanager
def run_program(
    command: list[str], folder: Path, url: str, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Run a server until the block ends; waits until its address answers."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, env={**os.environ, **(environment or {})}
        )
    try:
        wait_for(lambda: answers(url) or process.poll() is not None, f"{command[0]} answers")
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Whether a server says 200 there."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def run_mlflow(postgres: PostgresServer, folder: Path) -> Iterator[str]:
    """MLflow's server as compose.yaml starts it, on a database of its own; gives its address."""
    postgres.execute("CREATE DATABASE mlflow")
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text(encoding="utf-8"))
    service, port = compose["services"]["mlflow"], free_port()
    words = [
        word.replace("0.0.0.0", "127.0.0.1")
        .replace("5000", str(port))
        .replace("${MLFLOW_ARTIFACTS:-/mlflow/artifacts}", str(folder / "artifacts"))
        for word in service["command"]
    ]
    assert words.pop(0) == "mlflow"
    environment = {
        **libpq(postgres),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": service["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"],
    }
    url = f"http://127.0.0.1:{port}"
    with run_program(
        [str(Path(sys.executable).parent / "mlflow"), *words], folder, f"{url}/health", environment
    ):
        yield url


@contextmanager
def run_app(config: dict[str, Any], folder: Path, environment: dict[str, str]) -> Iterator[LocalServer]:
    """The app; its pipe is closed after its end, because a thread reads it until then."""
    with LocalServer(config, folder, environment=environment) as running:
        process = running._process
        yield running
    assert process is not None
    assert process.stdout is not None
    process.stdout.close()


@contextmanager
def run_prometheus(app_url: str, receiver: Receiver, folder: Path) -> Iterator[str]:
    """Prometheus by our configuration and rules, at a faster pace; gives its address."""
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    job["static_configs"] = [{"targets": [app_url.removeprefix("http://")]}]
    job["authorization"]["credentials_file"] = str(folder / "token")
    config["alerting"] = {
        "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{receiver.port}"]}]}]
    }
    (folder / "token").write_text(LOOK_TOKEN)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(INFRA / "prometheus" / "rules.yaml", folder)
    port = free_port()
    options = ["--storage.tsdb.path=samples", f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    command = ["prometheus", "--config.file=prometheus.yml", *options]
    with run_program(command, folder, f"{url}/-/ready"):
        yield url


def libpq(postgres: PostgresServer) -> dict[str, str]:
    """What the environment says of the database, as in infra/."""
    return {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": USER}


def query(prometheus: str, text: str) -> float:
    """The sum of a query's answer; 0 for none."""
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": text}, timeout=10, trust_env=False)
    return sum(float(item["value"][1]) for item in answer.raise_for_status().json()["data"]["result"])


def run_to_its_end(operator: AdminClient, url: str, name: str, **options: Any) -> str:
    """Start a rollout and send new sessions until it has an outcome, which is returned."""
    rollout_id = operator.start_rollout(POLICY.replace("NAME", name), **options)["rollout_id"]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    deadline_s = time.monotonic() + 100
    for i in range(2000):
        headers = {"x-session-id": f"{name}-{i}"}
        httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False)
        status = operator.rollout(rollout_id)
        if status["outcome"] is not None:
            return str(status["outcome"])
        assert time.monotonic() < deadline_s, status
    raise AssertionError("no outcome")


def test_two_rollouts_with_all_neighbours(tmp_path: Path) -> None:
    """Over Postgres and a remote MLflow one is promoted, one rolled back; the alert reaches its receiver."""
    save_tiny_model(tmp_path / "tiny", tmp_path / "adapter")
    with ExitStack() as stack:
        postgres = stack.enter_context(run_postgres())
        postgres.execute("CREATE DATABASE sentei")
        mlflow = stack.enter_context(run_mlflow(postgres, tmp_path))
        environment = {
            **libpq(postgres),
            "PGDATABASE": "sentei",
            "SENTEI_HOME": str(tmp_path / "home"),
            "SENTEI_ADMIN_TOKEN": TOKEN,
            "SENTEI_LOOK_TOKEN": LOOK_TOKEN,
            "RAY_AUTH_MODE": "disabled",
        }
        config = {
            "model": str(tmp_path / "tiny"),
            "adapter": str(tmp_path / "adapter"),
            "ingress_replicas": 2,
            "store_url": "postgresql+psycopg://",
            "mlflow_uri": mlflow,
            "tick_every_s": 0.5,
            "mirror_every_s": 1.0,
            "allow_faults": True,
        }
        server = stack.enter_context(run_app(config, tmp_path / "server", environment))
        receiver = stack.enter_context(run_receiver())
        prometheus = stack.enter_context(run_prometheus(server.url, receiver, tmp_path))
        operator = AdminClient(server.url, TOKEN)
        stack.callback(operator.close)

        promoted = run_to_its_end(operator, server.url, "healthy")
        wait_for(lambda: query(prometheus, 'sentei_rollout_phase{phase="promoted"}') == 1, "promoted is seen")
        num_seen = query(prometheus, "sum(sentei_requests_total)")
        num_alerts = len(receiver.names())
        operator.plant_fault({"kind": "pooled_keys_lost", "past_tokens": 64})
        rolled_back = run_to_its_end(operator, server.url, "faulty", replace=True)
        wait_for(lambda: "SenteiRolledBack" in receiver.names(), "the alert comes to its receiver")
        # Ingresses share their counts every few seconds.
        wait_for(
            lambda: query(prometheus, "sum(sentei_requests_total)") > num_seen, "newer requests are counted"
        )
        runs = mlflow_runs(mlflow)

        assert (promoted, rolled_back, num_alerts) == ("promoted", "rolled_back", 0)
        assert receiver.names() == {"SenteiRolledBack"}
        assert num_seen >= 20
        assert query(prometheus, "count(count by (process) (sentei_requests_total))") == 2
        assert query(prometheus, 'up{job="sentei"}') == query(prometheus, "sentei_store_up") == 1
        assert query(prometheus, "sum(resets(sentei_requests_total[5m]))") == 0
        assert query(prometheus, "sum(sentei_records_dropped_total)") == 0
        assert any("healthy" in run for run in runs)
        assert any("faulty" in run for run in runs)


def mlflow_runs(url: str) -> list[str]:
    """The names of all runs that MLflow knows."""
    with httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=30, trust_env=False) as client:
        found = client.post("/experiments/search", json={"max_results": 100}).raise_for_status().json()
        ids = [item["experiment_id"] for item in found["experiments"]]
        asked = {"experiment_ids": ids, "max_results": 1000}
        runs = client.post("/runs/search", json=asked).raise_for_status().json()["runs"]
    return [run["info"]["run_name"] for run in runs]
