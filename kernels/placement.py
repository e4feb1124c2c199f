"""Which device a model runs on, and in which precision: decided here and nowhere else (docs/adr/0025).

`place` is a pure function of what torch reports and of what was asked. ROCm builds of torch name their GPUs
`cuda`, too. What waits for a GPU to be idle, so that a clock tells the truth, is here as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sentei.errors import SenteiError

Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)


class DeviceError(SenteiError, RuntimeError):
    """A device that was asked for and is not there; the message names the way out."""

    is_absent = True


@dataclass(frozen=True, slots=True)
class Hardware:
    """What torch reports of this machine."""

    torch_version: str
    gpu_api: str | None  # CUDA or ROCm, as torch was built; None: for CPUs only
    gpus: tuple[str, ...] = ()  # names of those that this process may use, in torch's order
    has_gpu_bf16: bool = False  # in the first GPU's own instructions, not by emulation
    has_cpu_bf16: bool = False  # AVX512-BF16 or AMX


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes, in which precision, and why."""

    device: torch.device
    dtype: torch.dtype
    why: str

    @property
    def dtype_name(self) -> str:
        """The precision's name without its prefix, as options have it."""
        return str(self.dtype).removeprefix("torch.")


def read_hardware() -> Hardware:
    """Ask torch what there is; no GPU memory is taken."""
    api = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else None
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Hardware(
        torch_version=torch.__version__,
        gpu_api=api,
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(num_gpus)),
        has_gpu_bf16=num_gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False),
        has_cpu_bf16=torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    )


def place(
    hardware: Hardware,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    *,
    usual: torch.dtype | None = None,
) -> Placement:
    """Decide: `auto` takes the first GPU, else the CPU; `cuda` without a GPU is a DeviceError.

    A precision that was asked for stands, then the one that is `usual` for the model, then the device's
    fastest. Raises ValueError for a device that is none of `DEVICES`.
    """
    if device not in DEVICES:
        raise ValueError(
            f"device is {device!r}; choose {', '.join(DEVICES)} (GPUs of AMD are 'cuda', too: torch's name)"
        )
    if device == "cuda" and not hardware.gpus:
        raise DeviceError(
            f"device is 'cuda', but {_no_gpu(hardware)}; see that nvidia-smi or rocm-smi lists a GPU, that "
            "CUDA_VISIBLE_DEVICES does not hide it and that torch is built for it "
            "(https://pytorch.org/get-started/locally), or ask for 'auto' or 'cpu'"
        )
    is_gpu = device != "cpu" and bool(hardware.gpus)
    reason = _device_reason(hardware, device, is_gpu=is_gpu)
    if dtype is not None:
        precision, because = dtype, "the precision is the one asked for"
    elif usual is not None:
        precision, because = usual, "the precision is the model's usual one"
    else:
        precision, because = _fastest(hardware, is_gpu=is_gpu)
    place_ = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    return Placement(place_, precision, f"{reason}; {because}")


def _no_gpu(hardware: Hardware) -> str:
    if hardware.gpu_api is None:
        return f"torch {hardware.torch_version} is built for CPUs only"
    return f"torch {hardware.torch_version}, built for {hardware.gpu_api}, finds no GPU"


def _device_reason(hardware: Hardware, device: str, *, is_gpu: bool) -> str:
    if is_gpu:
        others = len(hardware.gpus) - 1
        more = f", the first of {others + 1} (CUDA_VISIBLE_DEVICES chooses another)" if others else ""
        return f"{hardware.gpus[0]} by {hardware.gpu_api}{more}"
    return "the CPU was asked for" if device == "cpu" else _no_gpu(hardware)


def _fastest(hardware: Hardware, *, is_gpu: bool) -> tuple[torch.dtype, str]:
    """Return the precision in which a device multiplies matrices fastest.

    Measured on 2 cores of a CPU without AVX512-BF16, 2048 x 640 x 2048: fp32 159 GFLOP/s, bf16 0.5.
    """
    if is_gpu:
        if hardware.has_gpu_bf16:
            return torch.bfloat16, "this GPU multiplies bfloat16 in its matrix units"
        return torch.float32, "this GPU only emulates bfloat16, and models of today overflow float16"
    if hardware.has_cpu_bf16:
        return torch.bfloat16, "this CPU has instructions for bfloat16"
    return torch.float32, "this CPU has no instructions for bfloat16"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told; a CPU never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds, read when the device is idle."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return now
