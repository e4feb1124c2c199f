"""The whole app on this machine, in a Ray of its own: `python -m sentei.serving.local --config FILE`.

Prints JSON lines `{"waiting": ...}` while it starts, which takes as long as a busy machine makes it take,
and then one line `{"url": ...}` when requests can be answered, or `{"error": ...}`. It ends, and leaves
nothing running, when standard input closes or on SIGTERM; as a `--service`, which has no standard input, on
SIGTERM alone. All else goes to stderr.
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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import yaml
from pydantic import Field, ValidationError

from sentei.serving.errors import ConfigError, StartError
from sentei.serving.front.bodies import LIMITS_VARIABLE
from sentei.serving.proxy import CALLBACK, CALLBACK_VARIABLE
from sentei.serving.settings import AppArgs
from sentei.serving.startup import StartUp, cause_of, missing

APP_NAME = "sentei"
READY_EVERY_S = 0.2
READY_FAILURES = 3  # looks in a row at which Serve says that the app failed, before we believe it
OBJECT_STORE_BYTES = 120 << 20  # requests and tokens are small; Ray's default is a third of the memory
# A request changes no thread within a process: up to a millisecond less to a first token than with Ray's
# defaults. Not RAY_SERVE_USE_GRPC_BY_DEFAULT, which takes off more: over gRPC a replica's exceptions come
# bare, and what breaks on the way as an error of gRPC's own (docs/measured/2026-11-28.md).
SHORT_WAYS = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
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
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    # Ray's own time-outs take a slow machine for a broken one: a proxy that needs 6 s to start is killed.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "600")
    # Ray runs its workers at niceness 15: any other work on the machine starves them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name, value in SHORT_WAYS.items():
        os.environ.setdefault(name, value)


@contextmanager
def running_app(options: LocalOptions, say: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """Run Ray and the app for the length of a `with` block; gives the app's address."""
    set_ray_environment()
    os.environ[LIMITS_VARIABLE] = options.limits.bodies.model_dump_json()
    import ray
    from ray import serve

    from sentei.serving.app import build

    port = _take_port(options.host, options.port)
    app = build(options.app_args())  # what is wrong with the settings is said before anything starts
    folder = tempfile.mkdtemp(prefix="sentei-ray-")
    start = StartUp(say)
    before = frozenset(psutil.Process().children(recursive=True))
    failures = (ray.exceptions.RayError, RuntimeError, TimeoutError, ConnectionError)
    try:
        # Of a node that is not up within 30 s Ray says so by a bare Exception.
        start.again("Ray", lambda: _start_ray(folder), catch=(Exception,), undo=partial(_end_ray, before))
        http = {"host": options.host, "port": port}
        # Where the proxy died, Serve's controller lives and starts another: a second call finds that one.
        start.again(
            "Serve's proxy",
            lambda: serve.start(proxy_location="HeadOnly", http_options=http),
            catch=failures,
        )
        with start.waiting_for(lambda: missing(_deployments())):
            _deploy(app)
            _wait_until_ready(f"http://{options.host}:{port}")
        yield f"http://{options.host}:{port}"
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start_ray(folder: str) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=RAY_CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        _temp_dir=folder,
    )


def _end_ray(before: Collection[psutil.Process]) -> None:
    """Put away what a failed start has left: Ray forgets the processes of a node that was not up in time.

    Only children that are not among those of `before` the start are ended: the others are the caller's own.
    """
    import ray

    ray.shutdown()
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _deploy(app: Any) -> None:
    """Deploy the app; raises StartError that says what its parts died of."""
    from ray import serve

    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except TimeoutError:
        return  # deployed, and its proxy is slow: whoever waits for the first answer sees it come
    except RuntimeError as error:
        raise StartError(f"the app failed: {cause_of(_deployments()) or error}") from error


def _deployments() -> dict[str, tuple[str, str]]:
    """Return each part's status and message; none while Serve does not know the app or does not answer."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        app = serve.status().applications.get(APP_NAME)
    except (RayError, RayServeException):
        return {}
    found = app.deployments if app is not None else {}
    return {name: (part.status.value, part.message) for name, part in found.items()}


def main() -> int:
    """Run until standard input closes, or a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m sentei.serving.local", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the app's arguments")
    parser.add_argument("--service", action="store_true", help="run until SIGTERM, whatever stdin does")
    asked = parser.parse_args()
    out = _take_stdout()
    try:
        options = read_options(asked.config)
        signal.signal(signal.SIGTERM, _leave)
        with running_app(options, lambda text: _say(out, {"waiting": text})) as url:
            _say(out, {"url": url})
            wait_for_end(is_service=asked.service)
    except (KeyboardInterrupt, SystemExit):
        return 0
    except Exception as error:  # the last resort of a program: say it in the way the caller reads
        _say(out, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def wait_for_end(*, is_service: bool) -> None:
    """Return when standard input closes; a service waits for a signal, whose handler raises."""
    while is_service:
        signal.pause()
    sys.stdin.read()


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


def _wait_until_ready(url: str) -> None:
    """Wait for the first answer of all variants; raises StartError when Serve gives the app up."""
    num_failed = 0
    while num_failed < READY_FAILURES:
        try:
            response = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
            if response.status_code == httpx.codes.OK and all(response.json()["variants"].values()):
                return
        except (httpx.HTTPError, ValueError):
            pass  # a proxy that is not up yet, or not ours yet
        has_failed = any(status == "DEPLOY_FAILED" for status, _ in _deployments().values())
        num_failed = num_failed + 1 if has_failed else 0
        time.sleep(READY_EVERY_S)
    raise StartError(f"the app failed: {cause_of(_deployments())}")


if __name__ == "__main__":
    sys.exit(main())
