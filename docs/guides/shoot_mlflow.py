"""Take the two pictures of docs/guides/mlflow.md from a home that `sentei demo` has filled.

python docs/guides/shoot_mlflow.py HOME [--into docs/guides]

Needs Chromium (Debian: apt-get install chromium) and Pillow. It starts an MLflow server of its own on a free
port, over the home's database, and ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import urllib.parse
from pathlib import Path

from mlflow import MlflowClient
from pictures import free_port, take, wait  # beside this file

WIDTH, PANEL = 1640, 424  # of the window, and of MLflow's assistant at its right, which is cut off
SETTLE_MS = 20_000  # of the browser's own clock, until the plot stands


def main() -> None:
    """Find the runs, open their comparison, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    uri = f"sqlite:///{(arguments.home / 'mlflow.db').resolve()}"
    client = MlflowClient(uri)
    port = free_port()
    command = ["mlflow", "server", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    server = subprocess.Popen(command, env={**os.environ, **quiet}, start_new_session=True)
    try:
        wait(f"http://127.0.0.1:{port}/health")
        shoot(port, newest_rungs(client), arguments.into / "mlflow-rungs.png", height=1640)
        shoot(port, newest_rollouts(client), arguments.into / "mlflow-rollouts.png", height=1700)
    finally:
        os.killpg(server.pid, signal.SIGTERM)


def newest_rungs(client: MlflowClient) -> tuple[str, list[str]]:
    """The experiment, and dense and every rung of its newest evaluation."""
    experiment = client.get_experiment_by_name("sentei-evaluate").experiment_id
    parts = client.search_runs([experiment], filter_string="tags.`sentei.kind` = 'evaluate-part'")
    parent = parts[0].data.tags["mlflow.parentRunId"]
    own = [run for run in parts if run.data.tags["mlflow.parentRunId"] == parent]
    return experiment, [run.info.run_id for run in sorted(own, key=lambda run: -density(run))]


def density(run: object) -> float:
    """What a rung kept: dense first, then mild to bold."""
    return float(run.data.metrics["resources/attention_density"])  # type: ignore[attr-defined]


def newest_rollouts(client: MlflowClient) -> tuple[str, list[str]]:
    """The experiment, and its two newest rollouts, the older one first."""
    experiment = client.get_experiment_by_name("sentei-rollouts").experiment_id
    found = client.search_runs([experiment], filter_string="tags.`sentei.kind` = 'rollout'", max_results=2)
    return experiment, [run.info.run_id for run in reversed(found)]


def shoot(port: int, runs: tuple[str, list[str]], path: Path, *, height: int) -> None:
    """Take one picture: at most 200 KB, in 256 colours."""
    asked = {"runs": json.dumps(runs[1]), "experiments": json.dumps([runs[0]])}
    query = urllib.parse.urlencode(asked, quote_via=urllib.parse.quote)
    address = f"http://127.0.0.1:{port}/#/compare-runs?{query}"
    crop = (0, 0, WIDTH - PANEL, height)
    take(address, path, size=(WIDTH, height), crop=crop, settle_ms=SETTLE_MS, colours=256)


if __name__ == "__main__":
    main()
