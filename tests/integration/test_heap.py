"""glibc keeps what a pass frees, unless somebody said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from sentei.kernels.hf.heap import keep_freed_memory
print(keep_freed_memory())
def work():  # as a layer does: some megabytes, taken and given back, with something small behind them
    for _ in range(50):
        rows = [torch.ones(1 << 20) for _ in range(8)]
        del rows
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run_with(environment: dict[str, str]) -> tuple[str, int]:
    """Run the program: whether memory is kept, and the page faults of its second half."""
    command = [sys.executable, "-c", PROGRAM]
    told = ("MALLOC_", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    output = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    said, faults = output.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_not_taken_from_the_system_again() -> None:
    """Without it each round faults in all of its pages: eight tensors of 1,024 pages, fifty times."""
    said, faults = run_with({})

    assert said == "True"
    assert faults < 8 * 1024


@pytest.mark.parametrize(
    "told", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}]
)
def test_what_the_environment_says_goes_first(told: dict[str, str]) -> None:
    """Who tunes the C library by hand is not overruled."""
    assert run_with(told)[0] == "False"
