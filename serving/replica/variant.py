"""The model servers: dense and sparse are one class with two sets of options, in a Ray Serve replica each."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sentei.serving.engine.loop import Engine
from sentei.serving.engine.request import (
    DENSE_RUNG,
    EngineLimits,
    EngineRequest,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
)
from sentei.serving.errors import ConfigError, ServingError, WrongArtifactError
from sentei.serving.ports import ModelCard
from sentei.serving.replica.loading import (
    ServedModel,
    artifact_digest,
    attach_retrofit,
    load_served_model,
    make_fault,
)
from sentei.serving.replica.watch import watch_generation
from sentei.serving.settings import VariantOptions
from sentei.serving.traces import ENGINE, OFF, Span, Tracer, read_tracer

if TYPE_CHECKING:
    from sentei.serving.engine.runner import ModelRunner

WARM_UP_TOKENS = 1024
NUMERICS = "builtin/2"  # counts up when a kernel or a selection rule changes what is computed

log = logging.getLogger(__name__)


class VariantServer(ABC):
    """What the servers of all engines answer alike: who runs here, and orders for drills."""

    _options: VariantOptions
    _served: ServedModel
    _limits: EngineLimits
    _rung_ids: tuple[str, ...]
    _artifact: str = ""
    _fault: dict[str, Any] | None = None
    _tracer: Tracer = OFF

    @abstractmethod
    async def _set_fault(self, fault: dict[str, Any] | None) -> None:
        """Plant a fault in the running scorer, or take it out."""

    def __del__(self) -> None:
        """Send the last spans; Serve calls this when it ends a replica."""
        self._tracer.stop()

    async def describe(self) -> ModelCard:
        """Say what runs here."""
        return ModelCard(
            variant=self._options.variant,
            model_name=self._options.model,
            fingerprint=self._served.fingerprint,
            max_context_tokens=self._limits.max_context_tokens,
            vocab_size=self._served.vocab_size,
            eos_ids=self._served.eos_ids,
            rung_ids=self._rung_ids,
            pid=os.getpid(),
            artifact=self._artifact,
            fault=self._fault,
            sampling=self._served.sampling,
        )

    def _replay_span(self, request: ScoreRequest) -> Span:
        """Return the span of a replay."""
        served = len(request.ids) - request.num_prompt
        return self._tracer.follow(
            ENGINE,
            request.traceparent,
            variant=self._options.variant,
            rung_id=request.rung_id,
            prompt_tokens=request.num_prompt,
            audited_tokens=served,
        )

    async def plant(self, fault: dict[str, Any] | None) -> None:
        """Plant a fault in the scorer, or take it out; takes effect between two steps."""
        if self._options.variant != "sparse":
            raise ConfigError(
                f"fault {fault!r} planted in variant {self._options.variant!r}; only 'sparse' has a scorer"
            )
        make_fault(fault)  # raises for a fault that is none
        await self._set_fault(fault)
        self._fault = fault
        log.warning("variant %s: planted fault is now %r", self._options.variant, fault)


class ModelServer(VariantServer):
    """Loads the model, runs the engine beside the event loop, and answers its handle."""

    def __init__(self, options: VariantOptions) -> None:
        import torch

        from sentei.serving.engine.grammar import Grammars
        from sentei.serving.engine.runner import ModelRunner

        torch.set_num_threads(options.threads)
        self._options = options
        self._tracer = read_tracer(options.variant)
        self._served: ServedModel = load_served_model(options)
        self._retrofit = attach_retrofit(self._served.model, options)
        adapter = getattr(self._retrofit, "adapter", None)
        digest = adapter.digest if adapter is not None else ""
        self._artifact = artifact_digest(digest, NUMERICS, self._served.model)
        self._limits = options.limits(self._served.max_context_tokens)
        ladder = getattr(self._retrofit, "ladder", None)
        self._rung_ids = tuple(rung.id for rung in ladder.rungs) if ladder is not None else (DENSE_RUNG,)
        served = self._served
        grammars = Grammars(served.tokenizer, served.vocab_size, served.eos_ids)
        runner = ModelRunner(served.model, self._retrofit, grammars)
        self._warm_up(runner)
        self._engine = Engine(runner, self._limits)
        self._engine.start()
        log.info("variant %s of %s is up (pid %d)", options.variant, options.model, os.getpid())

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield an answer's tokens; closing the generator frees the cache."""
        with watch_generation(self._tracer, self._options.variant, request) as watch:
            check_artifact(request, self._artifact)
            async for chunk in self._engine.generate(request, watch.begin_prefill):
                watch.see(chunk)
                yield chunk

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay served tokens for an audit, when users leave room for it."""
        with self._replay_span(request) as span:
            check_artifact(request, self._artifact)
            result = await self._engine.score(request)
            span.say(compute_s=result.compute_s)
        return replace(result, artifact=self._artifact)

    async def _set_fault(self, fault: dict[str, Any] | None) -> None:
        planted = make_fault(fault)
        await self._engine.between_steps(lambda: self._retrofit.set_fault(planted))

    async def check_health(self) -> None:
        """Raise if the engine's thread is gone or hangs in one step; Serve then replaces this replica."""
        if not self._engine.is_alive():
            raise ServingError(
                f"engine thread of variant {self._options.variant!r} is gone; the replica must restart"
            )
        if (stalled_s := self._engine.stalled_s()) > self._options.stall_after_s:
            raise ServingError(
                f"one step of variant {self._options.variant!r} has been running for {stalled_s:.0f} s"
            )

    def _warm_up(self, runner: ModelRunner) -> None:
        """Run the boldest rung once, so that no user waits for its compiler (4 s for the pocket model)."""
        if self._retrofit is None:
            return
        num_prompt = min(WARM_UP_TOKENS, self._limits.max_context_tokens - 2)
        if num_prompt > 0:
            ids = (1,) * (num_prompt + 1)
            runner.score(ScoreRequest("warm-up", ids, num_prompt, self._rung_ids[-1], served_chunk_tokens=1))


def check_artifact(request: EngineRequest | ScoreRequest, runs: str) -> None:
    """Raise WrongArtifactError if a request asks for another artifact than the one that runs here."""
    if request.artifact not in ("", runs):
        raise WrongArtifactError(
            f"artifact {request.artifact[:12]} is wanted, {runs[:12] or 'none'} runs here; "
            "restore what was proven, or start a new rollout"
        )
