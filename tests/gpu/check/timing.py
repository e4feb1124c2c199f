"""Times on the device's own clock, several works in turn; what a work allocates; the dense alternatives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.flex import to_flex_lists

from .plan import Line, first_line
from .worker import Bench

Work = Callable[[], object]
# Cycles that a device spins before a timed work, so that the host's own launching is not what is measured.
_SPIN = 2_000_000
_ROUNDS = (3, 30)
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_FLEX_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each work by round, and why others could not run."""

    spent: dict[str, list[float]]
    reasons: dict[str, str]

    def median(self, name: str) -> float:
        """The median of one work; an error with the reason where it could not run."""
        if name not in self.spent:
            raise RuntimeError(f"{name} did not run: {self.reasons.get(name)}")
        return statistics.median(self.spent[name])

    def line(self, name: str, **more: object) -> Line:
        """A line with median and quintiles, or the reason; `more` are other fields of the line."""
        if name not in self.spent:
            return Line(name, note=self.reasons.get(name, "not run"))
        spent = self.spent[name]
        fifths = statistics.quantiles(spent, n=5) if len(spent) > 1 else spent * 4
        line = Line(name, statistics.median(spent), fifths[0], fifths[3])
        return replace(line, **more)  # type: ignore[arg-type]


def take_turns(bench: Bench, works: Mapping[str, Work], *, rounds_max: int = _ROUNDS[1]) -> Times:
    """Warm each work up, then run all in turn, as many rounds as this row's seconds allow, three at least."""
    reasons: dict[str, str] = {}
    cost: dict[str, float] = {}
    for name, work in works.items():
        try:
            if not bench.sizes.is_tiny:  # which claims no figure, and is slow enough with one call
                work()
            cost[name] = _once(bench, work)
        except Exception as error:
            reasons[name] = first_line(error)
            if bench.is_cuda:
                torch.cuda.synchronize()  # raises where the device is lost: then the row fails
    if bench.sizes.is_tiny:
        return Times({name: [ms] for name, ms in cost.items()}, reasons)
    wanted = int(1e3 * bench.sizes.seconds / max(1e-3, sum(cost.values())))
    rounds = min(rounds_max, max(_ROUNDS[0], wanted))
    spent: dict[str, list[float]] = {name: [] for name in cost}
    for _ in range(rounds):
        for name in cost:
            spent[name].append(_once(bench, works[name]))
    return Times(spent, reasons)


def _once(bench: Bench, work: Work) -> float:
    if not bench.is_cuda:
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SPIN)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def extra_mib(bench: Bench, work: Work) -> float | None:
    """How far torch.cuda.max_memory_allocated rises over what is held; None where it is not counted."""
    if not bench.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def from_idle(bench: Bench, work: Work) -> Work:
    """The work on a device that has nothing to do yet, so that the host's launching counts, too."""
    if not bench.is_cuda:
        return work

    def run() -> object:
        torch.cuda.synchronize()
        return work()

    return run


def replayed(bench: Bench, work: Work) -> Work:
    """The work as a CUDA graph, so that only the device's time is left; the work itself on a CPU."""
    if not bench.is_cuda:
        return work
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def sdpa_works(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Work]:
    """Causal attention of a whole prompt by each fused backend of SDPA."""
    return {f"sdpa {name}": _sdpa(q, k, v, name, is_causal=True) for name in _BACKENDS}


def sdpa_work(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Work:
    """The same by one backend of these names, without the word sdpa before it."""
    return _sdpa(q, k, v, backend, is_causal=True)


def step_works(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Work]:
    """One new token per sequence: as it is, and with a group's query heads as rows: keys are read once."""
    batch, heads, _, dim = q.shape
    folded = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    works: dict[str, Work] = {}
    for name in _BACKENDS:
        works[f"sdpa {name}"] = _sdpa(q, k, v, name, is_causal=False)
        works[f"sdpa {name}, folded"] = _sdpa(folded, k, v, name, is_causal=False)
    return works


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str, *, is_causal: bool) -> Work:
    is_grouped = q.shape[1] != k.shape[1]

    def run() -> object:
        with torch.no_grad(), sdpa_kernel(_BACKENDS[backend]):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=is_grouped)

    def run_repeated() -> object:
        group = q.shape[1] // k.shape[1]
        with torch.no_grad(), sdpa_kernel(_BACKENDS[backend]):
            return scaled_dot_product_attention(
                q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=is_causal
            )

    # This backend takes no grouped heads: its keys are repeated, which is what a caller would have to do.
    return run_repeated if is_grouped and backend == "efficient" else run


def flex_work(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> Work:
    """Compiled causal FlexAttention; in the tiny run its graph is traced and run without the compiler."""
    tokens = q.shape[2]
    lists = to_flex_lists(
        BlockMask.causal(tokens, block_q=_FLEX_BLOCK, block_k=_FLEX_BLOCK, device=bench.device)
    )
    mask = FlexMask.from_kv_blocks(
        lists.partial_counts[:, :, : -(-tokens // _FLEX_BLOCK)],
        lists.partial_indices[:, :, : -(-tokens // _FLEX_BLOCK), : -(-tokens // _FLEX_BLOCK)],
        lists.full_counts[:, :, : -(-tokens // _FLEX_BLOCK)],
        lists.full_indices[:, :, : -(-tokens // _FLEX_BLOCK), : -(-tokens // _FLEX_BLOCK)],
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=_is_causal,
        seq_lengths=(tokens, tokens),
    )
    backend = "eager" if bench.sizes.is_tiny else "inductor"
    program: Callable[..., object] = torch.compile(flex_attention, dynamic=False, backend=backend)

    def run() -> object:
        with torch.no_grad():
            return program(q, k, v, block_mask=mask, enable_gqa=True)

    return run


def _is_causal(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return key <= row
