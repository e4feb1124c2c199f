"""What this machine can do at best: the floor under every timed op."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sentei.kernels.bench.cases import RANK, Shape
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.placement import clock_of

_MATRIX = 1536
_COPY_FLOATS = 2**25
_TRIALS = 5
_GPU_FACTOR = 8  # a GPU is not full with what a CPU takes half a second for


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured peaks, and what measured them."""

    device: str
    threads: int
    torch_version: str
    gflops: float  # of one large matrix product in fp32
    bf16_gflops: float  # and in bf16: many times slower or faster, by processor
    gbytes_per_s: float  # read and written by one large copy

    def floor_ms(self, shape: Shape, mask: BlockMask, op: str) -> float:
        """The time that FLOPs and bytes alone would take: the larger of the two."""
        pairs = float(mask.counts.sum()) * mask.block_k * min(mask.block_q, mask.q_len)
        pairs *= shape.heads / mask.counts.shape[1] * shape.batch / mask.counts.shape[0]
        flops = {"block_mass": 2.0, "score": 0.0}.get(op, 4.0) * shape.head_dim * pairs
        keys = float(shape.batch * shape.kv_heads * shape.tokens)
        if op == "decode":  # every list reads its blocks
            keys = float(mask.counts.sum()) * mask.block_k
        moved = (
            shape.dtype.itemsize * shape.head_dim * (2 * keys + 2 * shape.batch * shape.heads * mask.q_len)
        )
        if op == "score":  # each block's mean key against every query row, once
            flops = 2.0 * (shape.head_dim + RANK) * shape.heads * shape.tokens**2 / (2 * shape.block)
        # A bf16 tensor may be multiplied in either precision: the floor is what the faster one allows.
        peak = self.gflops if shape.dtype == torch.float32 else max(self.gflops, self.bf16_gflops)
        return 1e3 * max(flops / (1e9 * peak), moved / (1e9 * self.gbytes_per_s))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_machine(device: torch.device | None = None) -> Machine:
    """Time one matrix product and one copy larger than any cache, on the CPU unless told otherwise."""
    device = device if device is not None else torch.device("cpu")
    is_cpu = device.type == "cpu"
    size, floats = (_MATRIX, _COPY_FLOATS) if is_cpu else (_MATRIX * _GPU_FACTOR, _COPY_FLOATS * _GPU_FACTOR)
    source, target = torch.randn(floats, device=device), torch.empty(floats, device=device)
    copy_s = _least_s(lambda: target.copy_(source), device)
    return Machine(
        device=_processor() if is_cpu else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        gflops=_gflops(torch.float32, size, device),
        # small on a CPU: without the instructions it takes seconds
        bf16_gflops=_gflops(torch.bfloat16, size // 2 if is_cpu else size, device),
        gbytes_per_s=8 * floats / copy_s / 1e9,
    )


def _gflops(dtype: torch.dtype, size: int, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least_s(lambda: torch.mm(left, right), device) / 1e9


def _least_s(work: Callable[[], object], device: torch.device) -> float:
    now, spent = clock_of(device), []
    for _ in range(_TRIALS):
        started = now()
        work()
        spent.append(now() - started)
    return min(spent)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
