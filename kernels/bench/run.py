"""Times the attention family against every dense alternative, taking turns, after checking its answers."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError
from sentei.kernels.bench.cases import Shape, Tensors, make_mask, make_scorer, make_tensors
from sentei.kernels.bench.machine import Machine
from sentei.kernels.ops.attention import attend, dense_attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.ops.registry import Request, pick_backend
from sentei.kernels.ops.tolerances import allowed_error

BASELINES = ("sdpa", "flex", "native")  # each computes every causal block
CHECK_TOKENS = 512
Works = Mapping[str, Callable[[], object]]
Times = Mapping[str, Sequence[float]]


class WrongAnswerError(SenteiError, RuntimeError):
    """An op that disagrees with the reference: its speed is not reported."""


@dataclass(frozen=True, slots=True)
class Row:
    """One op at one shape and density against one dense baseline of the same run."""

    op: str  # prefill, decode, block_mass, or score (scoring and selection alone)
    backend: str
    baseline: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    query_block: int
    dtype: str
    lists: str  # one list of blocks per query head, or one per KV group
    density: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    baseline_ms: float
    speedup: float
    share_of_ideal: float  # speed-up times density: 1 would be a cost that falls with the blocks
    floor_ms: float  # what the machine's own peak allows, from FLOPs and bytes
    with_scorer: bool = False
    pool_tokens: int | None = None
    extra_mib: float | None = None  # peak memory beyond inputs and outputs

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Options:
    """How long, and with which backend and pools."""

    runs: int = 3
    backend: str = "auto"
    pool_tokens: int = 64


OPS = ("prefill", "decode", "block_mass")


def run_op(
    op: str, shape: Shape, densities: Sequence[float], machine: Machine, options: Options
) -> list[Row]:
    """Time one op at one shape; the block mass reads everything and knows no density."""
    if op == "prefill":
        return bench_prefill(shape, densities, machine, options)
    if op == "decode":
        return bench_decode(shape, densities, machine, options)
    return bench_mass(shape, machine, options)


def bench_prefill(shape: Shape, densities: Sequence[float], machine: Machine, options: Options) -> list[Row]:
    """Time one prompt at each density, alone and with the scorer, beside every dense baseline."""
    check_prefill(shape, options.backend)
    tensors = make_tensors(shape)
    q, k, v = tensors
    masks = {density: make_mask(shape, density) for density in densities}
    scorers = {density: make_scorer(shape, q, k, density, options.pool_tokens) for density in densities}

    def alone(density: float) -> object:
        return attend(q, k, v, masks[density], backend=options.backend)

    def scored(density: float) -> object:
        return attend(q, k, v, scorers[density](q, k), backend=options.backend)

    works: dict[str, Callable[[], object]] = {name: _dense(tensors, name) for name in BASELINES}
    for density in densities:
        works[f"alone {density}"] = lambda density=density: alone(density)  # type: ignore[misc]
        works[f"scored {density}"] = lambda density=density: scored(density)  # type: ignore[misc]
    works["score"] = lambda: scorers[densities[0]](q, k)
    times = take_turns(works, options.runs)
    make = _RowMaker("prefill", shape, machine, options, times)
    rows = []
    for density in densities:
        kept = scorers[density](q, k)
        extra = peak_extra_mib(lambda density=density: scored(density), q.nbytes)  # type: ignore[misc]
        rows += make(f"alone {density}", masks[density])
        rows += make(f"scored {density}", kept, with_scorer=True, extra_mib=extra)
    return [*rows, *make("score", scorers[densities[0]](q, k), op="score", with_scorer=True)]


def bench_decode(shape: Shape, densities: Sequence[float], machine: Machine, options: Options) -> list[Row]:
    """Time one query token per sequence against selected blocks of a KV cache; SDPA reads all of it."""
    check_decode(shape, options.backend)
    tensors = make_tensors(shape, q_len=1)
    q, k, v = tensors
    masks = {density: make_mask(shape, density, q_len=1) for density in densities}
    offset = shape.tokens - 1
    works: dict[str, Callable[[], object]] = {
        "sdpa": lambda: dense_attend(q, k, v, q_offset=offset, backend="sdpa")
    }
    for density in densities:
        works[f"alone {density}"] = lambda mask=masks[density]: attend(  # type: ignore[misc]
            q, k, v, mask, backend=options.backend
        )
    times = take_turns(works, options.runs)
    make = _RowMaker("decode", shape, machine, options, times)
    return [row for density in densities for row in make(f"alone {density}", masks[density])]


def bench_mass(shape: Shape, machine: Machine, options: Options) -> list[Row]:
    """Time the block mass of all rows against one dense forward."""
    tensors = make_tensors(shape)
    q, k, _ = tensors
    works = {name: _dense(tensors, name) for name in BASELINES}
    works["mass"] = lambda: block_mass(q, k, scale=shape.head_dim**-0.5, block_k=shape.block)
    times = take_turns(works, options.runs)
    return _RowMaker("block_mass", shape, machine, options, times)("mass", BlockMask.causal(shape.tokens))


def check_prefill(shape: Shape, backend: str) -> None:
    """Compare the op with the reference on a short prompt of the same heads."""
    small = replace(shape, tokens=CHECK_TOKENS, batch=1)
    _compare(make_tensors(small), make_mask(small, 0.4), backend, small)


def check_decode(shape: Shape, backend: str) -> None:
    """Compare the op with the reference on a short KV cache of the same heads."""
    small = replace(shape, tokens=CHECK_TOKENS, batch=2)
    _compare(make_tensors(small, q_len=1), make_mask(small, 0.4, q_len=1), backend, small)


def take_turns(works: Works, runs: int) -> Times:
    """Run all works in turn, `runs` times after a warm-up round, and return the milliseconds of each."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for i_run in range(runs + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if i_run:
                spent[name].append(1e3 * (time.perf_counter() - started))
    return spent


def peak_extra_mib(work: Callable[[], object], output_bytes: int) -> float | None:
    """How far the process's memory rises above its level and the output while `work` runs; None off Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_kib("VmRSS")
    reset.write_text("5")  # forget the peak so far
    work()
    return max(0.0, (_status_kib("VmHWM") - before) / 1024 - output_bytes / 2**20)


@dataclass(frozen=True, slots=True)
class _RowMaker:
    op: str
    shape: Shape
    machine: Machine
    options: Options
    times: Times

    def __call__(
        self,
        name: str,
        mask: BlockMask,
        *,
        op: str | None = None,
        with_scorer: bool = False,
        extra_mib: float | None = None,
    ) -> list[Row]:
        op, shape, density = op or self.op, self.shape, float(mask.density())
        own = self.times[name]
        median = statistics.median(own)
        fifths = statistics.quantiles(own, n=5) if len(own) > 1 else [median] * 4
        rows_of_q = 1 if op == "decode" else shape.tokens
        request = Request("cpu", shape.dtype, rows_of_q, block_k=shape.block)
        backend = pick_backend(request, self.options.backend).backend.name
        rows = []
        for baseline in (name for name in BASELINES if name in self.times):
            dense = statistics.median(self.times[baseline])
            rows.append(
                Row(
                    op=op,
                    backend=backend,
                    baseline=baseline,
                    batch=shape.batch,
                    tokens=shape.tokens,
                    heads=shape.heads,
                    kv_heads=shape.kv_heads,
                    head_dim=shape.head_dim,
                    block=shape.block,
                    query_block=shape.block_q,
                    dtype=str(shape.dtype).removeprefix("torch."),
                    lists="group" if shape.shares_lists else "head",
                    density=density,
                    median_ms=median,
                    p20_ms=fifths[0],
                    p80_ms=fifths[3],
                    baseline_ms=dense,
                    speedup=dense / median,
                    share_of_ideal=density * dense / median,
                    floor_ms=self.machine.floor_ms(shape, mask, op),
                    with_scorer=with_scorer,
                    pool_tokens=self.options.pool_tokens if with_scorer else None,
                    extra_mib=extra_mib,
                )
            )
        return rows


def _dense(tensors: Tensors, backend: str) -> Callable[[], object]:
    return lambda: dense_attend(*tensors, backend=backend)


def _compare(tensors: Tensors, mask: BlockMask, backend: str, shape: Shape) -> None:
    got = attend(*tensors, mask, backend=backend)[0].float()
    q, k, v = (t.float() for t in tensors)
    exact = attend(q, k, v, mask, backend="reference")[0]
    error, allowed = float((got - exact).abs().max()), allowed_error(exact.to(shape.dtype), exact)
    if not error <= allowed:
        raise WrongAnswerError(
            f"{shape}: attend differs from the reference by {error:.2e}, over {allowed:.0e}; "
            "nothing is reported: run the tests of kernels/ops"
        )


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
