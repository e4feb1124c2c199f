"""What the command line imports before it has something to do: nothing that takes long, or is an extra's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRA = frozenset(
    {
        "torch",
        "ray",
        "transformers",
        "tokenizers",
        "safetensors",
        "triton",
        "mlflow",
        "evidently",
        "pandas",
        "plotly",
    }
    | {
        "pyarrow",
        "sklearn",
        "matplotlib",
        "apscheduler",
        "fastapi",
        "uvicorn",
        "llguidance",
        "psycopg",
        "vllm",
    }
)
NOT_FOR_HELP = EXTRA | {"numpy", "scipy", "sqlalchemy", "jinja2", "yaml"}
TELL = """
import sys
from sentei.pipeline.cli import main
sys.argv = ["sentei", *sys.argv[1:]]
try:
    main()
finally:
    print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
CAUTIOUS = str(ROOT / "policies" / "examples" / "cautious.yaml")


def imported_by(*words: str) -> set[str]:
    """The top-level packages in memory at the end of a command, which must not have failed."""
    found = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", TELL, *words], env=found, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize("words", [["--help"], ["policy", "--help"], ["rollout", "--help"], ["--version"]])
def test_help_imports_nothing_that_takes_long(words: list[str]) -> None:
    """Neither the packages of extras nor those that take a tenth of a second each."""
    assert imported_by(*words) & NOT_FOR_HELP == set()


@pytest.mark.parametrize(
    "words", [["lint", CAUTIOUS], ["explain", CAUTIOUS, "--out", os.devnull], ["schema"]], ids=lambda w: w[0]
)
def test_a_policy_author_needs_no_extra(words: list[str]) -> None:
    """Where the extras are installed, too, these commands leave them alone."""
    assert imported_by("policy", *words) & EXTRA == set()
