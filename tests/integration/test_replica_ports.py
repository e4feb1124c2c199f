"""Replicas listen on ports of their own, on all interfaces: who lacks Ray's token can run nothing there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from sentei.pipeline.demo.local_server import LocalServer
from tests.integration.test_serving_ray import save_tiny_model

pytestmark = pytest.mark.timeout(600)  # Ray takes minutes to start on a busy machine
CALL_S = 20.0
CALL = "/ray.serve.ASGIService/HandleRequest"


class Intruder:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def request(mark: Path) -> bytes:
    """Serve's ASGIRequest, whose first field is bytes that a replica unpickles."""
    pickled = pickle.dumps(Intruder(mark))
    return bytes([0x0A, len(pickled) & 0x7F | 0x80, len(pickled) >> 7]) + pickled


def replica_ports() -> list[int]:
    """Where the replicas below this process listen."""
    return [
        found.laddr.port
        for process in psutil.Process().children(recursive=True)
        if any("ServeReplica" in word for word in process.cmdline())
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    ]


def test_a_replica_takes_no_call_without_the_token(tmp_path: Path) -> None:
    """What it would unpickle is refused, as Serve's replicas call each other over gRPC."""
    save_tiny_model(tmp_path / "tiny", tmp_path / "adapter")
    config = {
        "model": str(tmp_path / "tiny"),
        "store_url": f"sqlite:///{tmp_path / 'state.db'}",
        "mlflow_uri": "off",
        "controller": False,
    }
    environment = {"SENTEI_HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "token"}
    said = []
    with LocalServer(config, tmp_path / "server", environment=environment) as running:
        for port in replica_ports():
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(CALL)(request(tmp_path / "been here"), timeout=CALL_S)
                said.append(refused.value.code())
        process = running._process
    assert process is not None
    assert process.stdout is not None
    process.stdout.close()  # else its end of the pipe warns when it is collected

    assert said.count(grpc.StatusCode.UNAUTHENTICATED) >= 2  # dense and the ingress
    assert not (tmp_path / "been here").exists()
