"""`sentei policy simulate`: the figures that a policy is judged by, the same on any number of cores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from sentei.pipeline.cli.app import app
from sentei.pipeline.cli.simulate import YARDSTICK
from sentei.pipeline.rollout.simulate import PART, Simulation, figures, simulate
from sentei.policies.schema.load import load_policy
from sentei.policies.simulation.scenarios import default_scenarios
from sentei.policies.simulation.study import NEVER, Tally, Traffic, exact_interval, median_of, run_scenario
from sentei.policies.simulation.world import Effect, Scenario

TEXT = YARDSTICK.read_text(encoding="utf-8")
POLICY = load_policy(TEXT, "yardstick.yaml")
ALPHA = POLICY.spec.guardrails.alpha_total
ROLLOUTS = 120


def run(scenario: str, sessions: int = 3000, per_hour: float = 3600) -> Tally:
    """One of the default scenarios, small enough for a test: more sessions between two ticks."""
    chosen = next(item for item in default_scenarios(POLICY) if item.name == scenario)
    traffic = Traffic(sessions_per_hour=per_hour, sessions=sessions)
    return run_scenario(POLICY, chosen, traffic, rollouts=ROLLOUTS, seed=np.random.SeedSequence(11))


def assert_at_most(hits: int, limit: float) -> None:
    """The share is not proven to be over the limit: its exact interval reaches down to it."""
    assert exact_interval(hits, ROLLOUTS)[0] <= limit


def test_dense_against_dense_is_not_rolled_back() -> None:
    """A/A over a whole rollout with 6 guardrails in 3 slices: false rollback at most alpha, most promoted."""
    tally = run("aa", sessions=9000)

    assert_at_most(sum(tally.false_alarm), ALPHA)
    assert sum(at != NEVER for at in tally.promoted_at) >= 0.8 * ROLLOUTS
    assert tally.naive["argo, failureLimit 0"][2] > 0.5 * ROLLOUTS
    assert tally.naive["flagger, threshold 10"][2] > 2 * ALPHA * ROLLOUTS


@pytest.mark.parametrize("gate", ["mass", "agree", "ttft_slo"])
def test_a_small_violation_is_not_promoted(gate: str) -> None:
    """At 1.25 times a bound at most 5 % are promoted, with each of the tests."""
    assert_at_most(sum(run(f"over:{gate}").false_pass), 0.05)


@pytest.mark.parametrize("scenario", ["bound", "bound:all"])
def test_correlated_requests_keep_the_errors(scenario: str) -> None:
    """At the bound, with correlation 0.5 inside sessions, both errors stay within alpha."""
    tally = run(scenario)

    assert_at_most(sum(tally.false_alarm), ALPHA)
    assert_at_most(sum(tally.false_pass), ALPHA)


@pytest.mark.parametrize("gate", ["mass", "agree"])
def test_twice_a_bound_is_found_within_sixty_sessions(gate: str) -> None:
    """Harm of twice a 5 % bound falls back within a median of 60 sessions of that slice."""
    tally = run(f"double:{gate}", sessions=600, per_hour=600)

    median = median_of(tally.caught_sessions)
    assert median is not None
    assert median <= 60


def test_a_late_regression_is_found_within_a_hundred() -> None:
    """After 2000 good units, twice the bound is found within 100; threshold rules had stopped looking."""
    tally = run("regression")

    median = median_of(tally.caught_units)
    assert median is not None
    assert median <= 100
    assert tally.naive["flagger, threshold 10"][1] > 0.3 * ROLLOUTS


def test_within_every_bound_nothing_falls_back() -> None:
    """At 0.8 of every bound thresholds abort nearly all, and the policy holds or goes on."""
    tally = run("near", sessions=2000)

    assert_at_most(sum(tally.false_alarm), ALPHA)
    assert tally.naive["argo, failureLimit 3"][2] > 0.9 * ROLLOUTS


def test_an_outage_and_missing_audits_are_no_harm() -> None:
    """Half an hour of silence, or 1 % of audits without a score, roll nothing back."""
    for scenario in ("outage", "missing"):
        assert_at_most(sum(run(scenario, sessions=2500).false_alarm), ALPHA)


def test_a_skewed_split_is_frozen() -> None:
    """Sessions at odds 1.65 times their share stop growth in nearly every rollout."""
    tally = run("skew")

    assert tally.outcome.count(1) >= 0.9 * ROLLOUTS


def test_the_same_seed_gives_the_same_figures_on_any_number_of_cores() -> None:
    """Rollouts fall into parts of one size, each with its own seed."""
    scenario = Scenario("harm", "", (Effect("mass", 2.0),))
    wanted = Simulation(TEXT, (scenario,), Traffic(3600, 400), rollouts=PART + 20, seed=4)
    heard: list[int] = []

    one = simulate(wanted, lambda step, done, total: heard.append(done))
    two = simulate(Simulation(TEXT, (scenario,), Traffic(3600, 400), rollouts=PART + 20, seed=4, workers=2))

    assert [row | {"seconds": 0} for row in one] == [row | {"seconds": 0} for row in two]
    assert (heard[0], heard[-1]) == (0, PART + 20)


def test_the_command_prints_one_row_per_scenario(tmp_path: Path) -> None:
    """`policy simulate --json` gives the keys that it is documented to give, with intervals."""
    arguments = ["--rollouts", "20", "--sessions", "300", "--scenario", "aa", "--scenario", "double:mass"]

    done = CliRunner().invoke(app, ["policy", "simulate", *arguments, "--workers", "1", "--json"])

    rows = json.loads(done.stdout)
    assert [row["scenario"] for row in rows] == ["aa", "double:mass"]
    keys = {"scenario", "rollouts", "false_rollback", "false_promotion", "units_to_rollback_p50"}
    for row in rows:
        assert keys | {"exposure_share", "seconds", "false_rollback_ci", "thresholds"} <= row.keys()
    assert rows[0]["units_to_rollback_p50"] is None
    assert 20 <= rows[1]["units_to_rollback_p50"] <= 60


def test_the_command_plays_a_world_of_ones_own() -> None:
    """Given effect sizes beside a shipped scenario; the harm is caught, and its row says what it was."""
    options = ["--effect", "mass=4@huge", "--begins-at", "50", "--correlation", "0.2", "--scenario", "aa"]
    size = ["--rollouts", "10", "--sessions", "600", "--workers", "1", "--json"]

    done = CliRunner().invoke(app, ["policy", "simulate", *options, *size])

    rows = json.loads(done.stdout)
    assert [row["scenario"] for row in rows] == ["aa", "own"]
    assert rows[0]["caught"] is None
    assert rows[1]["caught"] == 1.0
    assert "mass=4@huge; from session 50" in rows[1]["about"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scenario", "nothing"], 'no scenario "nothing"'),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--effect", "nobody=2", "--rollouts", "1", "--sessions", "10"], 'no guardrail "nobody"'),
    ],
)
def test_a_wrong_question_is_bad_input(arguments: list[str], words: str) -> None:
    """An unknown scenario or file is named."""
    done = CliRunner().invoke(app, ["policy", "simulate", *arguments])

    assert isinstance(done.exception, ValueError | OSError)
    assert words in str(done.exception)


@pytest.mark.parametrize(
    ("effect", "words"),
    [(Effect("nobody", 2.0), "nobody"), (Effect("mass", 2.0, "nowhere"), "nowhere")],
)
def test_an_effect_on_nothing_is_an_error(effect: Effect, words: str) -> None:
    """A misspelt guardrail or slice would be a world in which nothing is wrong."""
    with pytest.raises(ValueError, match=words):
        run_scenario(
            POLICY, Scenario("x", "", (effect,)), Traffic(), rollouts=1, seed=np.random.SeedSequence(0)
        )


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (3, 50), (50, 50), (999, 2000)])
def test_intervals_are_those_of_clopper_and_pearson(hits: int, trials: int) -> None:
    """The same as scipy's exact interval."""
    expected = binomtest(hits, trials).proportion_ci(0.95, method="exact")

    assert exact_interval(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_rollout_that_was_never_caught_counts_as_late() -> None:
    """The median is over all rollouts; if most were never caught there is none."""
    assert median_of([5, NEVER, 7]) == 7
    assert median_of([5, NEVER, NEVER]) is None
    assert median_of([]) is None


def test_figures_of_harm_say_how_many_were_caught() -> None:
    """Shares are of all rollouts; delays of those that were caught."""
    tally = Tally(rollouts=4, outcome=[3, 3, 0, 2], false_alarm=[False] * 4, false_pass=[False] * 4)
    tally.is_watch, tally.timed_out = [False] * 4, [False] * 4
    tally.caught_units, tally.caught_sessions, tally.promoted_at = [9, 11, 12, NEVER], [9] * 4, [NEVER] * 4

    row = figures(Scenario("h", "", (Effect("mass", 2.0),)), tally, 1.0)

    assert (row["caught"], row["rolled_back"], row["promoted"]) == (0.75, 0.5, 0.25)
    assert row["units_to_rollback_p50"] == 11
