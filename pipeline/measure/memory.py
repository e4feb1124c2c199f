"""What a prefill adds to the memory of a process at its peak, per rung, so that rungs can be compared.

An allocator keeps what was freed, so a second prefill seems to need nothing. Before each measurement freed
memory is therefore given back to the operating system, and its own mark of the highest use is set back; where
neither is possible there is no figure rather than one that says nothing.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from pathlib import Path

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.retrofit import Retrofit
from sentei.kernels.placement import synchronize
from sentei.pipeline.measure.latency import BEST_DENSE, prefill, variant_of
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted

_RESET_PEAK = "5"  # written to clear_refs: VmHWM begins again at what is resident now
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def prefill_peaks(
    loaded: LoadedModel, adapter: Adapter, text: torch.Tensor, *, runs: int, progress: Progress
) -> dict[str, float]:
    """Return, per rung, how many MiB a prefill of the text adds at its peak: the median of some runs.

    Empty where nobody can say.

    `dense` is our own dense program. Everything must have run once before, or its compilation is measured.
    """
    kind = loaded.device.type
    if kind != "cuda" and not _can_measure():
        return {}
    measure = _on_device if kind == "cuda" else _on_host
    peaks: dict[str, float] = {}
    for rung in counted(adapter.ladder.rungs, "peak memory", progress):
        with variant_of(loaded, adapter, BEST_DENSE if rung.is_dense else rung.id) as handle:
            peaks[rung.id] = statistics.median(measure(loaded, text, handle) for _ in range(runs))
    return peaks


def _on_device(loaded: LoadedModel, text: torch.Tensor, handle: Retrofit | None) -> float:
    synchronize(loaded.device)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    before = torch.cuda.memory_allocated(loaded.device)
    prefill(loaded, text, handle)
    synchronize(loaded.device)
    return (torch.cuda.max_memory_allocated(loaded.device) - before) / 2**20


def _on_host(loaded: LoadedModel, text: torch.Tensor, handle: Retrofit | None) -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    before = _status_kib("VmRSS")
    prefill(loaded, text, handle)
    return max(0, _status_kib("VmHWM") - before) / 1024


def _can_measure() -> bool:
    """Whether freed memory can be given back (glibc) and the peak be set back (Linux)."""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return False
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _status_kib(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(f"{_STATUS} has no {name}")
