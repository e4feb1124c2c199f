"""vLLM's scheduler, but for three rules: a thinned answer depends on no batch, chunk size or prefix hit.

1. A piece of a prompt ends at the border of a query block, because a query block chooses as one.
2. The prefix cache is kept apart by rung: keys of later layers depend on what earlier layers dropped.
3. What an answer wrote stays its own: its rows chose one by one, a prompt's rows choose in blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from sentei.serving.vllm.asked import Asked, read_asked
from sentei.serving.vllm.options import EngineOptions

Hasher = Callable[[Request], list[BlockHash]]


def cut_chunk(asked: Asked, *, start: int, wanted: int, prompt_tokens: int, query_block: int) -> int:
    """Return how many of the `wanted` tokens from `start` on may run in this step; 0: none fit. Pure."""
    in_prompt = max(prompt_tokens - start, 0)
    if asked.chunk_tokens is not None and in_prompt:
        wanted = min(wanted, asked.chunk_tokens if asked.is_dense else max(asked.chunk_tokens, query_block))
    end = start + wanted
    if asked.is_dense or not in_prompt or end >= prompt_tokens:
        return wanted
    return max(end // query_block * query_block - start, 0)


def private_tail(hasher: Hasher, num_shared: int) -> Hasher:
    """Wrap a block hasher: blocks from `num_shared` on are found by their own request alone."""

    def hash_blocks(request: Request) -> list[BlockHash]:
        first = len(request.block_hashes)
        return [
            found if first + i < num_shared else _mix(found, request.request_id)
            for i, found in enumerate(hasher(request))
        ]

    return hash_blocks


def _mix(found: BlockHash, request_id: str) -> BlockHash:
    return BlockHash(hashlib.sha256(found + request_id.encode()).digest())


class _Rules:
    """The three rules, on top of either of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        options = EngineOptions.of(vllm_config)
        self._query_block, self._verified = options.query_block_tokens(), options.verified_tokens()
        self._asked: dict[str, Asked] = {}
        # vLLM asks before it schedules a piece; models with states answer for a reason of their own.
        self.need_mamba_block_aligned_split = True

    def add_request(self, request: Request) -> None:
        """Take a request, its blocks hashed by rung."""
        params = request.sampling_params
        asked = read_asked(params.extra_args if params is not None else None)
        self._asked[request.request_id] = asked
        if not asked.is_dense and request._block_hasher is not None:
            num_prompt = asked.prompt_tokens or request.num_prompt_tokens
            # A prompt longer than its rung was verified for runs dense: its pages are of another kind.
            kind = "" if num_prompt <= self._verified.get(asked.rung, num_prompt) else "-unverified"
            request.cache_salt = f"sentei:{asked.rung}{kind}:{request.cache_salt or ''}"
            num_shared = num_prompt // self.hash_block_size  # type: ignore[attr-defined]
            request._block_hasher = private_tail(request._block_hasher, num_shared)
            request.block_hashes = []
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_local: int = 0, num_external: int = 0
    ) -> int:
        asked = self._asked.get(request.request_id, Asked())
        return cut_chunk(
            asked,
            start=request.num_computed_tokens + num_local + num_external,
            wanted=num_new_tokens,
            prompt_tokens=asked.prompt_tokens or request.num_prompt_tokens,
            query_block=self._query_block,
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._asked.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class SenteiScheduler(_Rules, Scheduler):
    """For engines that schedule in step with the model: all CPUs."""


class SenteiAsyncScheduler(_Rules, AsyncScheduler):
    """For engines that schedule ahead of the model."""
