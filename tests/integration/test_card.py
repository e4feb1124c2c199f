"""The pretended card once more, with the GPU kernels in the interpreter, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One of each: a decode step on all rungs, a prefill, paged decode, recording by exact mass.
CASES = (
    "tests/card/test_serving.py::test_requests_on_several_rungs_take_turns_without_more_reads[llama]",
    "tests/card/test_serving.py::test_paged_decode_reads_nothing[None]",
    "tests/card/test_offline.py::test_records_come_to_the_cpu_as_they_are_made[gemma]",
)


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)")
def test_launching_the_kernels_reads_nothing() -> None:
    """Launch code, with its strides, sizes and precisions, asks the host for no value on the way."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "timeout=800", *CASES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{len(CASES)} passed in", done.stdout), done.stdout
