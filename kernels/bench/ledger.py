"""The ledger of benchmark runs: one line per row, with what was measured, where, when and by which commit."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sentei.kernels.bench.machine import Machine
from sentei.kernels.bench.run import Row


def append_rows(path: Path, rows: Sequence[Row], machine: Machine) -> Path:
    """Append the rows to a CSV file; a file of other columns is kept under another name, never mixed."""
    context = machine.to_dict() | {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }
    lines = [context | row.to_dict() for row in rows]
    if not lines:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    header = list(lines[0])
    if path.exists() and path.read_text().splitlines()[:1] != [",".join(header)]:
        path.rename(path.with_name(f"{path.stem}-{datetime.now(UTC):%Y%m%dT%H%M%S}.csv"))
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)
    return path


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip()
