"""Measured seconds into money: what a million tokens cost on a rung, and when it has paid for itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sentei.kernels.hf.ladder import DENSE
from sentei.pipeline.evaluation.prices import Assumptions, Device, Price, PriceList
from sentei.pipeline.models import LoadedModel

AUDIT_DENSE_RUNS, AUDIT_SPARSE_RUNS = 2, 1  # how often an audited prompt is replayed


@dataclass(frozen=True, slots=True)
class Machine:
    """What the seconds were measured on."""

    device: Device
    cpus: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Prefill seconds per rung for a prompt of `tokens`, and the machine time that making the rungs took."""

    prefill_s: Mapping[str, float]
    tokens: int
    setup_s: float
    machine: Machine


@dataclass(frozen=True, slots=True)
class CostRow:
    """One rung on one machine; US dollars per million prompt tokens, one request at a time."""

    provider: str
    machine: str
    rung: str
    usd_per_million_tokens: float
    saved_usd_per_million_tokens: float  # before audits
    audit_usd_per_million_tokens: float
    setup_usd: float
    payback_million_tokens: float | None  # None: it never pays back
    payback_days: float | None
    is_same_size: bool  # False: another number of CPUs than measured on, so an estimate


@dataclass(frozen=True, slots=True)
class CostReport:
    """All rungs on all machines of the kind that was measured."""

    rows: tuple[CostRow, ...]
    assumptions: Assumptions
    machine: Machine
    setup_s: float
    files: tuple[str, ...]
    not_measured: tuple[str, ...]  # machines of another kind: run the evaluation there

    def usd_by_machine(self, rung: str) -> dict[str, float]:
        """Return a rung's US dollars per million prompt tokens for each machine."""
        return {
            f"{row.provider}: {row.machine}": row.usd_per_million_tokens
            for row in self.rows
            if row.rung == rung
        }


def this_machine(loaded: LoadedModel) -> Machine:
    """Return what the model runs on."""
    kind = loaded.device.type
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if kind == "cuda":
        return Machine("rocm" if torch.version.hip else "cuda", cpus)
    return Machine("cpu", cpus)


def reckon_costs(prices: PriceList, measured: Measured) -> CostReport:
    """Price every rung on every machine of the measured kind."""
    fitting = [price for price in prices.prices if price.device == measured.machine.device]
    return CostReport(
        rows=tuple(
            _row(price, rung, measured, prices.assumptions)
            for price in fitting
            for rung in measured.prefill_s
        ),
        assumptions=prices.assumptions,
        machine=measured.machine,
        setup_s=measured.setup_s,
        files=prices.files,
        not_measured=tuple(price.label for price in prices.prices if price not in fitting),
    )


def _row(price: Price, rung: str, measured: Measured, assumptions: Assumptions) -> CostRow:
    dense = price.usd_per_million_tokens(measured.prefill_s[DENSE], measured.tokens)
    own = price.usd_per_million_tokens(measured.prefill_s[rung], measured.tokens)
    is_dense = rung == DENSE
    audit = assumptions.audited_share * (AUDIT_DENSE_RUNS * dense + AUDIT_SPARSE_RUNS * own)
    audit = 0.0 if is_dense else audit
    setup = 0.0 if is_dense else price.usd_per_hour * measured.setup_s / 3600 + assumptions.one_off_usd
    net = dense - own - audit
    millions = setup / net if net > 0 and not is_dense else None
    return CostRow(
        provider=price.provider,
        machine=price.machine,
        rung=rung,
        usd_per_million_tokens=own,
        saved_usd_per_million_tokens=dense - own,
        audit_usd_per_million_tokens=audit,
        setup_usd=setup,
        payback_million_tokens=millions,
        payback_days=None if millions is None else millions * 1e6 / assumptions.tokens_per_day,
        is_same_size=price.cpus is None or price.cpus == measured.machine.cpus or price.device != "cpu",
    )
