"""The command for a card, end to end in Triton's interpreter: its first real run must not die of a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "gpu" / "check"
# Without a card these have nothing to run on.
NEED_A_CARD = {"answer/graph/decode", "answer/graph/prefill", "host_syncs"}

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)


def run_check(
    folder: Path, *words: str, limit_s: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script as `make gpu` calls it, from elsewhere and without a path to the package."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(CHECK), "--out", str(folder), *words],
        cwd=folder,
        env={**found, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of check.json by name."""
    return {row["id"]: row for row in json.loads((folder / "check.json").read_text())["rows"]}


def test_every_row_runs_in_the_interpreter(tmp_path: Path) -> None:
    """Answers pass, every figure has its line, what cannot run here says why, and the table is complete."""
    done = run_check(tmp_path, "--tiny", "--seed", "7")

    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path)
    states = {name: row["status"] for name, row in rows.items()}
    for name, row in rows.items():
        if name in NEED_A_CARD or name == "model/gemma-3-270m":
            assert row["status"] in ("skipped", "measured"), (name, row)
            assert row["lines"] or row["reason"], (name, row)
        else:
            assert row["status"] == ("passed" if row["is_answer"] else "measured"), (name, row)
            assert row["lines"], name
    planned = run_check(tmp_path, "--tiny", "--list").stdout.split()
    assert list(states) == planned
    table = (tmp_path / "check.md").read_text()
    assert all(f"| {name} |" in table for name in planned)
    scored = [line for line in rows["prefill/128/0.5"]["lines"] if line["what"] == "with scorer"]
    assert scored[0]["ms"] > 0
    assert "density" in scored[0]["note"]
