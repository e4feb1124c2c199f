"""The vLLM engine's own room: everything here is skipped where the extra is not installed."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter, save_adapter
from tests.trial_ladders import uncalibrated_ladder

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 256


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Let vLLM's sockets end with the process: no mark of a test reaches what is found after the last one."""
    warnings.filterwarnings("ignore", "Unclosed context", ResourceWarning)


RUNGS = {"mild": 0.01, "bold": 0.05}
# Seeds under which no step of a test's prompts has two best tokens that rounding alone would tell apart.
SEEDS = {"llama": 0, "gemma": 1, "bytes": 0}


@dataclass(frozen=True)
class Tiny:
    """A random model on disk, with an adapter that was neither trained nor calibrated."""

    model: Any
    adapter: Adapter
    folder: Path


def make_tiny(folder: Path, *, kind: str = "llama") -> Tiny:
    """Three layers whose attention is peaked enough that rungs drop blocks.

    `gemma` has sliding ones; `bytes` is the Llama with a score of single keys, in 8 bits where that is built.
    """
    torch.manual_seed(SEEDS[kind])
    model = _gemma() if kind == "gemma" else _llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12)
            if "q_norm" in name or "k_norm" in name:  # Gemma's norms would take the factor out again
                weight.fill_(2.0)
    model.save_pretrained(folder)
    if kind == "bytes":
        adapter = new_adapter(model, "tiny", form="low_rank", rank=16, pool_tokens=1)
    else:
        adapter = new_adapter(model, "tiny", rank=16, pool_tokens=16)
    generator = torch.Generator().manual_seed(1)
    for scorer in adapter.scorers.values():
        for weight in (scorer.query_map, scorer.distance_bias):
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        if scorer.key_steps is not None:
            scorer.key_steps.mul_(3)  # as large as these keys are
    ladder = uncalibrated_ladder(adapter, RUNGS)
    dense, mild, bold = ladder.rungs
    rungs = (dense, replace(mild, break_even_tokens=192, decode_break_even_tokens={1: 400}), bold)
    adapter = adapter.with_ladder(replace(ladder, rungs=rungs, query_block_tokens=16))
    return Tiny(model, save_adapter(adapter, folder / "adapter"), folder)


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64, max_position_embeddings=2048,
        sliding_window=128, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The random Llama."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))
