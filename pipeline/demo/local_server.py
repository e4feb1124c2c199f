"""The app in a process group of its own: started, waited for, and surely ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import yaml

from sentei.errors import SenteiError

READY_TIMEOUT_S = 1800.0  # a busy machine may take long; the app itself ends when it cannot start
STOP_TIMEOUT_S = 40.0
MODULE = "sentei.serving.local"  # run as a program: nobody imports serving


class ServerError(SenteiError):
    """The app did not come up, or went away; the message names the log to read."""

    is_absent = True


class LocalServer:
    """`python -m sentei.serving.local` as a context manager; its end of standard input is the leash."""

    def __init__(self, config: dict[str, Any], folder: Path, *, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "server.log"
        self._config_path = folder / "serve.yaml"
        self._config_path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        self._environment = {**os.environ, **environment}
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> LocalServer:
        log = self.log_path.open("w", encoding="utf-8")
        command = [sys.executable, "-m", MODULE, "--config", str(self._config_path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches us alone; we end the group in order
        )
        log.close()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The app's process, while it runs."""
        assert self._process is not None, "the app does not run"
        return self._process.pid

    def stop(self) -> None:
        """Let the app end by itself; end its whole process group if it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(process)

    def _read(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                try:
                    decoded = json.loads(line)
                except ValueError:
                    continue
                if isinstance(decoded, dict):
                    self._answers.put(decoded)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + READY_TIMEOUT_S
        last = "its first word"
        while time.monotonic() < deadline:
            try:
                answer = self._answers.get(timeout=0.2)
            except queue.Empty:
                if self._process is None or self._process.poll() is not None:
                    raise ServerError(f"the app ended before it answered: {self._log_tail()}") from None
                continue
            if "error" in answer:
                raise ServerError(f"the app refused: {answer['error']}")
            if "url" in answer:
                return str(answer["url"])
            last = str(answer.get("waiting", last))
        raise ServerError(
            f"no address from the app within {READY_TIMEOUT_S:.0f} s; last: {last}; {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"read {self.log_path}; it ends with: " + " | ".join(lines[-4:])


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process group; nothing left is the normal case."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
