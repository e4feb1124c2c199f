"""Distill, calibrate and evaluate on the shipped pocket model, small: the steps fit and learning helps."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import load_adapter
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.evaluation.evaluate import EvaluateOptions, Evaluation, evaluate, evaluate_recall
from sentei.pipeline.ladder.calibrate import CalibrateOptions, calibrate
from sentei.pipeline.ladder.distill import DistillOptions, distill
from sentei.pipeline.ladder.targets import RungTarget, density_targets
from sentei.pipeline.ladder.verify import VerifyOptions
from sentei.pipeline.measure.baselines import KINDS
from sentei.pipeline.measure.choices import explain_prompt
from sentei.pipeline.measure.latency import time_prefills
from sentei.pipeline.models import resolve_model
from sentei.pipeline.reports.evaluation_page import render_evaluation
from sentei.pipeline.reports.plots import save_trade_off
from sentei.pipeline.steps import evaluation_metrics
from sentei.pipeline.text.corpus import load_corpus
from sentei.pipeline.tracking.comparison import (
    DENSITY,
    MEMORY,
    MODEL_TIME_RATIO,
    MONEY,
    PPL_COST,
    RECALL,
    describe_evaluation,
    describe_rung,
    rung_figures,
)

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"), pytest.mark.timeout(900)]

RUNG_KEYS = {
    "rung",
    "density",
    "nll_delta",
    "nll_delta_ci",
    "ppl_cost_pct",
    "dropped_mass_mean",
    "dropped_mass_p99",
    "prefill_s",
    "prefill_s_by_baseline",
    "peak_mib",
    "tasks",
    "kl_mean",
    "top1_agreement",
    "recall",
    "user_tasks",
}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Evaluation, Path, list[str]]:
    """Run the three steps once, on windows of 2048 tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    loaded, corpus = resolve_model("pocket"), load_corpus()
    seen: list[str] = []

    def note(label: str, _done: int, _total: int) -> None:
        seen.append(label)

    small = DistillOptions(
        window_tokens=2048, num_windows=6, num_held_out=3, blocks_per_window=8, max_epochs=4, query_pool=1
    )
    adapter = distill(loaded, corpus, folder, small, note)
    verify = VerifyOptions(window_tokens=2048, num_windows=1, blocks_per_window=12)
    options = CalibrateOptions(window_tokens=2048, num_windows=3, blocks_per_window=16, verify=verify)
    ladder = calibrate(loaded, adapter, corpus, options, note)
    tasks = tmp_path_factory.mktemp("tasks") / "mine.jsonl"
    tasks.write_text('{"prompt": "import os\\nimport", "reference": "sys", "metric": "contains"}\n')
    tiny = EvaluateOptions(window_tokens=2048, num_windows=1, num_tasks=1, timed_runs=1, user_tasks=tasks)
    evaluation = evaluate(loaded, adapter.with_ladder(ladder), corpus, tiny, note)
    return load_adapter(folder, loaded.model), evaluation, folder, seen


def test_training_beats_the_untrained_score_on_held_out_text(story: Any) -> None:
    """The held-out KL of every layer falls below that of means of 4."""
    figures = story[0].manifest.figures

    for layer in story[0].scorers:
        assert figures[f"layer_{layer}_kl_held_out"] < 0.8 * figures[f"layer_{layer}_kl_untrained"]


def test_the_saved_ladder_is_ordered_and_verified(story: Any) -> None:
    """Three rungs, verified; thresholds and dropped mass never fall from mild to bold."""
    rungs = [rung for rung in story[0].ladder.rungs if not rung.is_dense]

    assert [rung.id for rung in rungs] == ["mild", "medium", "bold"]
    for milder, bolder in itertools.pairwise(rungs):
        for layer, groups in milder.thresholds.items():
            for low, high in zip(groups, bolder.thresholds[layer], strict=True):
                assert all(a <= b for a, b in zip(low, high, strict=True))
        assert milder.verified.dropped_mass_mean <= bolder.verified.dropped_mass_mean
        assert milder.verified.density >= bolder.verified.density


def test_the_evaluation_is_a_page_and_flat_numbers(story: Any) -> None:
    """The page shows recall, the user's tasks and the money; MLflow gets each as a number of its own."""
    document = json.loads(json.dumps(story[1].to_dict()))

    page = render_evaluation(document, trade_off="tradeoff.html")
    metrics = evaluation_metrics(document)

    assert all(f'id="{part}"' in page for part in ("text", "user-tasks", "recall", "grid", "costs"))
    assert "variable value" in page
    assert "AWS: m7g.large" in page
    assert {"evaluate/bold/kl_mean", "evaluate/bold/recall/worst/right", "evaluate/bold/recall/mean"} <= set(
        metrics
    )
    assert (
        metrics["evaluate/dense/tasks_512_tokens/passkey"]
        == document["rungs"][0]["recall"]["cells"][0]["right"]
    )
    assert metrics["evaluate/dense/user_tasks/tasks/mine/num"] == 1
    assert all(set(name) <= set(ascii_letters + digits + "_-./ ") for name in metrics)


def test_dense_and_rungs_are_compared_by_the_same_names(story: Any) -> None:
    """Every rung has the figures that MLflow compares by, dense as the yardstick; memory is a real figure."""
    document = json.loads(json.dumps(story[1].to_dict()))

    figures = {rung["rung"]: rung_figures(document, rung) for rung in document["rungs"]}

    assert [*figures] == ["dense", "mild", "medium", "bold"]
    assert len({frozenset(found) for found in figures.values()}) == 1
    assert {MODEL_TIME_RATIO, MONEY, PPL_COST, RECALL, DENSITY, MEMORY} <= set(figures["bold"])
    assert next(iter(figures["bold"])) == MODEL_TIME_RATIO  # MLflow draws what was logged first
    fastest = min(document["rungs"][0]["prefill_s_by_baseline"].values())
    assert figures["bold"][MODEL_TIME_RATIO] == pytest.approx(document["rungs"][3]["prefill_s"] / fastest)
    assert all(found[MEMORY] > 1 for found in figures.values())  # a prefill of 2,048 tokens needs its cache
    table = describe_evaluation(document).splitlines()
    assert [line.split(" | ")[0] for line in table[-4:]] == ["dense", "mild", "medium", "bold"]
    assert describe_rung(figures["bold"], "bold", 2048).startswith("**bold**: ")


def test_the_evaluation_has_the_promised_keys(story: Any, tmp_path: Path) -> None:
    """The JSON has the documented keys, dense is row 0 with no cost, and progress was reported."""
    data = json.loads(json.dumps(story[1].to_dict()))

    assert data["model"] == "pocket"
    assert [row["rung"] for row in data["rungs"]] == ["dense", "mild", "medium", "bold"]
    assert all(set(row) >= RUNG_KEYS for row in data["rungs"])
    assert data["rungs"][0]["nll_delta"] == 0.0
    assert set(data["rungs"][1]["prefill_s_by_baseline"]) == {"sdpa", "flex_dense", "best_dense"}
    assert {row["kind"] for row in data["baselines"]} == set(KINDS)
    assert {"train scorers", "verify rungs", "time prefill"} <= set(story[3])
    assert save_trade_off(story[1], tmp_path / "plot.html").stat().st_size > 10_000


def test_recall_alone_is_what_the_evaluation_found(story: Any) -> None:
    """The same tasks on the same rungs, without anything else."""
    adapter, evaluation, _, _ = story
    options = EvaluateOptions(window_tokens=2048, num_tasks=1)

    found = evaluate_recall(resolve_model("pocket"), adapter, load_corpus(), options)

    assert found == {rung.rung: rung.recall for rung in evaluation.rungs}


def test_rungs_are_made_for_a_loss_and_for_a_speed(story: Any) -> None:
    """Each says what it was made for, keeps it, and reports the rest; the denser one comes first."""
    adapter = replace(story[0], folder=None)
    options = CalibrateOptions(
        window_tokens=2048,
        num_windows=3,
        blocks_per_window=16,
        # A loss that every rung keeps, a speed that every rung reaches, on however slow a machine.
        targets=(RungTarget("loose", nll=5.0), RungTarget("slow", speed=1e-6), *density_targets([0.3])),
        verify=VerifyOptions(window_tokens=2048, num_windows=1, blocks_per_window=12),
        timed_runs=1,
    )

    ladder = calibrate(resolve_model("pocket"), adapter, load_corpus(), options)

    assert [rung.id for rung in ladder.rungs] == ["dense", "slow", "d30", "loose"]
    slow, d30, loose = ladder.rungs[1:]
    assert (slow.target_speed, loose.target_nll, d30.target_density) == (1e-6, 5.0, 0.3)
    assert (slow.target_density, slow.target_nll, loose.target_density, d30.target_nll) == (None,) * 4
    assert slow.is_kept
    assert loose.is_kept
    for rung in (slow, d30, loose):
        assert rung.verified is not None
        assert rung.verified.prefill_speed is not None
        assert rung.verified.prefill_speed > 0
    assert slow.verified.density > d30.verified.density > loose.verified.density


def test_a_trained_choice_is_explained(story: Any, tmp_path: Path) -> None:
    """`explain` with the trained adapter: densities as counted; bolder keeps less, drops more."""
    loaded, adapter = resolve_model("pocket"), story[0]
    text = load_corpus().documents[0].text[:4000]  # within the 2,048 tokens that the rungs were verified at

    mild, bold = (explain_prompt(loaded, adapter, text, rung=rung) for rung in ("mild", "bold"))
    with retrofit(loaded.model, adapter, "bold", base="best") as handle, torch.no_grad():
        loaded.model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]]), use_cache=False)
        counted = {call.layer: call.density for call in handle.stats().calls}

    assert bold.layers
    assert {layer.index: layer.density for layer in bold.layers} == pytest.approx(
        {layer.index: counted[layer.index] for layer in bold.layers}
    )
    before = {layer.index: layer for layer in mild.layers}
    for layer in bold.layers:
        if (other := before.get(layer.index)) is not None:
            assert layer.density <= other.density + 0.02
            assert layer.focus.dropped_mass_mean >= other.focus.dropped_mass_mean - 0.02


def test_a_shorter_warm_up_is_not_counted(story: Any) -> None:
    """One timed round after a warm-up on a prefix: one time for each variant, of the whole prompt."""
    loaded, adapter = resolve_model("pocket"), story[0]
    text = torch.arange(700) % 500 + 10
    lengths: list[int] = []
    hook = loaded.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    timings = time_prefills(
        loaded, adapter, text, runs=1, progress=lambda *_: None, dense=("best_dense",), warm_up_tokens=256
    )

    hook.remove()
    num = len(adapter.ladder.rungs)  # our dense in place of rung 0, and every other rung
    assert lengths == [256] * num + [700] * num
    assert all(timing.runs == 1 and timing.lowest_s == timing.median_s for timing in timings.values())
