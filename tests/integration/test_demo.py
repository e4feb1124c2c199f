"""The demo's own path, Ray included: a rung that is too mild to pay ends held, and the document says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.adapter import save_adapter
from sentei.pipeline.demo.demo import DemoResult, Story, run_stories
from sentei.pipeline.demo.sizes import POCKET_SIZE
from sentei.pipeline.demo.traffic import MixOptions
from sentei.pipeline.home import Home
from sentei.pipeline.models import resolve_model
from sentei.pipeline.steps import Workbench
from sentei.pipeline.text.corpus import load_corpus
from tests.fakes_models import save_byte_tokenizer
from tests.trial_ladders import exact_adapter

pytestmark = pytest.mark.timeout(1200)  # Ray takes minutes to start on a busy machine

PROMPT_TOKENS = 640  # in the routed slice of the demo's policy
# Scores that know every key, and nothing dropped that matters: as good as dense, and dearer.
TOO_MILD = {"mild": 1e-4, "medium": 1e-3, "bold": 1e-2}


def tiny_bench(folder: Path) -> Workbench:
    """A random Llama over bytes, with an exact scorer in a home of its own."""
    save_byte_tokenizer(folder / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder / "tiny")
    bench = Workbench(resolve_model(str(folder / "tiny")), load_corpus(), Home(folder / "home").create())
    save_adapter(exact_adapter(bench.loaded.model, TOO_MILD), bench.adapter_dir)
    return bench


def test_a_rung_that_is_too_mild_to_pay_ends_held(tmp_path: Path) -> None:
    """Traffic, policy, audits, controller and report are those of `sentei demo`; nobody gets sparse."""
    bench = tiny_bench(tmp_path)
    size = replace(
        POCKET_SIZE,
        mix=MixOptions(prompt_tokens=(PROMPT_TOKENS,), text_tokens=4, text_share=1.0),
        think_s=0.0,
        waits_for_audits=True,
    )
    story = Story("too-mild", "a rung that is too mild to pay", "held", None)
    seen: list[dict[str, Any]] = []

    ends = run_stories(
        bench, size, seed=0, watch=lambda _, found, __: seen.append(dict(found)), told=(story,)
    )

    (end,) = ends
    assert (end.outcome, end.by, end.failed) == ("held", "compute", 0), end.reason
    assert end.is_as_expected
    assert "compute in long at bold: no gain: " in end.reason
    assert "times dense's model time (" in end.reason
    assert all(route["share"] == 0 for found in seen for route in found["routes"])
    document = DemoResult("tiny", ends, None, bench.home.mlflow_uri, end.report, 1.0).to_dict()
    (told,) = document["rollouts"]
    assert (told["outcome"], told["rung"], told["gain_proven"]) == ("held", "bold", False)
    assert told["model_time_ratio"] > 0.9
    assert {told[name] for name in ("ppl_cost_pct", "recall", "recall_dense")} == {None}  # no evaluation
    page = Path(end.report).read_text(encoding="utf-8")
    assert "Held: no gain" in page
    assert "There is no saving" in page
