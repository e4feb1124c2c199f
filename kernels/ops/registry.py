"""Backends by name: one is picked per call, and each that was passed over says why."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import BackendError

# Calls with at most this many query rows are decode steps: they go to `gather` first.
DECODE_ROWS_MAX = 16


@dataclass(frozen=True)
class Request:
    """What a call asks of a backend."""

    device: str
    dtype: torch.dtype
    q_len: int
    needs_lse: bool = False
    needs_softcap: bool = False
    needs_sinks: bool = False


class AttendFn(Protocol):
    """Attention over a block mask: (out, lse or None)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute it; `scale` multiplies the scores, `window` bounds each row's reach in keys."""
        ...


@dataclass(frozen=True)
class Backend:
    """A named way to compute attention: `refuse` gives the reason against a request, `load` imports it."""

    name: str
    refuse: Callable[[Request], str | None]
    load: Callable[[], AttendFn]


@dataclass(frozen=True)
class Choice:
    """The backend picked, and (name, reason) of each better one that was passed over."""

    backend: Backend
    refusals: tuple[tuple[str, str], ...]


def pick_backend(request: Request, name: str = "auto") -> Choice:
    """Pick by name, or the first in order of preference that takes the request; BackendError says why not."""
    if name != "auto":
        backend = _BACKENDS.get(name)
        if backend is None:
            raise BackendError(f"backend {name!r} is unknown; choose auto, {', '.join(_BACKENDS)}")
        reason = backend.refuse(request)
        if reason is not None:
            raise BackendError(f"backend {name!r} refuses: {reason}; backend='auto' picks another")
        return Choice(backend, ())
    refusals: list[tuple[str, str]] = []
    for backend in _in_order(request):
        reason = _broken.get(backend.name) or backend.refuse(request)
        if reason is None:
            return Choice(backend, tuple(refusals))
        refusals.append((backend.name, reason))
    raise BackendError("no backend takes this call: " + "; ".join(f"{n}: {why}" for n, why in refusals))


def report_broken(name: str, reason: str) -> bool:
    """Pass a backend over from now on in this process, as it failed; True the first time."""
    return _broken.setdefault(name, reason) is reason


def why_no_compiler() -> str | None:
    """Why FlexAttention cannot be compiled for the CPU here, or None if it can."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler and {compiler!r} is not on the path (install g++ or set CXX)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"it needs Python's headers and {header} is missing (install python3-dev)"
    return None


def why_no_triton(device: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None if they can."""
    if find_spec("triton") is None:
        return "it needs the package triton, which is not installed (it exists for Linux only)"
    if device == "cuda":  # ROCm's name too
        return None
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it runs on GPUs, and on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1: slow)"
    return f"it runs on CUDA and ROCm devices, not on {device!r}"


def _in_order(request: Request) -> tuple[Backend, ...]:
    names = ("gather", "flex") if request.q_len <= DECODE_ROWS_MAX else ("flex", "gather")
    first = () if request.device == "cpu" else ("triton",)
    return tuple(_BACKENDS[name] for name in (*first, *names, "reference"))


def _refuse_triton(request: Request) -> str | None:
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {request.dtype}"
    return why_no_triton(request.device)


def _refuse_flex(request: Request) -> str | None:
    if request.needs_softcap or request.needs_sinks:
        return "its programs are compiled without softcap and sinks"
    if request.device != "cpu":
        return None
    if request.needs_lse:
        return "compiled FlexAttention cannot return the LSE on the CPU"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"compiled FlexAttention takes float32, bfloat16 or float16 on the CPU, not {request.dtype}"
    return _why_no_cpu_flex()


@cache
def _why_no_cpu_flex() -> str | None:
    if not torch.cpu._is_avx2_supported() or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return "compiled FlexAttention needs AVX2 on the CPU"
    return why_no_compiler()


def _accept(_request: Request) -> str | None:
    return None


def _load_flex() -> AttendFn:
    from sentei.kernels.ops.flex import attend_flex

    return attend_flex


def _load_gather() -> AttendFn:
    from sentei.kernels.ops.gather import attend_gather

    return attend_gather


def _load_triton() -> AttendFn:
    from sentei.kernels.ops.triton_prefill import attend_triton

    return attend_triton


def _load_reference() -> AttendFn:
    from sentei.kernels.ops.reference import attend_reference

    return attend_reference


_BACKENDS = {
    "triton": Backend("triton", _refuse_triton, _load_triton),
    "flex": Backend("flex", _refuse_flex, _load_flex),
    "gather": Backend("gather", _accept, _load_gather),
    "reference": Backend("reference", _accept, _load_reference),
}
_broken: dict[str, str] = {}
