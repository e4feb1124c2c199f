"""The process that runs rows: an order per line, an answer each through a pipe; it survives a failed row."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import sys
import traceback
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.registry import give_up_on, why_no_triton

from .plan import FULL, TINY, Line, Sizes, SkipRowError, WrongAnswerError, first_line


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a row runs: sizes, device, a generator seeded for this row alone, what earlier rows found out."""

    sizes: Sizes
    device: torch.device
    generator: torch.Generator
    facts: dict[str, Any]
    learned: dict[str, Any]  # facts of this row, for later ones

    @property
    def is_cuda(self) -> bool:
        """Whether this is a card (ROCm's is called cuda too)."""
        return self.device.type == "cuda"


def work(pipe: int, seed: int) -> None:
    """Say hello, then run rows until the parent closes the other end."""
    is_tiny = os.environ.get("SENTEI_CHECK_TINY") == "1"
    device = torch.device("cpu" if is_tiny else "cuda")
    with os.fdopen(pipe, "w") as answers:
        refusal = _why_not(device)
        hello = {"refusal": refusal} if refusal else {"device": _describe(device)}
        print(json.dumps(hello), file=answers, flush=True)
        if is_tiny:
            _pass_over_cpu_programs()
        for line in sys.stdin:
            order = json.loads(line)
            # A row's numbers depend on the seed and its own name, not on which rows ran before it.
            generator = torch.Generator(device).manual_seed(seed + zlib.crc32(order["id"].encode()))
            bench = Bench(TINY if is_tiny else FULL, device, generator, order["facts"], {})
            print(json.dumps(_run(order, bench)), file=answers, flush=True)


def _run(order: dict[str, Any], bench: Bench) -> dict[str, Any]:
    name, _, function = order["run"].partition(":")
    result: dict[str, Any] = {"status": "passed" if name.startswith("answers") else "measured", "reason": ""}
    lines: list[Line] = []
    try:
        # A row yields its lines, so that what was measured before a failure is kept.
        for line in getattr(importlib.import_module(f"check.{name}"), function)(bench, **order["arguments"]):
            lines.append(line)
    except SkipRowError as error:
        result |= {"status": "skipped", "reason": str(error)}
    except WrongAnswerError as error:
        result |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        result |= {"status": "failed", "reason": first_line(error)}
    result |= {"lines": [line.to_dict() for line in lines], "facts": bench.learned}
    if bench.is_cuda:
        result |= _settle()
        if "is_device_lost" in result and result["status"] != "failed":
            result |= {
                "status": "failed",
                "reason": "the device failed after the last call",
            }
    return result


def _settle() -> dict[str, Any]:
    """Free the row's memory; an illegal access leaves a device that this process cannot use any more."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        traceback.print_exc()
        return {"is_device_lost": True}
    return {}


def _why_not(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device; --tiny runs the same rows in Triton's interpreter"
    return why_no_triton(device.type)


def _describe(device: torch.device) -> dict[str, str]:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return {"device": "CPU in Triton's interpreter, tiny sizes: no figure here is one", **versions}
    about = torch.cuda.get_device_properties(device)
    return {
        "device": about.name,
        "units": str(about.multi_processor_count),
        "memory": f"{about.total_memory / 2**30:.0f} GiB",
        **versions,
    }


def _pass_over_cpu_programs() -> None:
    """Take the ways that a card would take: torch in chunks for scores, and no program that is compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("native", "flex"):
            give_up_on(name, BackendError("off in the tiny run: a card has none"))
