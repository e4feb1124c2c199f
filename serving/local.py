"""The whole app on this machine, in a Ray of its own: `python -m sentei.serving.local --config FILE`.

Prints one JSON line `{"url": ...}` when requests can be answered. It ends, and leaves
nothing running, when standard input closes or on SIGTERM. All else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import yaml
from pydantic import Field, ValidationError

from sentei.serving.errors import ConfigError
from sentei.serving.settings import AppArgs

APP_NAME = "sentei"
READY_TIMEOUT_S = {"builtin": 220.0, "vllm": 900.0}  # vLLM loads itself and compiles, once per variant
OBJECT_STORE_BYTES = 120 << 20  # requests and tokens are small; Ray's default is a third of the memory
RAY_CPUS = 4  # logical: the fractions of all replicas fit also where the machine has fewer cores


class LocalOptions(AppArgs):
    """The app's arguments and where it listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0: any free port")

    def app_args(self) -> AppArgs:
        """Return the app's arguments alone."""
        return AppArgs.model_validate(self.model_dump(exclude={"host", "port"}))


def read_options(path: Path) -> LocalOptions:
    """Read a YAML file; raises ConfigError that names the option."""
    try:
        options = LocalOptions.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return options.at(path.resolve().parent, Path.cwd())


def set_ray_environment() -> None:
    """Choose for Ray: no usage report, and a token, because it listens on all interfaces."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")


@contextmanager
def running_app(options: LocalOptions) -> Iterator[str]:
    """Run Ray and the app for the length of a `with` block; gives the app's address."""
    set_ray_environment()
    import ray
    from ray import serve

    from sentei.serving.app import build

    port = _take_port(options.host, options.port)
    folder = tempfile.mkdtemp(prefix="sentei-ray-")
    try:
        ray.init(
            address="local",
            num_cpus=RAY_CPUS,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            _temp_dir=folder,
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port})
        serve.run(build(options.app_args()), name=APP_NAME, route_prefix="/")
        url = f"http://{options.host}:{port}"
        _wait_until_ready(url, READY_TIMEOUT_S[options.engine])
        yield url
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run until standard input closes."""
    parser = argparse.ArgumentParser(prog="python -m sentei.serving.local", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the app's arguments")
    out = _take_stdout()
    try:
        options = read_options(parser.parse_args().config)
        signal.signal(signal.SIGTERM, _leave)
        with running_app(options) as url:
            _say(out, {"url": url})
            sys.stdin.read()
    except (KeyboardInterrupt, SystemExit):
        return 0
    except Exception as error:  # the last resort of a program: say it in the way the caller reads
        _say(out, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _take_stdout() -> IO[str]:
    """Keep standard output for our lines alone; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _say(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _leave(_signal: int, _frame: Any) -> None:
    raise SystemExit(0)


def _take_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0; raises ConfigError where somebody listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened on ({error.strerror}); free it, or set another host or "
                "port (0: any free one)"
            ) from error
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    last = ""
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
            last = response.text
            if response.status_code == httpx.codes.OK and all(response.json()["variants"].values()):
                return
        except httpx.HTTPError as error:
            last = str(error)
        time.sleep(0.2)
    raise ConfigError(f"the app at {url} is not ready after {timeout_s:g} s: {last[:300]}")


if __name__ == "__main__":
    sys.exit(main())
