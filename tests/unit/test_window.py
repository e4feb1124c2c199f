"""Windows of a drift check: full, in order, per rung, and each against the right reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sentei.monitors.drift import DriftSpec, calibrate_threshold, check_drift
from sentei.monitors.store import Store
from sentei.monitors.window import DriftWindow, read_window
from tests.fakes_records import ROLLOUT, make_audit, make_request

SPEC = DriftSpec("kl_drift", "kl", 3, allowed_excess=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def window(store: Store, column: str, *, dense: bool = True) -> DriftWindow:
    """The newest window of three units."""
    return read_window(store, ROLLOUT, column, window_units=3, has_dense_reference=dense)


def test_window_counts_only_when_it_is_full(store: Store) -> None:
    """Five units of three make one window; the sixth makes the second."""
    for i in range(5):
        store.add_audit(make_audit(i, kl=float(i), kl_floor=0.5))
    assert window(store, "kl") == DriftWindow(1, (0.0, 1.0, 2.0), (0.5,) * 5)

    store.add_audit(make_audit(5, kl=5.0, kl_floor=None))

    assert window(store, "kl") == DriftWindow(2, (3.0, 4.0, 5.0), (0.5,) * 5)


def test_rungs_fill_windows_of_their_own(store: Store) -> None:
    """Units of two rungs are never mixed, and missing or repeated ones do not count."""
    for i in range(6):
        store.add_audit(make_audit(i, kl=float(i), rung_id="mild" if i % 2 else "bold"))
    store.add_audit(make_audit(6, status="missing", kl=None, rung_id="bold"))
    store.add_audit(make_audit(7, session_id="s0", kl=99.0, rung_id="bold"))

    assert window(store, "kl").current == (1.0, 3.0, 5.0)
    assert window(store, "kl").window_id == 2


def test_column_without_dense_twin_is_compared_with_its_first_windows(store: Store) -> None:
    """Two windows are the reference; the third is the first that is judged."""
    for i in range(8):
        store.add_audit(make_audit(i, dropped_mass_mean=float(i)))
    assert window(store, "dropped_mass_mean").window_id == 0

    store.add_audit(make_audit(8, dropped_mass_mean=8.0))

    assert window(store, "dropped_mass_mean") == DriftWindow(
        3, (6.0, 7.0, 8.0), (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    )
    assert window(store, "kl", dense=False).window_id == 3


def test_length_of_answers_is_compared_with_dense_sessions(store: Store) -> None:
    """Sparse-assigned sessions are the window, dense-assigned ones the reference."""
    for i in range(8):
        variant = "sparse" if i % 2 else "dense"
        store.add_request(make_request(i, variant_assigned=variant, completion_tokens=i))

    assert window(store, "completion_tokens") == DriftWindow(1, (1.0, 3.0, 5.0), (0.0, 2.0, 4.0, 6.0))


def test_too_little_is_no_data_and_never_clear() -> None:
    """No full window, or no reference to speak of, is no data."""
    empty = check_drift(SPEC, DriftWindow(0))
    lonely = check_drift(SPEC, DriftWindow(1, (1.0, 2.0, 3.0), (0.0,) * 4))

    assert (empty.status, lonely.status) == ("no_data", "no_data")
    assert lonely.detail == "3 current and 4 reference units"


def test_threshold_is_the_allowed_excess_over_a_silent_reference() -> None:
    """Dense that repeats itself exactly has no spread: the threshold is the excess on the least scale."""

    silent = np.zeros(50)

    assert calibrate_threshold(silent, silent[:10], allowed_excess=0.02) == pytest.approx(20.0)
    assert calibrate_threshold(silent, silent[:10], allowed_excess=0.0) == 0.0
