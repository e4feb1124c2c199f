"""Joint on the shipped pocket model, small: learning under the mask helps, is saved, and leaves no trace."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from sentei.kernels.hf.adapter import load_adapter, new_adapter, save_adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung
from sentei.kernels.hf.models import AdapterError, fingerprint
from sentei.pipeline.cli.app import app
from sentei.pipeline.experiments.joint import JointOptions, JointReport, joint
from sentei.pipeline.home import Home
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.pipeline.steps import JOINT_FILE, Workbench, joint_step
from sentei.pipeline.text.corpus import load_corpus
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"), pytest.mark.timeout(600)]

SMALL = JointOptions(
    window_tokens=512,
    num_windows=6,
    num_held_out=2,
    max_epochs=2,
    compared_windows=2,
    compared_positions=256,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The shipped pocket model."""
    return resolve_model("pocket")


@pytest.fixture(scope="module")
def story(
    loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JointReport, Path, set[str]]:
    """One small training run under an uncalibrated rung."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter = new_adapter(loaded.model, "pocket")
    adapter = save_adapter(adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.3})), folder)
    seen: set[str] = set()

    def note(label: str, _done: int, _total: int) -> None:
        seen.add(label)

    _, report = joint(loaded, adapter, load_corpus(), SMALL, note)
    return report, folder, seen


def test_training_brings_the_thinned_model_closer_to_dense(story: Any) -> None:
    """The held-out KL from dense falls, and each variant has its figures on the same tokens."""
    report, _, seen = story
    rows = {row.variant: row for row in report.rows}

    assert report.kl_held_out_after < 0.9 * report.kl_held_out_before
    assert list(rows) == ["dense", "post-hoc sparse", "joint sparse", "joint weights, dense"]
    assert rows["dense"].nll_delta == 0.0
    assert rows["post-hoc sparse"].density < 1.0
    assert rows["joint weights, dense"].density == 1.0
    assert rows["joint sparse"].nll < rows["post-hoc sparse"].nll
    assert {"train low-rank weights", "compare on held-out text"} <= seen


def test_the_weights_come_back_and_the_model_is_what_it_was(story: Any, loaded: LoadedModel) -> None:
    """The manifest has the entry and its figures; weights and fingerprint of the model are untouched."""
    report, folder, _ = story

    saved = load_adapter(folder, loaded.model).low_rank

    assert saved is not None
    assert saved.info.rung == "bold"
    assert saved.info.figures["kl_held_out_after"] == report.kl_held_out_after
    assert any(bool(pair.up.any()) for pair in saved.pairs.values())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert fingerprint(loaded.model, loaded.name) == loaded.fingerprint
    fresh = resolve_model("pocket").model.state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in loaded.model.state_dict().items())
    assert json.loads(json.dumps(report.to_dict()))["rung"] == "bold"


def test_a_rung_without_a_mask_is_refused(loaded: LoadedModel) -> None:
    """Training under dense, under an unknown rung or below its break-even length is refused."""
    adapter = new_adapter(loaded.model, "pocket")
    with pytest.raises(AdapterError, match="rung 'dense' thins no layer"):
        joint(loaded, adapter, load_corpus(), JointOptions(rung="dense"))
    with pytest.raises(AdapterError, match="rung 'bold' is not on this ladder"):
        joint(loaded, adapter, load_corpus(), JointOptions())
    bold = replace(uncalibrated_ladder(adapter, {"bold": 0.3}).find("bold"), break_even_tokens=1024)
    with pytest.raises(AdapterError, match="runs dense on windows of 512 tokens"):
        joint(loaded, adapter.with_ladder(Ladder((Rung(DENSE), bold), ())), load_corpus(), SMALL)


def test_the_step_is_tracked_and_its_comparison_saved(loaded: LoadedModel, home: Path) -> None:
    """As the command runs it: joint.json beside the adapter, and one finished run in MLflow."""
    bench = Workbench(loaded, load_corpus(), Home(home).create())
    adapter = new_adapter(loaded.model, "pocket")
    save_adapter(adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.3})), bench.adapter_dir)
    tiny = replace(SMALL, num_windows=3, max_epochs=1, compared_windows=1)

    report = joint_step(bench, tiny, lambda _label, _done, _total: None)

    assert json.loads((bench.adapter_dir / JOINT_FILE).read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    client = MlflowClient(bench.home.mlflow_uri)
    experiment = client.get_experiment_by_name("sentei-joint")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.metrics["joint/kl_held_out_after"] == pytest.approx(report.kl_held_out_after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--joint", "--form", "low_rank"], "which --joint leaves as"), (["--rung", "bold"], "belongs to")],
)
def test_options_that_do_not_belong_together_are_refused(arguments: list[str], message: str) -> None:
    """The scorer's shape is not joint's, and a rung is nothing to a scorer."""
    done = CliRunner().invoke(app, ["distill", *arguments])

    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
