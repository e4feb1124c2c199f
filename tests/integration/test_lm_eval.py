"""lm-eval, unchanged, on a retrofitted model: the task is a YAML and a JSONL file, nothing is downloaded."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sentei.kernels.hf.adapter import load_adapter, new_adapter, save_adapter
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.pipeline.tasks.notes import make_key_value, make_passkey
from sentei.pipeline.tasks.prompt import usable_words
from tests.trial_ladders import uncalibrated_ladder

pytest.importorskip("lm_eval", reason="extra `lm-eval` is not installed: pip install 'sentei[lm-eval]'")

# torch 2.13 imports modules of its own that it has deprecated; lm-eval and its libraries warn of theirs, too.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "lm-eval.md"
BLOCKS = re.findall(r"```(yaml|python)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
NUM_DOCUMENTS, PROMPT_TOKENS, NUM_CHOICES = 6, 1024, 4


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The shipped pocket model."""
    return resolve_model("pocket")


@pytest.fixture
def folder(tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: the guide's task files, their documents, and an adapter with untrained scores."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, (kind, text) in zip(("pairs", "passkey"), BLOCKS, strict=False):
        assert kind == "yaml"
        (tasks / f"{name}.yaml").write_text(text)
        rows = [json.dumps(row) for row in make_rows(loaded.tokenizer, name)]
        (tasks / f"{name}.jsonl").write_text("\n".join(rows))
    adapter = new_adapter(loaded.model, "pocket")
    ladder = uncalibrated_ladder(adapter, {"all": 1e-30, "bold": 0.5})
    save_adapter(adapter.with_ladder(ladder), tmp_path / "adapter")
    return tmp_path


def make_rows(tokenizer: Any, name: str) -> Iterator[dict[str, Any]]:
    """Documents of a task, notes spread over the depth of the prompt."""
    rng = random.Random(0)
    make = make_key_value if name == "pairs" else make_passkey
    for i in range(NUM_DOCUMENTS):
        task = make(tokenizer, prompt_tokens=PROMPT_TOKENS, depth=(i + 0.5) / NUM_DOCUMENTS, seed=i)
        others = [word for word in usable_words(tokenizer) if word != task.answer]
        choices = [task.answer, *rng.sample(others, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        gold = choices.index(task.answer)
        yield {"prompt": task.prompt, "answer": task.answer, "choices": choices, "gold": gold}


def run_lm_eval(loaded: LoadedModel) -> list[Any]:
    """Run both tasks on the model as it is now; return log-likelihoods and texts in order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    names = ["sentei_pairs", "sentei_passkey"]
    manager = TaskManager(include_path="tasks", include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    return [sample["resps"] for name in names for sample in found["samples"][name]]


def test_what_the_guide_shows_runs(folder: Path) -> None:
    """The guide's Python, on its task files: every rung gets figures, and the dense pocket model recalls."""
    names: dict[str, Any] = {}
    kind, code = BLOCKS[2]

    assert kind == "python"
    exec(compile(code, str(GUIDE), "exec"), names)

    results = names["results"]
    assert list(results) == ["dense", "all", "bold"]
    assert results["dense"]["sentei_pairs"]["acc,none"] >= 0.8
    assert results["dense"]["sentei_passkey"]["exact_match,strip"] >= 0.8
    assert results["all"]["sentei_pairs"]["acc,none"] == results["dense"]["sentei_pairs"]["acc,none"]


def test_rung_dense_is_exact_and_a_bold_rung_runs_sparse(folder: Path, loaded: LoadedModel) -> None:
    """Dense under retrofit gives the untouched model's log-likelihoods to the bit; bold gives others."""
    adapter = load_adapter(folder / "adapter", loaded.model)
    untouched = run_lm_eval(loaded)

    with retrofit(loaded.model, adapter, "dense") as handle:
        dense = run_lm_eval(loaded)
        handle.set_rung("bold")
        bold = run_lm_eval(loaded)
        density = handle.stats().density()

    assert dense == untouched
    assert bold != dense
    assert density is not None
    assert density < 0.9
