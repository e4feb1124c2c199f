"""The benchmark checks before it reports, and says what it compared with."""

from __future__ import annotations

import pytest

from sentei.kernels.bench import run
from sentei.kernels.bench.cases import Case, make_mask
from sentei.kernels.bench.run import WrongAnswerError, run_case

# torch 2.13 imports modules of its own that it has deprecated, while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

CASE = Case(tokens=512, heads=4, kv_heads=1, head_dim=64, block=64, density=0.3)


def test_mask_keeps_sink_and_diagonal_and_never_looks_ahead() -> None:
    """A timed mask is a legal one."""
    mask = make_mask(CASE)

    mask.validate()
    assert 0.3 <= float(mask.density()) < 1.0


def test_rows_name_each_dense_alternative() -> None:
    """Each case is compared with SDPA and with compiled FlexAttention, and the ratio fits the times."""
    rows = run_case(CASE, runs=2)

    assert [row.baseline for row in rows] == ["sdpa", "flex"]
    assert all(row.speedup == pytest.approx(row.baseline_ms / row.median_ms) for row in rows)


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the answer is off the reference, there is an error and no figure."""
    right = run.attend
    monkeypatch.setattr(
        run,
        "attend",
        lambda *args, **kwargs: (right(*args, **kwargs)[0] + 0.1 * (not kwargs), None),
    )

    with pytest.raises(WrongAnswerError, match="nothing is reported"):
        run_case(CASE, runs=1)
