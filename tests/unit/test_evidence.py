"""The statistics: the tables of docs/statistics.md, streaming = batch, what each guarantees."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sentei.policies.evidence import (
    RATIO_TILTS,
    SRM_TILTS,
    BetaBinomial,
    Betting,
    Detector,
    Split,
    log_threshold,
    paired_bound,
    paired_excess,
    units_to_prove,
)
from tests.evidence_paths import betting_paths, detector_paths, update_all

BOUND = 0.05
REJECT = log_threshold(0.05)


def first_passage(log_e: np.ndarray, threshold: float = REJECT) -> np.ndarray:
    """The number of units until each stream rejects; the stream's length + 1 if it never does."""
    hit = log_e >= threshold
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, log_e.shape[1] + 1)


@pytest.mark.parametrize("direction", ["harm", "safe"])
@pytest.mark.parametrize("kind", ["bernoulli", "beta"])
def test_betting_keeps_its_error_when_looked_at_after_every_unit(direction: str, kind: str) -> None:
    """At the boundary, with 2000 looks, at most 5 % of streams reject (table: .025/.030 and .015/.003)."""
    rng = np.random.default_rng(7)
    shape = (1000, 2000)
    values = (
        (rng.random(shape) < BOUND).astype(float)
        if kind == "bernoulli"
        else rng.beta(0.5, 0.5 * (1 - BOUND) / BOUND, shape)
    )

    log_e = betting_paths(values, bound=BOUND, direction=direction, alpha=0.05)  # type: ignore[arg-type]

    assert (first_passage(log_e) <= 2000).mean() <= 0.05


@pytest.mark.parametrize(
    ("bound", "factor", "direction", "median", "p90"),
    [
        (0.02, 2.0, "harm", 81, 117),
        (0.05, 0.5, "safe", 230, 265),
        (0.05, 2.0, "harm", 27, 39),
        (0.10, 0.5, "safe", 110, 122),
        (0.10, 4.0, "harm", 4, 5),
    ],
)
def test_betting_needs_as_many_units_as_the_table_says(
    bound: float, factor: float, direction: str, median: int, p90: int
) -> None:
    """Median and 90th percentile of the units to a decision are those of the table, within a fifth."""
    mean = bound * factor
    values = np.random.default_rng(5).beta(mean * 20, (1 - mean) * 20, (400, 1000))

    units = first_passage(betting_paths(values, bound=bound, direction=direction, alpha=0.05))  # type: ignore[arg-type]

    assert np.median(units) == pytest.approx(median, rel=0.2, abs=1)
    assert np.quantile(units, 0.9) == pytest.approx(p90, rel=0.2, abs=1)


def test_paired_excess_proves_what_the_table_says() -> None:
    """A true excess of .015 under a bound of .03 with floor .03 is proven in about 243 triples at cut .9."""
    rng = np.random.default_rng(5)
    sparse, floor = (rng.beta(m * 20, (1 - m) * 20, (300, 2000)) for m in (0.045, 0.03))
    bound = paired_bound(0.03, 1.0)

    log_e = betting_paths((sparse - floor + 1) / 2, bound=bound, direction="safe", alpha=0.05, cut=0.9)

    assert np.median(first_passage(log_e)) == pytest.approx(243, rel=0.15)


def test_paired_excess_at_the_bound_is_rarely_called_safe() -> None:
    """With a floor cap, a true excess at the bound is still called safe in at most 5 % of streams."""
    rng = np.random.default_rng(6)
    sparse, floor = (rng.beta(m * 20, (1 - m) * 20, (500, 1500)) for m in (0.13, 0.03))
    values = (sparse - np.minimum(floor, 0.10) + 0.10) / 1.10

    log_e = betting_paths(values, bound=paired_bound(0.10, 0.10), direction="safe", alpha=0.05, cut=0.9)

    assert (first_passage(log_e) <= 1500).mean() <= 0.05


def test_a_change_after_a_good_past_is_seen_only_by_the_detector() -> None:
    """2000 good units, then twice the bound: e-CUSUM sees it within 100 units, the plain e-process never."""
    rng = np.random.default_rng(11)
    good, bad = rng.beta(0.4, 19.6, (200, 2000)), rng.beta(2.0, 18.0, (200, 1000))
    values = np.concatenate([good, bad], axis=1)

    plain = first_passage(betting_paths(values, bound=BOUND, direction="harm", alpha=0.05))
    watch = first_passage(detector_paths(values, bound=BOUND), math.log(1e4)) - 2000

    assert (plain > 3000).all()
    assert (watch > 0).all()
    assert np.median(watch) == pytest.approx(39, abs=6)
    assert np.quantile(watch, 0.99) <= 100


def test_session_means_keep_the_error_that_single_requests_break() -> None:
    """With correlation inside sessions, one value per session is valid, one per request is not."""
    rng = np.random.default_rng(3)
    rates = rng.beta(0.05, 0.95, (300, 150))
    requests = (rng.random((300, 150, 20)) < rates[:, :, None]).astype(float)

    per_request = betting_paths(requests.reshape(300, -1), bound=BOUND, direction="safe", alpha=0.05)
    per_session = betting_paths(requests.mean(axis=2), bound=BOUND, direction="safe", alpha=0.05)

    assert (first_passage(per_request) <= 3000).mean() > 0.3
    assert (first_passage(per_session) <= 150).mean() <= 0.05


@pytest.mark.parametrize("direction", ["harm", "safe"])
def test_beta_binomial_keeps_its_error(direction: str) -> None:
    """At p = p0 at most 5 % of streams ever reject (table: .022 to .033 for harm)."""
    rng = np.random.default_rng(9)
    rejected = 0
    for _ in range(120):
        evidence = update_all(BetaBinomial(BOUND, direction), rng.random(300) < BOUND)  # type: ignore[arg-type]
        rejected += evidence.log_e_max >= REJECT

    assert rejected / 120 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 120)


@pytest.mark.parametrize(("direction", "rate"), [("harm", 0.15), ("safe", 0.005)])
def test_beta_binomial_rejects_what_is_false(direction: str, rate: float) -> None:
    """Three times the bound is proven harmful, a tenth of it safe."""
    values = np.random.default_rng(1).random(400) < rate

    assert update_all(BetaBinomial(BOUND, direction), values).log_e_max >= REJECT  # type: ignore[arg-type]


def test_beta_binomial_stays_finite_far_from_its_bound() -> None:
    """Thousands of units on the wrong side underflow to a large negative number, not to NaN."""
    evidence = update_all(BetaBinomial(0.5, "harm"), [0.0] * 3000)

    assert math.isfinite(evidence.log_e)
    assert evidence.log_e < 0


def test_sample_ratio_test_is_silent_under_a_ramp_and_loud_under_a_tilt() -> None:
    """A share that climbs 1-5-25-50 % is no mismatch (at most .001); odds tilted by .5 are found."""
    rng = np.random.default_rng(3)
    shares = (0.01, 0.05, 0.25, 0.5)
    threshold = log_threshold(0.001)
    alarms = finds = 0
    for _ in range(100):
        fair, tilted = Split.start(SRM_TILTS), Split.start(SRM_TILTS)
        for share in shares:
            bad = share * math.exp(0.5) / (1 + share * math.expm1(0.5))
            for _ in range(20):
                fair = fair.update(int(rng.binomial(50, share)), 50, share)
                tilted = tilted.update(int(rng.binomial(50, bad)), 50, share)
        alarms += fair.log_e_max >= threshold
        finds += tilted.log_e_max >= threshold

    assert alarms <= 1
    assert finds >= 99


@pytest.mark.parametrize(("hits", "probability"), [(1, 0.0), (4, 1.0)])
def test_an_impossible_assignment_is_a_mismatch_at_once(hits: int, probability: float) -> None:
    """A candidate session at share 0, or a dense one at share 1, cannot be chance."""
    assert Split.start(SRM_TILTS).update(hits, 5, probability).log_e_max >= log_threshold(0.001)


def test_event_split_proves_a_higher_rate_without_denominators() -> None:
    """At three times the control's rate the events lean to the candidate; at the same rate they do not."""
    rng = np.random.default_rng(4)
    share, ratio = 0.5, 1.25
    null = share * ratio / (share * ratio + 1 - share)
    worse, same = Split.start(RATIO_TILTS), Split.start(RATIO_TILTS)
    for _ in range(300):
        worse = worse.update(int(rng.random() < 0.75), 1, null)
        same = same.update(int(rng.random() < 0.5), 1, null)

    assert worse.log_e_max >= REJECT
    assert same.log_e_max < REJECT


def test_streaming_equals_batch() -> None:
    """The states fed unit by unit give the vectorised paths, in both directions and for the detector."""
    values = np.random.default_rng(2).beta(1, 9, (1, 300))

    for direction in ("harm", "safe"):
        path = betting_paths(values, bound=0.1, direction=direction, alpha=0.01)
        state = update_all(Betting(0.1, direction, 0.01), values[0])
        assert state.log_e == pytest.approx(path[0, -1], abs=1e-9)
        assert state.log_e_max == pytest.approx(max(0.0, path.max()), abs=1e-9)
    watch = update_all(Detector(0.1), values[0])
    assert watch.log_e == pytest.approx(detector_paths(values, bound=0.1)[0, -1], abs=1e-9)


def test_the_watch_says_what_changed_and_since_when() -> None:
    """The run behind the peak begins near the change, whose mean it has; the good past is not in it."""
    watch = Detector(0.1)
    for second in range(400):
        watch = watch.update(0.05 if second < 380 else 0.4, float(second))

    assert watch.log_e_max > 3
    assert (watch.peak_run, watch.peak_begin_s) == (20, 380.0)
    assert watch.peak_mean == pytest.approx(0.4)


def test_what_was_rejected_stays_rejected() -> None:
    """The running maximum keeps a rejection through any number of later units."""
    state = update_all(Betting(0.1, "harm", 0.05), [0.9] * 10)
    proven = state.log_e_max

    state = update_all(state, [0.0] * 500)

    assert state.log_e < 0
    assert state.log_e_max == proven >= REJECT


def test_paired_excess_maps_its_ends_to_zero_and_one() -> None:
    """The largest excused floor gives 0, the worst value without a floor gives 1, the bound the bound."""
    assert paired_excess(0.0, 0.3, 0.1) == 0.0
    assert paired_excess(1.0, 0.0, 0.1) == 1.0
    assert paired_excess(0.12, 0.02, 0.1) == pytest.approx(paired_bound(0.1, 0.1))


def test_a_mean_needs_a_unit() -> None:
    """Before the first unit there is no mean, and zero is not one."""
    assert Betting(0.1, "harm", 0.05).mean is None
    assert BetaBinomial(0.1, "harm").mean is None
    assert Split.start(SRM_TILTS).mean is None


def test_units_to_prove_knows_what_cannot_be_proven() -> None:
    """The wrong side of a bound is never proven; the right side is, sooner the further away."""
    arguments = {"bound": 0.1, "alpha": 0.05, "cut": 0.9}

    assert units_to_prove(0.2, direction="safe", **arguments) is None  # type: ignore[arg-type]
    assert units_to_prove(0.1, direction="harm", **arguments) is None  # type: ignore[arg-type]
    near = units_to_prove(0.08, direction="safe", **arguments)  # type: ignore[arg-type]
    far = units_to_prove(0.01, direction="safe", **arguments)  # type: ignore[arg-type]
    assert near is not None
    assert far is not None
    assert far < near
