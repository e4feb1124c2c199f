"""Backends by name: one is picked per call, and each that was passed over says why."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import DEFAULT_BLOCK, BlockMask
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.limits import DECODE_ROWS_MAX, NATIVE_BLOCK_STEP
from sentei.kernels.ops.native.build import compiler, load_native
from sentei.kernels.ops.rules import Softmax

Result = TypeVar("Result")

# These build a program at first use: where that fails, the next backend takes over.
COMPILED_BACKENDS = ("native", "flex", "triton")


@dataclass(frozen=True)
class Request:
    """What a call asks of a backend."""

    device: str
    dtype: torch.dtype
    q_len: int
    needs_lse: bool = False
    block_k: int = DEFAULT_BLOCK
    needs_softcap: bool = False
    needs_sinks: bool = False


class AttendFn(Protocol):
    """Attention over a block mask: (out, lse or None)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax
    ) -> tuple[Tensor, Tensor | None]:
        """Compute it."""
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


def is_native_usable(device: str, block_k: int) -> bool:
    """Whether Sentei's own CPU programs run here; the first call builds them, and warns if that fails."""
    if device != "cpu" or "native" in _broken or _why_no_native(block_k) is not None:
        return False
    try:
        load_native()
    except (BackendError, OSError) as error:
        give_up_on("native", error)
        return False
    return True


def give_up_on(name: str, error: Exception) -> None:
    """Pass a backend over from now on in this process, and warn the first time."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = f"it failed here: {type(error).__name__}: {first_line}"
    if _broken.setdefault(name, reason) is reason:
        warnings.warn(
            f"attention backend {name!r} is off for this process, {reason}", RuntimeWarning, stacklevel=3
        )


def attempt(name: str, work: Callable[[], Result], *, must_work: bool) -> Result | None:
    """Return what `work` gives; None where it fails, or failed before, and another way will do."""
    if is_off(name) and not must_work:
        return None
    try:
        return work()
    except Exception as error:  # a compiler can fail in any way; correctness must not depend on it
        if must_work or isinstance(error, torch.OutOfMemoryError):
            raise
        give_up_on(name, error)
        return None


def is_off(name: str) -> bool:
    """Whether `give_up_on` has passed it over in this process."""
    return name in _broken


def why_no_compiler() -> str | None:
    """Why FlexAttention cannot be compiled for the CPU here, or None if it can."""
    if (reason := _why_no_cxx()) is not None:
        return reason
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


def takes_triton(backend: str, device: torch.device) -> bool:
    """Whether an operation of a Triton and a torch path takes Triton: if asked to, or by itself on a GPU."""
    if backend not in ("auto", "triton", "torch"):
        raise BackendError(f"backend {backend!r} is unknown; choose auto, triton, torch")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False  # asked several times in each layer: looking for a package takes 40 us
    refusal = why_no_triton(device.type)
    if backend == "triton" and refusal is not None:
        raise BackendError(f"backend 'triton' refuses: {refusal}; backend='auto' picks another")
    return refusal is None


def _in_order(request: Request) -> tuple[Backend, ...]:
    names = ("gather", "flex") if request.q_len <= DECODE_ROWS_MAX else ("flex", "gather")
    first = "native" if request.device == "cpu" else "triton"
    return tuple(_BACKENDS[name] for name in (first, *names, "reference"))


def _refuse_native(request: Request) -> str | None:
    if request.device != "cpu":
        return "it is a CPU program"
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 or bfloat16, not {request.dtype}"
    if request.needs_softcap or request.needs_sinks:
        return "it has no softcap and no sinks"
    return _why_no_native(request.block_k)


def _why_no_native(block_k: int) -> str | None:
    if block_k % NATIVE_BLOCK_STEP:
        return f"it takes key blocks of a multiple of {NATIVE_BLOCK_STEP} tokens, not {block_k}"
    return _why_no_cxx()


def _why_no_cxx() -> str | None:
    if not _is_on_path(compiler(), os.environ.get("PATH")):
        return f"it needs a C++ compiler and {compiler()!r} is not on the path (install g++ or set CXX)"
    return None


@cache
def _is_on_path(program: str, path: str | None) -> bool:
    """Looked up once per path: a decode step asks four times in each layer."""
    return shutil.which(program, path=path) is not None


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


def _load_native() -> AttendFn:
    from sentei.kernels.ops.native.calls import attend_native

    return attend_native


def _load_flex() -> AttendFn:
    from sentei.kernels.ops.flex import attend_flex

    return attend_flex


def _load_gather() -> AttendFn:
    from sentei.kernels.ops.gather import attend_gather

    return attend_gather


def _load_triton() -> AttendFn:
    from sentei.kernels.ops.triton.prefill import attend_triton

    return attend_triton


def _load_reference() -> AttendFn:
    from sentei.kernels.ops.reference import attend_reference

    return attend_reference


_BACKENDS = {
    "native": Backend("native", _refuse_native, _load_native),
    "triton": Backend("triton", _refuse_triton, _load_triton),
    "flex": Backend("flex", _refuse_flex, _load_flex),
    "gather": Backend("gather", _accept, _load_gather),
    "reference": Backend("reference", _accept, _load_reference),
}
_broken: dict[str, str] = {}
