"""Drift with the real Evidently: the exact window of the first report, silence before, errors stay errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sentei.monitors import drift
from sentei.monitors.drift import DriftSpec, check_drift, distance, run_drift
from sentei.monitors.store import Store
from sentei.monitors.window import DriftWindow
from tests.fakes_records import ROLLOUT, make_audit

SPEC = DriftSpec("kl_drift", "kl", window_units=20, allowed_excess=0.02)
CHANGE_AT = 130  # the seventh window of 20 holds the first bad units: it is half bad
BAD_EXCESS = 0.1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def stream(num_units: int, *, changes_at: int | None) -> Iterator[tuple[float, float]]:
    """Seeded (kl, floor) pairs: half of the allowed excess until the change, five times of it after."""
    generator = np.random.default_rng(11)
    for i in range(num_units):
        floor = float(generator.gamma(2.0, 0.002))
        excess = BAD_EXCESS if changes_at is not None and i >= changes_at else 0.01
        yield float(generator.gamma(2.0, 0.002)) + excess, floor


def run_stream(store: Store, folder: Path, changes_at: int | None) -> list[tuple[int, str]]:
    """Check after every unit, as often as the controller may."""
    found: list[tuple[int, str]] = []
    for i, (kl, floor) in enumerate(stream(200, changes_at=changes_at)):
        store.add_audit(make_audit(i, kl=kl, kl_floor=floor))
        if i % 5 == 4:
            found += [
                (r.window_id, r.status) for r in run_drift(store, ROLLOUT, [SPEC], folder=folder, now_s=i)
            ]
    return found


def test_drift_is_first_reported_in_the_window_where_it_begins(store: Store, tmp_path: Path) -> None:
    """Six windows are clear, the seventh and all after it report drift; each is judged once."""
    found = run_stream(store, tmp_path, CHANGE_AT)

    assert found == [(i, "clear") for i in range(1, 7)] + [(i, "drift") for i in range(7, 11)]


def test_candidate_within_its_bound_never_drifts(store: Store, tmp_path: Path) -> None:
    """Half of the allowed excess over dense noise is silent for ten windows."""
    assert run_stream(store, tmp_path, None) == [(i, "clear") for i in range(1, 11)]


def test_an_excess_within_the_bound_is_no_drift_however_it_is_spread() -> None:
    """A quarter of the answers differ, the others not at all: an allowed mean, and three times of it."""
    spread, silent = np.array([0.06, 0.0, 0.0, 0.0] * 5), (1e-5, 2e-5) * 20

    within = check_drift(SPEC, DriftWindow(1, tuple(spread), silent))
    beyond = check_drift(SPEC, DriftWindow(1, tuple(3 * spread), silent))

    assert (within.status, beyond.status) == ("clear", "drift")


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    """The saved page carries its own scripts."""
    path = tmp_path / "kl.html"

    check_drift(SPEC, DriftWindow(1, (0.1,) * 20, (0.0, 0.01) * 20), html_path=path)

    text = path.read_text()
    assert "<html" in text
    assert 'src="http' not in text


def test_the_page_says_what_the_signal_says(tmp_path: Path) -> None:
    """Within the excess that the policy allows, Evidently's page cries no drift by its own threshold."""
    path, spec = tmp_path / "kl.html", DriftSpec("kl", "kl", 20, allowed_excess=0.5)

    signal = check_drift(spec, DriftWindow(1, (0.1, 0.2) * 10, (0.0, 0.1) * 20), html_path=path)

    assert signal.status == "clear"
    assert "Data drift not detected" in path.read_text()


def test_our_distance_is_evidentlys() -> None:
    """The threshold is calibrated with our own formula, so it must be the one that Evidently computes."""
    generator = np.random.default_rng(3)
    for scale in (0.0, 1e-5, 0.01, 3.0):
        reference, current = generator.gamma(2, scale, 90), generator.gamma(2, scale, 30) + 0.004
        theirs = drift._evidently_score("kl", current, reference, threshold=1.0, html_path=None)
        assert distance(reference, current) == pytest.approx(theirs, rel=1e-9)


def test_better_than_dense_is_no_drift() -> None:
    """A quality column that moved the good way is clear; the length of answers may move neither way."""
    window = DriftWindow(1, (0.0,) * 20, (5.0, 5.1, 4.9) * 10)

    assert check_drift(SPEC, window).status == "clear"
    assert check_drift(DriftSpec("length", "completion_tokens", 20), window).status == "drift"


def test_whatever_evidently_raises_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot be made is an error with its reason, never clear."""

    def refuse(*_: object, **__: object) -> float:
        raise KeyError("column")

    monkeypatch.setattr(drift, "_evidently_score", refuse)

    signal = check_drift(SPEC, DriftWindow(1, (0.1,) * 20, (0.0,) * 20))

    assert (signal.status, signal.detail) == ("error", "KeyError: 'column'")


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_broken", [1, 20])
def test_window_of_broken_numbers_is_an_error(broken: float, num_broken: int) -> None:
    """One value that is no number makes the check an error, never clear: in the window or its reference."""
    values = (broken,) * num_broken + (0.0,) * (20 - num_broken)

    for window in (DriftWindow(1, values, (0.0, 0.1) * 10), DriftWindow(1, (0.0, 0.1) * 10, values)):
        signal = check_drift(SPEC, window)
        assert signal.status == "error"
        assert f"{num_broken} of" in signal.detail


def test_a_score_that_was_no_number_is_in_its_window(store: Store, tmp_path: Path) -> None:
    """A database keeps NaN as nothing; the window does not close over it as if it had not come."""
    for i in range(20):
        store.add_audit(make_audit(i, kl=float("nan") if i == 7 else 0.002, kl_floor=0.001))

    (result,) = run_drift(store, ROLLOUT, [SPEC], folder=tmp_path, now_s=1.0)

    assert (result.status, result.window_id) == ("error", 1)
    assert result.detail.startswith("1 of the window's")


def near_constant(generator: np.random.Generator, num_units: int) -> drift.Floats:
    """Nearly always nothing, now and then a few of 64 tokens: a healthy rung's disagreement."""
    few = generator.integers(1, 6, num_units) / 64
    return np.where(generator.random(num_units) < 0.02, few, 0.0)


def test_near_constant_columns_raise_no_false_alarm() -> None:
    """Where nothing differs at most 1 window in 500 is drift; resampling the reference gave 9 to 14 %."""
    generator, alarms = np.random.default_rng(5), 0
    for seed in range(300):
        reference, current = near_constant(generator, 60), near_constant(generator, 30)
        threshold = drift.calibrate_threshold(reference, current, 0.0, seed=seed)
        alarms += distance(reference, current) > threshold * (1 + 1e-9)

    assert alarms <= 3  # more have a chance of 1 in 300 at the promised rate


def test_shuffles_measure_what_the_distance_measures() -> None:
    """All rows at once give the distance of each row."""
    generator = np.random.default_rng(4)
    pooled, in_window = generator.gamma(2, 0.01, 50), np.zeros((6, 50), dtype=np.bool_)
    for row in in_window:
        row[generator.choice(50, 20, replace=False)] = True

    found = drift._distances(pooled, in_window, 0.02)

    assert found == pytest.approx([distance(pooled[~row], pooled[row] + 0.02) for row in in_window])
