"""The plugin's options: they travel in vLLM's `additional_config`, which reaches all of its processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sentei.serving.errors import ConfigError
from sentei.serving.vllm import OPTIONS

SCHEDULERS = (
    "sentei.serving.vllm.scheduler.SenteiScheduler",
    "sentei.serving.vllm.scheduler.SenteiAsyncScheduler",
)
LADDER_FILE = "ladder.json"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One engine: its name among the engines of a process, the adapter's folder (None: dense alone).

    Vocabulary and end tokens are for answers that follow a schema.
    """

    engine: str = ""
    adapter: str | None = None
    vocab_size: int = 0
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, vllm_config: Any) -> EngineOptions:
        """Read them from a VllmConfig; an engine that was not given any is stock vLLM."""
        found = dict(vllm_config.additional_config or {}).get(OPTIONS, {})
        try:
            return cls(**found)
        except TypeError as error:
            raise ConfigError(f"additional_config {OPTIONS!r} is {found!r}: {error}") from error

    def to_additional_config(self) -> dict[str, Any]:
        """Return what goes into vLLM's `additional_config`."""
        return {OPTIONS: asdict(self)}

    def query_block_tokens(self) -> int:
        """Return how many rows choose as one; 1 where nothing chooses. Reads the ladder."""
        return int(self._read_ladder().get("query_block_tokens", 1))

    def verified_tokens(self) -> dict[str, int]:
        """Return the longest context that each rung was verified at, where one is known. Reads the ladder."""
        rungs = self._read_ladder().get("rungs", [])
        return {rung["id"]: int(rung["verified_tokens"]) for rung in rungs if rung.get("verified_tokens")}

    def _read_ladder(self) -> dict[str, Any]:
        if self.adapter is None:
            return {}
        found: dict[str, Any] = json.loads((Path(self.adapter) / LADDER_FILE).read_text(encoding="utf-8"))
        return found


def check_engine(vllm_config: Any) -> None:
    """Raise ConfigError where an engine with an adapter was set up so that thinned answers would be wrong."""
    wanted = vllm_config.scheduler_config.get_scheduler_cls()
    name = f"{wanted.__module__}.{wanted.__qualname__}"
    if name not in SCHEDULERS:
        raise ConfigError(
            f"scheduler_cls is {name}: its pieces of a prompt may end inside a query block, and its prefix "
            f"cache mixes rungs; set {SCHEDULERS[0]}, or with async scheduling {SCHEDULERS[1]}"
        )
    parallel = vllm_config.parallel_config
    for option in ("decode_context_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, option, 1) != 1:
            raise ConfigError(f"{option} is {getattr(parallel, option)}; the plugin was built for 1")
    if vllm_config.speculative_config is not None:
        raise ConfigError("speculative decoding is set; thinned answers were not verified under it")
    if str(vllm_config.cache_config.cache_dtype).startswith("fp8"):
        raise ConfigError("the KV cache is fp8; scores over such keys were never calibrated: use 'auto'")
    if str(vllm_config.model_config.dtype) == "torch.float16":
        raise ConfigError("dtype is float16, which our programs do not read: set bfloat16 or float32")
