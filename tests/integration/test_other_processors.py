"""Our own CPU programs as other processors than this one compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sentei.kernels.ops.native.build import compiler

ROOT = Path(__file__).parents[2]
CASES = ("tests/unit/test_cpu_pages.py", "tests/unit/test_native.py")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.skipif("avx512bw" not in _processor_flags(), reason="this processor runs no more than it tests")
def test_bytes_are_scored_with_avx2_alone(tmp_path: Path) -> None:
    """Products of bytes are made of others there, in vectors half as wide."""
    own = tmp_path / "c++"
    own.write_text(
        "#!/bin/sh\n"
        'for word; do shift; [ "$word" = -march=native ] || set -- "$@" "$word"; done\n'
        f'exec {compiler()} -march=haswell "$@"\n',
        encoding="utf-8",
    )
    own.chmod(0o700)
    environment = os.environ | {"CXX": str(own), "SENTEI_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "byte or one_call", *CASES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-2000:]
    assert " skipped" not in run.stdout  # bytes are multiplied there, too
