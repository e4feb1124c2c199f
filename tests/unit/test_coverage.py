"""A policy against the ladder that it is meant for: no slice longer than what a rung was verified at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sentei.kernels.hf.adapter import new_adapter, read_ladder, save_adapter
from sentei.kernels.hf.models import AdapterError
from sentei.pipeline.cli.app import app
from sentei.pipeline.cli.output import ExitCode
from sentei.policies.review.coverage import find_uncovered
from sentei.policies.schema.load import find_line, load_policy
from tests.fakes_models import make_llama
from tests.strategies_policy import EXAMPLES, TWO_SLICES, make_policy, put
from tests.trial_ladders import uncalibrated_ladder

BOTH_ENOUGH = {"mild": 399, "medium": 399}
RANGE = "spec.slices.buckets[2].range"  # of the slice `long`, 200 to 399 tokens


@pytest.mark.parametrize(
    ("lengths", "is_covered"),
    [
        (BOTH_ENOUGH, True),  # a range ends before its second number
        (BOTH_ENOUGH | {"medium": 398}, False),
        (BOTH_ENOUGH | {"mild": 398}, False),
        (BOTH_ENOUGH | {"bold": 10}, True),  # a rung that the policy does not have
        (BOTH_ENOUGH | {"medium": None}, False),
    ],
)
def test_a_slice_is_covered_up_to_its_longest_prompt_at_every_rung(
    lengths: dict[str, int | None], is_covered: bool
) -> None:
    """The one rung that was verified at too short a length, or at none, is enough to be refused."""
    assert (find_uncovered(make_policy(), lengths) == ()) is is_covered


def test_a_refusal_names_slice_range_rung_length_and_the_way_out() -> None:
    """In one sentence each, at the place in the policy that must change."""
    policy = make_policy()

    (long,) = find_uncovered(policy, {"mild": 399, "medium": 256})
    both = find_uncovered(policy, {"mild": 150, "medium": 150})
    (unnamed,) = find_uncovered(policy, {"mild": None, "medium": None})[1:]

    assert (long.path, long.value) == (("slices", "buckets", 2, "range"), [200, 400])
    assert long.message == (
        'slice "long" takes prompts of 200 to 399 tokens, but rung "medium" was verified up to 256, '
        "and runs dense beyond; end the slice at 257 and pin what is longer (pin: control), or "
        "calibrate on longer text (sentei calibrate --tokens 399)"
    )
    assert [item.path[2] for item in both] == [1, 2]
    assert "pin the slice (pin: control), or calibrate on longer text" in both[1].message
    assert "names no length that it was verified at; calibrate again" in unnamed.message


def test_a_rung_that_the_ladder_lacks_is_refused() -> None:
    """By the names that there are."""
    (missing,) = find_uncovered(make_policy(), {"mild": 399, "bold": 399})

    assert (missing.path, missing.value) == (("ladder", 1, "id"), "medium")
    assert missing.message == "is no rung of the adapter; it has mild, bold"


def test_pinned_slices_and_rungs_out_of_reach_are_not_looked_at() -> None:
    """What stays dense may be of any length, and a slice's own limit keeps bolder rungs away from it."""
    pinned = make_policy(put("slices.buckets.2.pin", "control"))
    limited = make_policy(put("slices.buckets.2.max_rung", "mild"))

    assert find_uncovered(pinned, {"mild": 199, "medium": 199}) == ()
    assert find_uncovered(limited, {"mild": 399, "medium": 199}) == ()


def test_a_rung_that_a_fall_leads_to_must_cover_the_slice_too() -> None:
    """`cost-first` begins at the middle rung: a breach leads to the mild one, unless the slice goes dense."""
    text = (EXAMPLES / "cost-first.yaml").read_text(encoding="utf-8")
    lengths = {"mild": 8192, "medium": 131_071, "bold": 131_071}

    falls = find_uncovered(load_policy(text), lengths)
    stays = find_uncovered(load_policy(text.replace("previous_rung", "rollback_slice")), lengths)

    assert [(item.path[2], 'rung "mild"' in item.message) for item in falls] == [(1, True), (2, True)]
    assert stays == ()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed adapter whose rungs `mild` and `medium` were verified up to 256 tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    bare = new_adapter(make_llama(), "tiny", rank=4)
    ladder = uncalibrated_ladder(bare, {"mild": 0.01, "medium": 0.1})
    rungs = tuple(rung if rung.is_dense else replace(rung, verified_tokens=256) for rung in ladder.rungs)
    save_adapter(bare.with_ladder(replace(ladder, rungs=rungs)), folder)
    return folder


def test_the_ladder_is_read_without_a_model_and_only_as_it_was_sealed(adapter: Path, tmp_path: Path) -> None:
    """What lint and register look at is what would be served."""
    assert [rung.verified_tokens for rung in read_ladder(adapter).rungs] == [None, 256, 256]

    (tmp_path / "manifest.json").write_bytes((adapter / "manifest.json").read_bytes())
    (tmp_path / "ladder.json").write_text('{"rungs": []}')
    with pytest.raises(AdapterError, match="is not the file that was sealed"):
        read_ladder(tmp_path)


def test_lint_refuses_a_slice_that_the_adapter_does_not_cover(adapter: Path, tmp_path: Path) -> None:
    """With file, line, path and value, exit code 2; the policy alone is fine, and so is a shorter slice."""
    policy, fitting = tmp_path / "policy.yaml", tmp_path / "fitting.yaml"
    policy.write_text(TWO_SLICES, encoding="utf-8")
    short = TWO_SLICES.replace(
        "range: [200, 400]}", "range: [200, 257]}\n      - {id: far, range: [257, 400], pin: control}"
    )
    fitting.write_text(short, encoding="utf-8")

    def lint(file: Path, *options: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["policy", "lint", str(file), "--json", *options])
        return done.exit_code, json.loads(done.stdout)

    code, found = lint(policy, "--adapter", str(adapter))

    assert (code, found["ok"]) == (ExitCode.BAD_INPUT, False)
    (error,) = found["errors"]
    line = find_line(TWO_SLICES, ("spec", "slices", "buckets", 2, "range"))
    assert (error["file"], error["line"], error["path"]) == (str(policy), line, RANGE)
    assert (error["value"], "verified up to 256" in error["message"]) == ([200, 400], True)
    assert lint(policy)[0] == ExitCode.OK
    assert lint(fitting, "--adapter", str(adapter))[0] == ExitCode.OK


def test_register_refuses_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy whose slice is not covered: the fault, and no MLflow database."""
    monkeypatch.setenv("SENTEI_HOME", str(tmp_path / "home"))
    policy = tmp_path / "policy.yaml"
    policy.write_text(TWO_SLICES, encoding="utf-8")

    done = CliRunner().invoke(app, ["register", "--adapter", str(adapter), "--policy", str(policy)])

    assert done.exit_code != ExitCode.OK
    assert 'slice "long" takes prompts of 200 to 399 tokens' in str(done.exception)
    assert not list((tmp_path / "home").rglob("mlflow.db"))
