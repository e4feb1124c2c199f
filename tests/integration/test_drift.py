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


def test_window_of_broken_numbers_is_an_error() -> None:
    """NaN in a window comes out as an error of the real library."""
    signal = check_drift(SPEC, DriftWindow(1, (float("nan"),) * 20, (0.0, 0.1) * 10))

    assert signal.status == "error"
