"""The command: rows one by one in a process of their own, so that a hang or a lost device costs one row.

The parent imports no torch. It hands a row to the worker, waits as long as the row may take, and starts
another worker where one dies, hangs or says that its device is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .plan import FULL, TINY, TOTAL_S, Row, choose, plan

START_LIMIT_S = 90.0  # importing torch and opening the device
EXIT_WRONG, EXIT_ABSENT = 1, 3
HEADER = (
    "| row | state | what | ms | 20..80% | times | of | share of peak | extra MiB | note |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
Result = dict[str, Any]


class WorkerLostError(Exception):
    """The worker ended or was stopped; the message says why."""


def main(root: Path) -> int:
    """Run the rows that the command line names; see `run_rows`."""
    options = _parse(root)
    chosen = choose(plan(TINY if options.tiny else FULL), options.rows)
    if options.list:
        print("\n".join(row.id for row in chosen))
        return 0
    return run_rows(root, chosen, options)


def run_rows(root: Path, rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Run the rows, write the report; 1 where an answer was wrong, 3 where there is nothing to run on."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    run = _Run(root, options, started)
    try:
        about = run.start()
    except WorkerLostError as error:
        print(f"nothing was run: {error}; see {options.out / 'worker.log'}", file=sys.stderr)
        return EXIT_ABSENT
    for row in rows:
        run.take(row)
    run.stop()
    about |= {"seed": options.seed, "commit": _commit(root), "seconds": time.monotonic() - started}
    print("\n" + write_report(options.out, about, run.results))
    wrong = [result["id"] for result in run.results if result["is_answer"] and result["status"] == "failed"]
    if wrong:
        print(f"\nwrong answers: {', '.join(wrong)}", file=sys.stderr)
    return EXIT_WRONG if wrong else 0


class _Run:
    """The worker of the moment, and what all workers said so far."""

    def __init__(self, root: Path, options: argparse.Namespace, started: float) -> None:
        self.results: list[Result] = []
        self._root = root
        self._options = options
        self._deadline = started + options.seconds
        self._facts: dict[str, Any] = {}
        self._worker: _Worker | None = None

    def start(self) -> dict[str, Any]:
        """Start a worker; return what it says of device and versions."""
        self._worker = _Worker(self._root, self._options)
        try:
            hello = self._worker.read(min(START_LIMIT_S, self._deadline - time.monotonic()))
        except WorkerLostError:
            self.stop()
            raise
        if "refusal" in hello:
            self.stop()
            raise WorkerLostError(str(hello["refusal"]))
        return hello

    def take(self, row: Row) -> None:
        """Run a row, or say why not."""
        reason = self._why_not(row)
        started = time.monotonic()
        result: Result = {"status": "skipped", "reason": reason, "lines": []}
        if reason is None:
            result = self._ask(row)
        self._facts |= result.pop("facts", {})
        reason = result["reason"] or ""
        result |= {
            "id": row.id,
            "is_answer": row.is_answer,
            "reason": reason,
            "seconds": round(time.monotonic() - started, 2),
        }
        self.results.append(result)
        print(f"{result['seconds']:6.1f} s  {result['status']:8}  {row.id}  {reason}", flush=True)

    def stop(self) -> None:
        """End the worker; the next row starts another."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _why_not(self, row: Row) -> str | None:
        states = {result["id"]: result["status"] for result in self.results}
        wrong = [name for name in row.answers if states.get(name) == "failed"]
        if wrong:
            return f"no speed without right answers: {', '.join(wrong)} failed"
        left = self._deadline - time.monotonic()
        if left < row.need_s:
            return f"it needs about {row.need_s:.0f} s, {max(0.0, left):.0f} s are left"
        return None

    def _ask(self, row: Row) -> Result:
        try:
            if self._worker is None:
                self.start()
            assert self._worker is not None
            self._worker.send(row, self._facts)
            limit = row.limit_s * (_TINY_PATIENCE if self._options.tiny else 1)
            result = self._worker.read(min(limit, self._deadline - time.monotonic()))
        except WorkerLostError as error:
            self.stop()
            return {"status": "failed", "reason": str(error), "lines": []}
        if result.pop("is_device_lost", False):
            self.stop()
        return result


class _Worker:
    """One process that runs rows; it answers through a pipe, its own words go to worker.log."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        reading, writing = os.pipe()
        self._answers = reading
        self._buffer = b""
        self._log: IO[bytes] = (options.out / "worker.log").open("ab")
        command = [sys.executable, "-c", _START, str(root), str(writing), str(options.seed)]
        environment = {**os.environ, **(_TINY_ENVIRONMENT if options.tiny else {})}
        self._process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)

    def send(self, row: Row, facts: Mapping[str, Any]) -> None:
        """Hand over a row and what earlier rows found out."""
        message = {"run": row.run, "arguments": row.arguments, "id": row.id, "facts": facts}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerLostError("the worker is gone") from error

    def read(self, limit_s: float) -> dict[str, Any]:
        """Wait for one answer."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerLostError(f"it took more than {limit_s:.0f} s and was stopped")
                data = os.read(self._answers, 1 << 16)
                if not data:
                    code = self._process.wait(timeout=10)
                    raise WorkerLostError(f"its process ended with exit code {code}")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._answers)
        self._log.close()


_START = """
import sys
root, fd, seed = sys.argv[1:4]
sys.path[:0] = [root + "/src", root + "/tests/gpu"]
from check.worker import work
work(int(fd), int(seed))
"""
# Triton decides at import whether it interprets, so this stands before the worker begins.
_TINY_PATIENCE = 5  # limits are a card's; an interpreter on a busy machine may take longer
_TINY_ENVIRONMENT = {"SENTEI_CHECK_TINY": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def _parse(root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/check", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="in Triton's interpreter on the CPU, tiny sizes")
    parser.add_argument("--out", type=Path, default=root / "build" / "gpu", help="folder for the report")
    parser.add_argument("--rows", action="append", metavar="PATTERN", help="rows by name, as prefill/*")
    parser.add_argument("--list", action="store_true", help="name the rows, run none")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of all random inputs")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="after which no row is running")
    options = parser.parse_args()
    options.rows = options.rows or ["*"]
    options.out = options.out.resolve()
    return options


def _commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_report(folder: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Write check.json and check.md into the folder; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.json").write_text(json.dumps({**about, "rows": list(results)}, indent=1) + "\n")
    table = to_markdown(about, results)
    (folder / "check.md").write_text(table + "\n")
    return table


def to_markdown(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """One line on the machine, then a line per figure; a row without figures gives its reason."""
    device = about.get("device") or {}
    words = ", ".join(f"{key} {value}" for key, value in device.items())
    lines = [f"{words}; seed {about['seed']}, commit {about['commit']}, {about['seconds']:.0f} s", "", HEADER]
    for result in results:
        lines += [_line(result, line) for line in result["lines"] or [{"what": ""}]]
    return "\n".join(lines)


def _line(result: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    low, high = line.get("p20_ms"), line.get("p80_ms")
    share = line.get("share")
    note = "; ".join(part for part in (result["reason"], line.get("note")) if part)
    cells = (
        result["id"],
        result["status"],
        line["what"],
        _number(line.get("ms")),
        "" if low is None or high is None else f"{_number(low)}..{_number(high)}",
        _number(line.get("ratio")),
        line.get("against", ""),
        "" if share is None else f"{share:.0%} {line.get('peak', '')}",
        _number(line.get("extra_mib")),
        note.replace("|", "/"),
    )
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
