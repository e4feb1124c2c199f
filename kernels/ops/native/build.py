"""Builds and loads Sentei's CPU programs (programs.cpp): once per machine, source and compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sentei.kernels.ops.errors import BackendError

SOURCE = Path(__file__).with_name("programs.cpp")
# What the one text to compile is made of.
PARTS = (
    SOURCE,
    *(
        SOURCE.with_name(part)
        for part in ("rows.h", "chosen_rows.h", "byte_scores.h", "paged.hpp", "page_scores.h")
    ),
)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17")


@cache
def load_native() -> ctypes.CDLL:
    """Load the programs, building them at first use (about 5 s); BackendError with the compiler's words."""
    path = cache_folder() / f"native-{_fingerprint()}.so"
    if not path.exists():
        _build(path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Where built programs are kept: SENTEI_CACHE, else ~/.cache/sentei; readable by its owner only."""
    root = os.environ.get("SENTEI_CACHE") or Path.home() / ".cache" / "sentei"
    folder = Path(root) / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BackendError(f"{folder} belongs to another user: set SENTEI_CACHE to a folder of your own")
    return folder


def compiler() -> str:
    """The C++ compiler: CXX, else g++."""
    return os.environ.get("CXX", "g++")


def _build(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler(), *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BackendError(f"{' '.join(command)} did not run: {error}") from error
        if run.returncode:
            first = next(iter(run.stderr.strip().splitlines()), "no message")
            raise BackendError(f"{' '.join(command)} failed with exit code {run.returncode}: {first}")
        made.replace(path)  # two processes may build at once: each moves a whole file into place


def _fingerprint() -> str:
    """What the program depends on: its text, the flags, the compiler, and the processor it was tuned for."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    text = "".join(part.read_text() for part in PARTS)
    parts = (text, " ".join(FLAGS), version, platform.machine(), _processor_flags())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
