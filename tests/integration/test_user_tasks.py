"""The user's tasks and the recall tasks on the shipped pocket model, with rungs that were not calibrated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.evaluation.recall import TaskPlan, make_tasks, recall_by_rung
from sentei.pipeline.evaluation.user_tasks import answers_by_rung, summarise
from sentei.pipeline.measure.answers import answer_greedily, choose
from sentei.pipeline.measure.scores import agreement, hidden_at, score_variants, token_losses
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.pipeline.progress import silent
from sentei.pipeline.tasks.notes import make_passkey
from sentei.pipeline.tasks.user import load_user_tasks
from sentei.pipeline.text.corpus import load_corpus
from sentei.pipeline.text.splits import split_text
from tests.trial_ladders import uncalibrated_ladder

TOKENS = 1024


@pytest.fixture(scope="module")
def bench() -> tuple[LoadedModel, Adapter]:
    """The pocket model with one rung that keeps all, and one that keeps sink and diagonal alone."""
    loaded = resolve_model("pocket")
    adapter = new_adapter(loaded.model, "pocket", rank=4)
    return loaded, adapter.with_ladder(uncalibrated_ladder(adapter, {"all": 1e-30, "blind": 1.0}))


def write_tasks(folder: Path, tokenizer: Any) -> Path:
    """Passkeys by every kind of metric, far back in text; one prompt too short to thin."""
    first, second, third = (
        make_passkey(tokenizer, prompt_tokens=TOKENS, depth=0.4, seed=seed) for seed in (1, 2, 3)
    )
    rows = [
        {
            "task": "found",
            "prompt": first.prompt,
            "reference": first.answer,
            "metric": "exact_match",
            "stop": ".",
        },
        {"task": "found", "prompt": second.prompt, "reference": rf"\b{second.answer}\b", "metric": "regex"},
        {
            "task": "chosen",
            "prompt": third.prompt,
            "reference": third.answer,
            "metric": "choice",
            "choices": [first.answer, third.answer, second.answer],
        },
        {"task": "short", "prompt": "import", "reference": "import", "metric": "f1", "max_tokens": 2},
    ]
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_blind_rung_fails_what_dense_finds(bench: tuple[LoadedModel, Adapter], tmp_path: Path) -> None:
    """Dense and the rung that keeps all find each passkey, the blind one none; short prompts say nothing."""
    loaded, adapter = bench
    tasks = load_user_tasks(write_tasks(tmp_path, loaded.tokenizer), loaded.tokenizer, loaded.max_tokens)

    answers = answers_by_rung(loaded, adapter, tasks, silent)
    found = {rung: summarise(tasks, own, answers["dense"]) for rung, own in answers.items()}

    assert [found["dense"].find(name).score for name in ("found", "chosen")] == [1.0, 1.0]
    assert [answer.answer for answer in answers["all"]] == [answer.answer for answer in answers["dense"]]
    assert (found["blind"].find("found").score, found["blind"].find("found").worse) == (0.0, 2)
    assert found["blind"].worst in ("found", "chosen")
    assert found["blind"].find("found").density < 0.5
    assert found["blind"].find("short").num_untouched == 1
    assert found["blind"].find("chosen").generated_tokens_mean is None


def test_recall_finds_dense_right_and_blind_wrong(bench: tuple[LoadedModel, Adapter]) -> None:
    """Dense answers multi-key needles and stops by itself; the blind rung does not find them."""
    loaded, adapter = bench
    documents = split_text(load_corpus()).evaluate
    plan = TaskPlan(("passkey", "multi_key"), (512, TOKENS), num_depths=2, seed=5)

    found = recall_by_rung(loaded, adapter, make_tasks(loaded, documents, plan), silent)

    assert len(found["dense"].cells) == 4
    assert found["dense"].mean >= 0.75
    assert found["blind"].mean <= 0.25
    assert found["blind"].worst.right < found["blind"].worst.dense_right
    assert found["dense"].cut_share < 0.5


def test_a_greedy_answer_ends_by_itself_at_a_stop_or_at_the_limit(bench: tuple[LoadedModel, Adapter]) -> None:
    """The three ways in which an answer ends are told apart."""
    loaded, _ = bench
    task = make_passkey(loaded.tokenizer, prompt_tokens=400, depth=0.5, seed=1)

    by_itself = answer_greedily(loaded, task.prompt, max_tokens=16)
    at_stop = answer_greedily(loaded, task.prompt, max_tokens=16, stop=["."])
    at_limit = answer_greedily(loaded, task.prompt, max_tokens=1)

    assert (by_itself.text, by_itself.is_cut) == (f" {task.answer}.\n", False)
    assert (at_stop.text, at_stop.is_cut) == (f" {task.answer}", False)
    assert (at_limit.tokens, at_limit.is_cut) == (1, True)


def test_choices_are_ranked_by_log_likelihood(bench: tuple[LoadedModel, Adapter]) -> None:
    """The choice is the one whose tokens the model gives the highest likelihood, counted step by step."""
    loaded, _ = bench
    prompt, choices = "import os\nimport", ["sys", "zebra", "re, os"]

    with torch.no_grad():
        likelihoods = []
        for choice in choices:
            ids = loaded.tokenizer(prompt)["input_ids"]
            total = 0.0
            for token in loaded.tokenizer(f" {choice}")["input_ids"]:
                logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1]
                total += float(logits.log_softmax(-1)[token])
                ids = [*ids, token]
            likelihoods.append(total)

    assert choose(loaded, prompt, choices) == likelihoods.index(max(likelihoods))


def test_teacher_forcing_tells_a_blind_rung_from_dense(bench: tuple[LoadedModel, Adapter]) -> None:
    """Dense has no divergence from itself and the losses of before; a blind rung has, and agrees less."""
    loaded, adapter = bench
    text = torch.tensor(
        loaded.tokenizer(split_text(load_corpus()).evaluate[0].text[:6000])["input_ids"][:TOKENS]
    )
    positions = torch.arange(200, len(text) - 1, 2)

    with retrofit(loaded.model, adapter, "dense", base="best") as handle:
        hidden = {"dense": hidden_at(loaded, text, positions)}
        losses = token_losses(loaded, text, positions)
        handle.set_rung("blind")
        hidden["blind"] = hidden_at(loaded, text, positions)
    scores = score_variants(loaded, text, positions, hidden, "dense")

    torch.testing.assert_close(scores["dense"].loss, losses)
    assert (agreement(scores["dense"]).kl_p99, agreement(scores["dense"]).top1_agreement) == (0.0, 1.0)
    blind = agreement(scores["blind"])
    assert 0.0 < blind.kl_mean < blind.kl_p99
    assert blind.top1_agreement < 1.0
