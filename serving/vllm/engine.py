"""Builds vLLM's engine for a variant: arguments, environment, and nothing that depends on a request."""

from __future__ import annotations

import os
import uuid
from typing import Any

from sentei.serving.errors import ConfigError
from sentei.serving.replica.loading import ServedModel
from sentei.serving.settings import VariantOptions
from sentei.serving.vllm.options import SCHEDULERS, EngineOptions

WORKER_DESK = "sentei.serving.vllm.worker.WorkerDesk"
PAGE_TOKENS = 64  # a page is a key block of the scorer
NUM_LOGPROBS_MAX = 20

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # One of two cores would be kept for the frontend otherwise; Ray has shared out the cores already.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def engine_args(
    options: VariantOptions, served: ServedModel, *, source: str, dtype: str, max_context_tokens: int
) -> dict[str, Any]:
    """Return vLLM's engine arguments for a variant whose model comes from `source`."""
    asked = options.vllm
    plugin = EngineOptions(
        uuid.uuid4().hex, options.adapter, vocab_size=served.vocab_size, eos_ids=served.eos_ids
    )
    arguments: dict[str, Any] = {
        "model": source,
        "dtype": dtype,
        "max_model_len": max_context_tokens,
        "max_num_seqs": asked.max_running,
        "max_num_batched_tokens": asked.step_tokens,
        "block_size": page_tokens(options.adapter),
        "kv_cache_memory_bytes": asked.kv_cache_mib << 20,
        "enable_prefix_caching": asked.prefix_cache,
        "enforce_eager": not asked.compile,
        "tensor_parallel_size": asked.tensor_parallel,
        "scheduling_policy": "priority",  # users before replays
        "scheduler_cls": SCHEDULERS[0],
        "async_scheduling": False,
        "worker_extension_cls": WORKER_DESK,
        "additional_config": plugin.to_additional_config(),
        "max_logprobs": NUM_LOGPROBS_MAX,
        "logprobs_mode": "raw_logprobs",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    known = arguments.keys() & asked.extra_args.keys()
    if known:
        raise ConfigError(
            f"vllm.extra_args names {sorted(known)}; these have options of their own, or one value"
        )
    return arguments | asked.extra_args


def page_tokens(adapter: str | None) -> int:
    """Return the length of a page: the scorer's key blocks."""
    if adapter is None:
        return PAGE_TOKENS
    from sentei.kernels.hf.adapter import read_adapter

    sizes = {shape.block_tokens for shape in read_adapter(adapter).manifest.shapes.values()}
    if len(sizes) != 1:
        raise ConfigError(
            f"adapter {adapter} has key blocks of {sorted(sizes)}; the vLLM engine needs one size"
        )
    return sizes.pop()


def set_environment(options: VariantOptions) -> None:
    """Choose for vLLM what it reads from the environment; what the operator set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
