"""Times sparse attention against every dense alternative, taking turns, after checking that it is right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sentei.kernels.bench.cases import Case, make_mask, make_tensors
from sentei.kernels.ops.attention import attend, dense_attend
from sentei.kernels.ops.block_mask import BlockMask

BASELINES = ("sdpa", "flex")
CHECK_TOKENS = 512
MAX_ERROR = 1e-4  # fp32 against the fp32 reference; a rounding of sums is near 1e-6


class WrongAnswerError(RuntimeError):
    """An op that disagrees with the reference: its speed is not reported."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case against one baseline; attention alone, without the scorer."""

    op: str
    backend: str
    baseline: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    density: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    baseline_ms: float
    speedup: float
    share_of_ideal: float  # speed-up times density: 1 would be a cost that falls with the blocks
    with_scorer: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def check_case(case: Case) -> None:
    """Compare the op with the reference on a short prompt of the same heads."""
    small = Case(CHECK_TOKENS, case.heads, case.kv_heads, case.head_dim, case.block, case.density)
    q, k, v = make_tensors(small)
    mask = make_mask(small)
    error = float((attend(q, k, v, mask)[0] - attend(q, k, v, mask, backend="reference")[0]).abs().max())
    if not error <= MAX_ERROR:
        raise WrongAnswerError(
            f"{small}: attend differs from the reference by {error:.2e}, over {MAX_ERROR:.0e}; "
            "nothing is reported: run the tests of kernels/ops"
        )


def run_case(case: Case, *, runs: int) -> list[Row]:
    """Time one case; the first round warms up and is not counted."""
    check_case(case)
    q, k, v = make_tensors(case)
    mask = make_mask(case)
    works: dict[str, Callable[[], object]] = {"sparse": lambda: attend(q, k, v, mask)}
    works |= {name: _dense_work(q, k, v, name) for name in BASELINES}
    spent: dict[str, list[float]] = {name: [] for name in works}
    for i_run in range(runs + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if i_run:
                spent[name].append(1e3 * (time.perf_counter() - started))
    return [_make_row(case, mask, name, spent) for name in BASELINES]


def _dense_work(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> Callable[[], object]:
    return lambda: dense_attend(q, k, v, backend=backend)


def _make_row(case: Case, mask: BlockMask, baseline: str, spent: dict[str, list[float]]) -> Row:
    sparse = spent["sparse"]
    median, dense = statistics.median(sparse), statistics.median(spent[baseline])
    fifths = statistics.quantiles(sparse, n=5) if len(sparse) > 1 else [median] * 4
    density = float(mask.density())
    return Row(
        op="prefill",
        backend="auto",
        baseline=baseline,
        tokens=case.tokens,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        block=case.block,
        density=density,
        median_ms=median,
        p20_ms=fifths[0],
        p80_ms=fifths[3],
        baseline_ms=dense,
        speedup=dense / median,
        share_of_ideal=density * dense / median,
    )
