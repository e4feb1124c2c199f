"""The command for a card, end to end in Triton's interpreter: its first real run must not die of a typo."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.check.command import run_rows
from tests.gpu.check.plan import Row

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "gpu" / "check"
# Without a card these have nothing to run on.
NEED_A_CARD = {
    *(f"answer/graph/{case}" for case in ("decode", "prefill", "scored_step", "scored_prompt")),
    "host_syncs",
}

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


@pytest.mark.timeout(1200)  # a minute of one core, which others may be using
def test_every_row_runs_in_the_interpreter(tmp_path: Path) -> None:
    """Answers pass, every figure has its line, what cannot run here says why, and the table is complete."""
    done = run_check(tmp_path, "--tiny", "--seed", "7", "--seconds", "1100", limit_s=1150)

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
    shares = [line for line in rows["score/128"]["lines"] if line["what"].endswith(": all")]
    assert len(shares) == 2
    assert all("of dense" in line["note"] for line in shares)
    steps = [line["what"] for line in rows["decode/128/0.5"]["lines"]]
    assert "rank 32, 4 as one" in steps


def test_a_row_that_fails_or_hangs_costs_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong answer makes the exit code 1 and hides its times; after a hang another worker goes on."""
    rows = [
        Row("wrong", "answers_attention:prefill", {"case": "unheard of"}),
        Row("its times", "speed:peaks", answers=("wrong",)),
        Row("hangs", "speed:peaks", limit_s=0.0),
        Row("dies", "answers_lists:graph", {"case": "decode"}, limit_s=0.0),
        Row("too long", "speed:peaks", need_s=1e6),
        Row("goes on", "speed:peaks"),
    ]
    options = argparse.Namespace(tiny=True, out=tmp_path, seed=3, seconds=100.0)

    code = run_rows(ROOT, rows, options)

    found = {name: (row["status"], row["reason"]) for name, row in read_rows(tmp_path).items()}
    assert code == 1
    assert found["wrong"] == ("failed", "KeyError: 'unheard of'")
    assert found["its times"] == ("skipped", "no speed without right answers: wrong failed")
    assert found["hangs"] == ("failed", "it took more than 0 s and was stopped")
    assert found["dies"] == ("failed", "it took more than 0 s and was stopped")
    assert found["too long"][0] == "skipped"
    assert found["goes on"] == ("measured", "")
    assert "wrong answers: wrong, dies" in capsys.readouterr().err


def test_rows_bring_what_they_stand_on(tmp_path: Path) -> None:
    """One timed row asked for: its answers and the peaks come first, nothing else comes."""
    listed = run_check(tmp_path, "--list", "--rows", "decode/32768/0.1").stdout.split()

    answers = ["answer/decode/groups", "answer/select/threshold", "answer/step/tokens", "answer/step/means"]
    assert listed == [*answers, "peaks", "decode/32768/0.1"]


def test_without_a_card_nothing_runs_and_the_words_say_so(tmp_path: Path) -> None:
    """Exit code 3, what is missing, and the way out."""
    done = run_check(tmp_path, CUDA_VISIBLE_DEVICES="")

    assert done.returncode == 3
    assert "torch sees no CUDA or ROCm device; --tiny runs the same rows" in done.stderr


def test_operations_and_scorer_need_torch_alone() -> None:
    """On a card's machine there is torch and Triton; nothing else of ours is imported on the way."""
    modules = ("ops.attention", "ops.paged", "ops.block_mass", "ops.select", "ops.flex", "scorer.pages")
    lines = [f"import sentei.kernels.{name}" for name in modules]
    lines += ["import sys", "print(sorted({name.partition('.')[0] for name in sys.modules}))"]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=path, capture_output=True, text=True, check=True
    )

    others = ("transformers", "pydantic", "yaml", "safetensors", "tokenizers", "scipy", "mlflow", "ray")
    assert not set(others) & set(json.loads(done.stdout.replace("'", '"')))
