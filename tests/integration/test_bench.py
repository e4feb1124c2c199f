"""The benchmark checks before it reports, and says what it compared with."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from sentei.kernels.bench import run
from sentei.kernels.bench.cases import Shape, make_mask, make_scorer, make_tensors
from sentei.kernels.bench.ledger import append_rows
from sentei.kernels.bench.machine import Machine, measure_machine
from sentei.kernels.bench.run import Options, WrongAnswerError, peak_extra_mib, run_op
from sentei.pipeline.reports.plots import save_speedups

# torch 2.13 imports modules of its own that it has deprecated, while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

SHAPE = Shape(tokens=1024)
MACHINE = Machine(
    device="test", threads=1, torch_version="0", gflops=100.0, bf16_gflops=400.0, gbytes_per_s=10.0
)
ONCE = Options(runs=2)


@pytest.mark.parametrize("q_len", [None, 1])
def test_mask_meets_its_density_and_never_looks_ahead(q_len: int | None) -> None:
    """A timed mask is a legal one, as dense as was asked for, forced blocks included."""
    mask = make_mask(SHAPE, 0.4, q_len=q_len)

    mask.validate()
    assert mask.density() == pytest.approx(0.4, abs=0.05)


def test_the_timed_scorer_meets_the_density() -> None:
    """Its threshold is set so that the real way from queries to lists keeps the wanted share."""
    q, k, _ = make_tensors(SHAPE)

    mask = make_scorer(SHAPE, q, k, 0.4, 16)(q, k)

    assert mask.validate().density() == pytest.approx(0.4, abs=0.05)


def test_rows_name_each_dense_alternative() -> None:
    """Alone, with the scorer, and the scorer by itself: each beside SDPA, compiled Flex and our own dense."""
    rows = run_op("prefill", SHAPE, (0.4,), MACHINE, ONCE)

    assert [(row.op, row.with_scorer, row.baseline) for row in rows] == [
        (op, with_scorer, baseline)
        for op, with_scorer in (("prefill", False), ("prefill", True), ("score", True))
        for baseline in ("sdpa", "flex", "native")
    ]
    assert all(row.speedup == pytest.approx(row.baseline_ms / row.median_ms) for row in rows)
    assert {row.backend for row in rows} == {"native"}


def test_decode_and_block_mass_have_rows() -> None:
    """The other ops are timed against a dense decode step and a dense forward."""
    decode = run_op("decode", Shape(tokens=1024, batch=2), (0.4,), MACHINE, ONCE)
    mass = run_op("block_mass", SHAPE, (), MACHINE, ONCE)

    assert [(row.op, row.baseline) for row in decode + mass] == [
        ("decode", "sdpa"),
        ("block_mass", "sdpa"),
        ("block_mass", "flex"),
        ("block_mass", "native"),
    ]


def test_bf16_is_held_to_its_own_error_and_its_own_floor() -> None:
    """In bf16 an op may be off by roundings, and the floor takes the faster of the two precisions."""
    shape = Shape(tokens=1024, dtype=torch.bfloat16)

    rows = run_op("prefill", shape, (0.4,), MACHINE, ONCE)

    assert {row.dtype for row in rows} == {"bfloat16"}
    mask = make_mask(shape, 0.4)
    assert MACHINE.floor_ms(shape, mask, "prefill") == pytest.approx(
        MACHINE.floor_ms(SHAPE, mask, "prefill") / 4
    )


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_a_wrong_op_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the answer is off the reference, there is an error and no figure."""
    right = run.attend

    def wrong(*args: object, backend: str) -> object:
        return right(*args, backend=backend)[0] + 0.1 * (backend != "reference"), None  # type: ignore[arg-type]

    monkeypatch.setattr(run, "attend", wrong)

    with pytest.raises(WrongAnswerError, match="nothing is reported"):
        run_op(op, SHAPE, (0.4,), MACHINE, ONCE)


def test_the_floor_is_what_flops_and_bytes_allow() -> None:
    """2 products of 2 FLOPs for every kept pair of tokens and dimension; decode is bound by its bytes."""
    mask = make_mask(SHAPE, 1.0)
    one = make_mask(SHAPE, 1.0, q_len=1)

    pairs = 4 * (16 * 17 / 2) * 64 * 64
    assert MACHINE.floor_ms(SHAPE, mask, "prefill") == pytest.approx(4 * 64 * pairs / 100e9 * 1e3)
    keys = 4 * 1024
    assert MACHINE.floor_ms(SHAPE, one, "decode") == pytest.approx((2 * keys + 2 * 4) * 64 * 4 / 10e9 * 1e3)


def test_extra_memory_is_the_peak_and_not_what_is_left() -> None:
    """A scratch tensor that is gone at the end still counts."""
    extra = peak_extra_mib(lambda: torch.ones(2**24).sum(), 0)

    assert extra is not None
    assert 60 <= extra <= 80


def test_ledger_and_plot_keep_what_was_measured(tmp_path: Path) -> None:
    """Each run adds lines; a ledger of other columns is put aside, not mixed."""
    rows = run_op("decode", Shape(tokens=512), (0.5,), measure_machine(), ONCE)
    path = tmp_path / "bench" / "kernels.csv"

    append_rows(path, rows, MACHINE)
    append_rows(path, rows, MACHINE)
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["op"] for line in lines] == ["decode", "decode"]
    assert lines[0]["device"] == "test"

    path.write_text("other,columns\n1,2\n")
    append_rows(path, rows, MACHINE)
    assert len(list(path.parent.glob("kernels*.csv"))) == 2
    assert "1\\u002fdensity" in save_speedups(rows, tmp_path / "plot.html").read_text()
