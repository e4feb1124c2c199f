"""The statistics: how often each kind of evidence is wrong where the null is true, and what it rests on."""

from __future__ import annotations

import ast
import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sentei.policies import evidence
from sentei.policies.evidence import (
    RATIO_TILTS,
    SRM_TILTS,
    BetaBinomial,
    Betting,
    Detector,
    Interval,
    Split,
    log_threshold,
    paired_bound,
    paired_excess,
)
from sentei.policies.evidence.base import log_mean_exp_paths
from sentei.policies.evidence.counts import split_logs
from sentei.policies.schema.budget import harm_alpha
from sentei.policies.state import Cell, RolloutState, state_from_json, state_to_json
from tests.evidence_paths import betting_paths, detector_paths

FOLDER = Path(evidence.__file__).parent
KINDS = (Betting, BetaBinomial, Split, Detector, Interval)


def split_peaks(is_candidate: np.ndarray, null: np.ndarray, tilts: tuple[float, ...]) -> np.ndarray:
    """The largest log evidence that each stream of coins ever shows."""
    one = np.ones(is_candidate.shape)
    steps = split_logs(is_candidate.astype(float), one, np.broadcast_to(null, one.shape), tilts)
    return np.asarray(log_mean_exp_paths(np.cumsum(steps, axis=1)).max(axis=1))


@pytest.mark.parametrize("tilts", [RATIO_TILTS, tuple(-tilt for tilt in RATIO_TILTS)], ids=["harm", "safe"])
@pytest.mark.parametrize("ratio", [1.0, 1.25, 3.0])
def test_event_split_keeps_its_error_while_the_share_climbs(tilts: tuple[float, ...], ratio: float) -> None:
    """F6 at exactly the bound, over a ramp of 1-10-50-95 %: at most 5 % of streams ever reject."""
    share = np.repeat([0.01, 0.1, 0.5, 0.95], 150)
    null = share * ratio / (share * ratio + 1 - share)
    is_candidate = np.random.default_rng(21).random((1000, 600)) < null

    peaks = split_peaks(is_candidate, null, tilts)

    assert (peaks >= log_threshold(0.05)).mean() <= 0.05


def test_event_split_rejects_what_is_false_while_the_share_climbs() -> None:
    """F6: three times the allowed ratio is found in nearly every stream, and half of it proven safe."""
    share = np.repeat([0.1, 0.5, 0.9], 200)
    rng = np.random.default_rng(22)
    null = share * 1.25 / (share * 1.25 + 1 - share)

    for ratio, tilts in ((3.75, RATIO_TILTS), (0.625, tuple(-tilt for tilt in RATIO_TILTS))):
        true = share * ratio / (share * ratio + 1 - share)
        peaks = split_peaks(rng.random((300, 600)) < true, null, tilts)
        assert (peaks >= log_threshold(0.05)).mean() >= 0.95


def test_sample_ratio_keeps_its_error_over_thousands_of_ramps() -> None:
    """F7: over 3000 ramps of 1-5-25-50 % at alpha .001 the alarms are not proven to be more than that."""
    share = np.repeat([0.01, 0.05, 0.25, 0.5], 200)
    is_candidate = np.random.default_rng(23).random((3000, 800)) < share

    alarms = int((split_peaks(is_candidate, share, SRM_TILTS) >= log_threshold(0.001)).sum())

    assert alarms <= 3 + 3 * math.sqrt(3)


@pytest.mark.parametrize("cap", [1.0, 0.1])
@pytest.mark.parametrize("direction", ["harm", "safe"])
def test_paired_excess_keeps_its_error_at_the_bound(direction: str, cap: float) -> None:
    """F13 at an excess of exactly the bound, with and without a floor cap, in both directions."""
    rng = np.random.default_rng(24)
    floor = rng.beta(0.03 * 20, 0.97 * 20, (600, 1000))
    sparse = rng.beta(0.13 * 20, 0.87 * 20, (600, 1000))
    values = (sparse - np.minimum(floor, cap) + cap) / (1 + cap)
    excess = float((sparse - np.minimum(floor, cap)).mean())  # of 600,000 pairs: the true one for this test
    bound = paired_bound(0.10 if cap == 1.0 else excess, cap)

    log_e = betting_paths(values, bound=bound, direction=direction, alpha=0.05, cut=0.9)  # type: ignore[arg-type]

    assert (log_e.max(axis=1) >= log_threshold(0.05)).mean() <= 0.05
    assert values[0, 0] == pytest.approx(paired_excess(sparse[0, 0], floor[0, 0], cap))


@pytest.mark.parametrize("threshold", [20.0, 100.0])
@pytest.mark.parametrize("kind", ["beta", "bernoulli"])
def test_the_watch_is_silent_as_long_as_it_promises(threshold: float, kind: str) -> None:
    """F14 at the bound: the mean number of units before an alarm at A is at least A (here cut at 50 A)."""
    rng = np.random.default_rng(25)
    size = (300, int(50 * threshold))
    values = rng.beta(0.05 * 20, 0.95 * 20, size) if kind == "beta" else (rng.random(size) < 0.05) * 1.0

    hit = detector_paths(values, bound=0.05) >= math.log(threshold)
    length = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, size[1])

    assert length.mean() >= threshold


def test_the_watch_of_a_policy_is_silent_for_ten_thousand_units() -> None:
    """F14 at the bound with the default of 10,000: within 10,000 units few streams alarm (table: 2 %)."""
    values = np.random.default_rng(26).beta(0.05 * 20, 0.95 * 20, (100, 10_000))

    hit = detector_paths(values, bound=0.05) >= math.log(1e4)

    assert hit.any(axis=1).mean() <= 0.06


def states() -> list[Cell]:
    """One cell of each kind of evidence, with an awkward past."""
    values = [0.1, 1 / 3, 0.0, 1.0, 0.7]
    betting, safe = Betting(0.3, "harm", 0.05), Betting(0.3, "safe", 0.05, 0.9)
    watch, interval = Detector(0.3), Interval()
    harm, proof = BetaBinomial(0.3, "harm"), BetaBinomial(0.3, "safe")
    for value in values:
        betting, safe = betting.update(value), safe.update(value)
        watch, interval = watch.update(value), interval.update(value)
        harm, proof = harm.update(value > 0.5), proof.update(value > 0.5)
    split = Split.start(RATIO_TILTS).update(1, 3, 1 / 3)
    return [
        Cell("betting", "mid", "mild", betting, safe, watch, interval),
        Cell("counts", "mid", "mild", harm, proof, watch),
        Cell("split", "*", "", split, Split.start(SRM_TILTS).update(2, 7, 0.1)),
    ]


def test_every_kind_of_evidence_goes_on_after_a_restart_as_if_there_were_none() -> None:
    """Saved, loaded and fed on, each gives the bits that it gives without a restart."""
    state = RolloutState("r", "d", "running", "s", 0.0, 0.0, 0.0, cells=tuple(states()))

    again = state_from_json(state_to_json(state))

    assert again == state
    for old, new in zip(state.cells, again.cells, strict=True):
        for name in ("harm", "safe", "watch", "interval"):
            before, after = getattr(old, name), getattr(new, name)
            if before is None:
                continue
            more = (1, 2, 0.3) if isinstance(before, Split) else (1.0,)
            assert json.dumps(asdict(after.update(*more))) == json.dumps(asdict(before.update(*more)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_says_its_formula_its_source_and_what_it_guarantees(kind: type) -> None:
    """Whoever reads the class finds F1..F14, where it comes from, and what holds."""
    text = " ".join((kind.__doc__ or "").split())

    assert text.startswith("F")
    assert "Guarantee: " in text
    assert "Source: " in text or "arXiv" in text


def test_the_pairing_and_the_budget_say_the_same() -> None:
    """F13 and F10 are functions, and no less bound to say where they come from."""
    for function, formula in ((paired_excess, "F13"), (harm_alpha, "F10")):
        text = " ".join((function.__doc__ or "").split())
        assert formula in text
        assert "Guarantee: " in text


def test_evidence_needs_numpy_and_scipy_and_nothing_else() -> None:
    """Of all that is not the standard library; and no clock, no chance and no file of that."""
    allowed = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "numpy", "scipy"}
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {item.name.split(".")[0] for item in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                found.add(module if module.startswith("sentei.") else module.split(".")[0])

    assert {name for name in found if not name.startswith("sentei.policies.evidence")} <= allowed
    assert all("random" not in inspect.getsource(kind) for kind in KINDS)
