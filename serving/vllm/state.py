"""What a worker process knows: the adapter, the rotary table, the pages' features, who sits in which row."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sentei.kernels.hf.adapter import read_adapter
from sentei.kernels.hf.ladder import Ladder, Rung, dense_ladder
from sentei.kernels.scorer.cpu_pages import CpuScorerPages
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.selection import Thresholds
from sentei.serving.engine.grammar import Grammars
from sentei.serving.errors import ConfigError
from sentei.serving.vllm import OPTIONS
from sentei.serving.vllm.meter import UseMeter
from sentei.serving.vllm.options import EngineOptions, check_engine


class WorkerState:
    """Shared by the parts of the plugin that vLLM builds one by one in a worker."""

    def __init__(self, vllm_config: Any, options: EngineOptions, device: torch.device) -> None:
        self.rows: dict[int, Any] = {}  # by row of the batch; `rows.RowTracker` keeps it
        self.ends: dict[int, int] = {}  # by row: how many tokens are computed after the step that runs
        self.meter = UseMeter()
        self._model, self._options = vllm_config.model_config.model, options
        self.fault: Fault | None = None
        self.ladder: Ladder = dense_ladder()
        self.scorers: dict[int, BlockScorer] = {}
        self._pages: dict[int, CpuScorerPages] = {}
        self._thresholds: dict[tuple[str, int], Thresholds] = {}
        if options.adapter is None:
            return
        check_engine(vllm_config)
        adapter = read_adapter(options.adapter, device)
        self.ladder = steps_of_batch(adapter.ladder, vllm_config.scheduler_config.max_num_seqs)
        self.scorers = {index: scorer.requires_grad_(False) for index, scorer in adapter.scorers.items()}
        self.rotary = rotary_table(vllm_config, device)
        self.block_tokens = next(iter(self.scorers.values())).shape.block_tokens
        self._rungs = [rung.id for rung in self.ladder.rungs if not rung.is_dense]
        self._thresholds = {
            (rung_id, index): self.ladder.thresholds(self.ladder.find(rung_id), index)
            for rung_id in self._rungs
            for index in self.scorers
        }

    @cached_property
    def grammars(self) -> Grammars:
        """What answers with a schema follow; made when the first one comes."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._model, trust_remote_code=False)
        return Grammars(tokenizer, self._options.vocab_size, self._options.eos_ids)

    def thins(self, rung: Rung, layer: int) -> bool:
        """Whether a rung may drop blocks in a layer; a planted fault strikes every layer with a scorer."""
        return not rung.is_dense and layer in self.scorers and (rung.thins(layer) or self.fault is not None)

    def thresholds(self, rung: Rung, layer: int) -> Thresholds:
        """Return a rung's thresholds for a layer."""
        return self._thresholds[rung.id, layer]

    def rung_index(self, rung: Rung) -> int:
        """Return which of the thresholds of a layer's features are a rung's."""
        return self._rungs.index(rung.id)

    def pages(self, layer: int, kv_cache: Tensor) -> CpuScorerPages:
        """Return a layer's features, made for as many pages as its KV cache has."""
        if layer not in self._pages:
            thresholds = [self._thresholds[rung_id, layer] for rung_id in self._rungs]
            self._pages[layer] = CpuScorerPages(
                self.scorers[layer],
                self.rotary,
                kv_cache.shape[0],
                thresholds=thresholds,
            )
        return self._pages[layer]


# By engine: vLLM builds the backend, its metadata and the logits processor apart from each other, and gives
# them nothing of ours to share but the options.
_STATES: dict[str, WorkerState] = {}


def find_state(vllm_config: Any, device: torch.device) -> WorkerState | None:
    """Return this process's state of an engine, made at first use; None for an engine without our options."""
    if OPTIONS not in dict(vllm_config.additional_config or {}):
        return None
    options = EngineOptions.of(vllm_config)
    if options.engine not in _STATES:
        _STATES[options.engine] = WorkerState(vllm_config, options, device)
    return _STATES[options.engine]


def steps_of_batch(ladder: Ladder, batch: int) -> Ladder:
    """Return a ladder whose decode steps have the break-even of steps of so many sequences, whatever runs.

    It is the most that the engine runs at once, so that no answer depends on who else is in its step.
    """
    rungs = (
        replace(rung, decode_break_even_tokens={1: rung.step_break_even_tokens(batch)})
        for rung in ladder.rungs
    )
    return replace(ladder, rungs=tuple(rungs))


def rotary_table(vllm_config: Any, device: torch.device) -> RotaryTable:
    """Return the rotary embedding of the full-attention layers, as vLLM itself builds it for this model."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    config = vllm_config.model_config.hf_text_config
    parameters = dict(config.rope_parameters)
    parameters = dict(parameters.get("full_attention", parameters))
    head_dim = vllm_config.model_config.get_head_size()
    length = vllm_config.model_config.max_model_len
    rope = get_rope(
        head_dim,
        max_position=max(length, int(config.max_position_embeddings)),
        is_neox_style=True,
        rope_parameters=parameters,
        dtype=torch.float32,
    )
    cached = getattr(rope, "cos_sin_cache", None)
    if cached is None or cached.shape[-1] != head_dim:
        raise ConfigError(
            f"rope_parameters are {parameters}: the rotary embedding covers "
            f"{'nothing' if cached is None else cached.shape[-1]} of {head_dim} dimensions; "
            "the scorer was built for models that turn all of them"
        )
    cos, sin = cached[:length].float().to(device).chunk(2, dim=-1)
    return RotaryTable(torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1))
