"""Where a model goes and in which precision: decided once, from what torch reports and what was asked."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from sentei.kernels import placement
from sentei.kernels.placement import DEVICES, DeviceError, Hardware, clock_of, place, read_hardware
from sentei.serving.errors import ConfigError
from sentei.serving.settings import AppArgs, EngineOptions

CPU_ONLY = Hardware("2.13.0+cpu", None)
FAST_CPU = Hardware("2.13.0+cpu", None, has_cpu_bf16=True)
BLIND = Hardware("2.13.0+cu130", "CUDA", has_cpu_bf16=True)
ONE_GPU = Hardware("2.13.0+cu130", "CUDA", ("NVIDIA H100",), has_gpu_bf16=True, has_cpu_bf16=True)
OLD_GPU = Hardware("2.13.0+cu130", "CUDA", ("Tesla T4",))
TWO_ROCM = Hardware("2.13.0+rocm7", "ROCm", ("MI300X", "MI300X"), has_gpu_bf16=True)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("hardware", "asked", "device", "dtype", "why"),
    [
        (CPU_ONLY, "auto", "cpu", torch.float32, "built for CPUs only; this CPU has no instructions for bf"),
        (FAST_CPU, "auto", "cpu", torch.bfloat16, "built for CPUs only; this CPU has instructions for bf"),
        (BLIND, "auto", "cpu", torch.bfloat16, "built for CUDA, finds no GPU; this CPU has"),
        (ONE_GPU, "auto", CUDA, torch.bfloat16, "NVIDIA H100 by CUDA; this GPU multiplies bfloat16"),
        (ONE_GPU, "cuda", CUDA, torch.bfloat16, "NVIDIA H100 by CUDA; "),
        (ONE_GPU, "cpu", "cpu", torch.bfloat16, "the CPU was asked for; "),
        (OLD_GPU, "auto", CUDA, torch.float32, "this GPU only emulates bfloat16"),
        (TWO_ROCM, "cuda", CUDA, torch.bfloat16, "MI300X by ROCm, the first of 2 (CUDA_VISIBLE_DEVICES"),
    ],
)
def test_device_and_precision_follow_from_what_torch_reports(
    hardware: Hardware, asked: str, device: Any, dtype: torch.dtype, why: str
) -> None:
    """A GPU goes first, its own instructions decide the precision, and both are said in words."""
    found = place(hardware, asked)

    assert (found.device, found.dtype) == (torch.device(device), dtype)
    assert why in found.why


def test_what_was_asked_stands_above_what_is_usual_and_that_above_what_is_fast() -> None:
    """A precision is never cast to another one behind the back of who asked."""
    asked, usual = torch.float32, torch.float16

    found = [place(ONE_GPU, "auto", dtype, usual=usual).dtype_name for dtype in (asked, None)]

    assert found == ["float32", "float16"]
    assert "asked for" in place(ONE_GPU, "auto", asked, usual=usual).why


@pytest.mark.parametrize("hardware", [CPU_ONLY, BLIND])
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(hardware: Hardware) -> None:
    """The message says what torch is built for, where to look and what else to ask for; it is an absence."""
    with pytest.raises(
        DeviceError, match=r"device is 'cuda', but torch 2.13.*nvidia-smi.*or ask for 'auto'"
    ) as told:
        place(hardware, "cuda")

    assert told.value.is_absent


@pytest.mark.parametrize("name", ["rocm", "gpu", "CUDA", "cuda:1", ""])
def test_other_names_are_refused_with_those_there_are(name: str) -> None:
    """ROCm's name is cuda, torch says so, and the message does."""
    with pytest.raises(ValueError, match=r"choose auto, cpu, cuda .GPUs of AMD are 'cuda', too"):
        place(ONE_GPU, name)


def test_this_machine_can_be_read() -> None:
    """What torch reports here makes a placement, whatever it is."""
    assert place(read_hardware()).device.type in ("cpu", "cuda")


def test_a_gpus_clock_is_read_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each look the device is waited for; a CPU never lags behind its own clock."""
    waited: list[Any] = []
    monkeypatch.setattr(placement.torch.cuda, "synchronize", waited.append)

    for device in (CUDA, torch.device("cpu")):
        clock = clock_of(device)
        assert clock() <= clock()

    assert waited == [CUDA, CUDA]


def test_settings_know_the_same_devices() -> None:
    """The serving settings import no torch, so they name the devices themselves."""
    assert get_args(EngineOptions.model_fields["device"].annotation) == DEVICES


@pytest.mark.parametrize(
    ("options", "gpus", "device"),
    [
        ({}, 0.0, "cpu"),
        ({"device": "cpu"}, 0.0, "cpu"),
        ({"device": "cuda"}, 1.0, "cuda"),
        ({"device": "cuda", "replica_gpus": 0.5}, 0.5, "cuda"),
        ({"replica_gpus": 1}, 1.0, "cuda"),
        ({"engine": "vllm", "replica_gpus": 2}, 2.0, "cuda"),
    ],
)
def test_a_replica_runs_where_ray_gave_it_a_gpu(options: dict[str, Any], gpus: float, device: str) -> None:
    """`cuda` asks Ray for one GPU each, and `auto` uses none that Ray did not give."""
    args = AppArgs(adapter="/nowhere", **options)

    assert args.gpus_per_replica() == gpus
    assert {args.variant_options(name).device for name in ("dense", "sparse")} == {device}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "replica_gpus": 0}, "device is 'cuda' and replica_gpus 0"),
        ({"device": "cpu", "replica_gpus": 1}, "device is 'cpu' and replica_gpus 1"),
        ({"device": "cuda", "replica_gpus": 2}, "keeps its model on one GPU"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    """Device, GPUs and engine have to fit; the message names both values and the way out."""
    with pytest.raises(ConfigError, match=message):
        AppArgs(**options).gpus_per_replica()
