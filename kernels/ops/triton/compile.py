"""Compile a launch for GPUs that are not here, and read from the compiler's output what it takes."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes on one target: registers per thread, shared memory, what did not fit.

    Spills count bytes per thread on NVIDIA, and registers (vector and scalar) on AMD.
    """

    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile as a call with aligned tensors would, for one of TARGETS; no device is needed."""
    if triton.knobs.runtime.interpret:
        raise BackendError("this process interprets Triton kernels; compile in one without TRITON_INTERPRET")
    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[str | int]]] = {}
    for i_argument, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if value is None:
            constants.setdefault(name, None)
            signature[name] = "constexpr"
            continue
        signature[name] = _type_name(value)
        is_free = launch.kernel.params[i_argument].do_not_specialize
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not is_free):
            attributes[(i_argument,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    is_amd = TARGETS[target].backend == "hip"
    registers, spills = (
        _read_amdgcn(compiled.asm["amdgcn"]) if is_amd else _ask_ptxas(compiled.asm["ptx"], target)
    )
    return Resources(target, launch.num_warps, registers, spills, int(compiled.metadata.shared))


def _ask_ptxas(ptx: str, target: str) -> tuple[int, int]:
    """Registers and spilled bytes that Triton's own assembler reports."""
    name = "ptxas-blackwell" if target == "sm_100" else "ptxas"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx, encoding="utf-8")
        architecture = _find(r"\.target (sm_\w+)", ptx)
        command = [str(tool), "-v", f"--gpu-name={architecture}", str(text), "-o", str(text) + ".cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = (int(_find(rf"(\d+) bytes spill {kind}", report)) for kind in ("stores", "loads"))
    return int(_find(r"Used (\d+) registers", report)), stores + loads


def _read_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers, and spilled registers of both kinds, from the kernel's metadata."""
    spills = sum(int(_find(rf"\.{kind}_spill_count:\s+(\d+)", assembly)) for kind in ("vgpr", "sgpr"))
    return int(_find(r"\.vgpr_count:\s+(\d+)", assembly)), spills


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise BackendError(f"the compiler's output has no {pattern!r}; its format has changed")
    return found.group(1)


def _type_name(value: Tensor | float | int) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"
