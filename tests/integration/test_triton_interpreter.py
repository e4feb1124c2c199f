"""The GPU tests run here too: in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)")
@pytest.mark.parametrize("name", ["prefill", "decode", "mass", "select", "scores"])
def test_kernels_agree_in_the_interpreter(name: str) -> None:
    """Triton decides at import whether it interprets: a fresh process runs the tests, and skips none."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/gpu/test_triton_{name}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed in", done.stdout), done.stdout
