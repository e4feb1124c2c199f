"""MLflow's artifacts in a bucket: a server that speaks S3, MLflow's as infra/ starts it, our tracker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from sentei.pipeline.tracking.tracker import MlflowTracker, RunSpec
from tests.infra.tools import INFRA
from tests.integration.test_surroundings import run_program
from tests.machine import free_port

LIMIT_S = 240.0
BUCKET, PREFIX = "sentei-mlflow", "artifacts"
KEY = {
    "AWS_ACCESS_KEY_ID": "of-the-server",
    "AWS_SECRET_ACCESS_KEY": "alone",
    "AWS_DEFAULT_REGION": "us-east-1",
}

pytestmark = [
    pytest.mark.timeout(LIMIT_S),
    pytest.mark.skipif(find_spec("moto") is None, reason="no S3 server here: pip install 'moto[s3]'"),
    pytest.mark.skipif(find_spec("boto3") is None, reason="no boto3 here: pip install 'sentei[s3]'"),
    # What boto3 and MLflow leave to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextmanager
def run_bucket(folder: Path) -> Iterator[str]:
    """An S3 server with one bucket; gives its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with run_program(command, folder, f"{url}/moto-api/data.json"):
        bucket_client(url).create_bucket(Bucket=BUCKET)
        yield url


def bucket_client(url: str) -> Any:
    """What an operator looks into the bucket with."""
    import boto3

    names = {name.lower(): value for name, value in KEY.items() if name != "AWS_DEFAULT_REGION"}
    return boto3.client("s3", endpoint_url=url, region_name=KEY["AWS_DEFAULT_REGION"], **names)


@contextmanager
def run_mlflow(service: dict[str, Any], bucket: str, folder: Path) -> Iterator[str]:
    """MLflow's server by the command that infra/ gives it, which alone holds the bucket's key."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [
        word.replace("0.0.0.0", "127.0.0.1")
        .replace("5000", str(port))
        .replace("postgresql+psycopg:///mlflow", f"sqlite:///{folder}/mlflow.db")
        .replace("$(MLFLOW_ARTIFACTS)", f"s3://{BUCKET}/{PREFIX}")
        for word in service["args"]
    ]
    environment = {**KEY, "MLFLOW_S3_ENDPOINT_URL": bucket, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words[0] = str(Path(sys.executable).parent / "mlflow")
    if not Path(words[0]).exists():  # an environment over another one has no scripts of that one
        words[:1] = [sys.executable, "-m", "mlflow"]
    with run_program(words, folder, f"{url}/health", environment):
        yield url


def test_artifacts_go_through_the_server_into_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our process holds no key and no folder: it writes through MLflow, and reads back what lies in S3."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3"))]:
        monkeypatch.delenv(name)
    text = (INFRA / "kuberay" / "mlflow" / "mlflow.yaml").read_text(encoding="utf-8")
    deployment, _ = yaml.safe_load_all(text)
    (service,) = deployment["spec"]["template"]["spec"]["containers"]
    page = tmp_path / "page.html"
    page.write_text("<p>why it was rolled back</p>", encoding="utf-8")
    with ExitStack() as stack:
        bucket = stack.enter_context(run_bucket(tmp_path))
        mlflow = stack.enter_context(run_mlflow(service, bucket, tmp_path))
        # As the controller makes it: home's folder is for a database of home's own.
        tracker = MlflowTracker(mlflow, tmp_path / "home" / "artifacts")
        run_id = tracker.ensure_run("sentei-rollouts", RunSpec("rollout:a", "a", 10.0))
        tracker.save_text(run_id, "promoted", "reports/outcome.txt")
        tracker.save_file(run_id, page, "reports")
        with tracker.answering() as client:
            location = client.get_run(run_id).info.artifact_uri
            read = Path(client.download_artifacts(run_id, "reports", str(tmp_path))).joinpath("outcome.txt")
            text = read.read_text(encoding="utf-8")
        found = bucket_client(bucket).list_objects_v2(Bucket=BUCKET)["Contents"]

    assert location.startswith("mlflow-artifacts:/")
    assert text == "promoted"
    assert sorted(item["Key"].rpartition("/")[2] for item in found) == ["outcome.txt", "page.html"]
    assert all(item["Key"].startswith(f"{PREFIX}/") and run_id in item["Key"] for item in found)
    assert not (tmp_path / "home").exists()
