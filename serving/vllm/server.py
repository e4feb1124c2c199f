"""One model server on vLLM: what `serving.variant.ModelServer` answers, for many requests at a time."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from sentei.pipeline.models import checkpoint_source
from sentei.serving.engine.grammar import read_schema
from sentei.serving.engine.request import (
    DENSE_RUNG,
    EngineRequest,
    FinishReason,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
)
from sentei.serving.engine.scheduler import size_refusal
from sentei.serving.errors import (
    BadLogitsError,
    ConfigError,
    EngineBusyError,
    EngineError,
    EngineRefusedError,
    GrammarError,
    ServingError,
)
from sentei.serving.replica.loading import ServedModel, artifact_digest, load_served_model
from sentei.serving.replica.variant import VariantServer, check_artifact
from sentei.serving.replica.watch import watch_generation
from sentei.serving.settings import VariantOptions
from sentei.serving.traces import read_tracer
from sentei.serving.vllm.engine import engine_args, set_environment
from sentei.serving.vllm.meter import Use

NUMERICS = "vllm/3"  # counts up when the plugin computes something else than before
USERS, REPLAYS = 0, 1  # priorities: users come first
CONTROL_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class VllmServer(VariantServer):
    """Builds vLLM's engine, and answers its handle."""

    # Async, because vLLM's engine belongs to the loop that runs it.
    async def __init__(self, options: VariantOptions) -> None:  # type: ignore[misc]
        set_environment(options)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._options = options
        self._tracer = read_tracer(options.variant)
        self._served, self._rung_ids, dtype, self._artifact = await asyncio.to_thread(read_model, options)
        self._limits = options.limits(self._served.max_context_tokens)
        self._num_running = self._num_replays = 0
        arguments = engine_args(
            options,
            self._served,
            source=checkpoint_source(options.model),
            dtype=dtype,
            max_context_tokens=self._limits.max_context_tokens,
        )
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        await self._warm_up()
        log.info("variant %s of %s is up on vLLM (pid %d)", options.variant, options.model, os.getpid())

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield an answer's tokens; closing the generator frees the cache."""
        with watch_generation(self._tracer, self._options.variant, request) as watch:
            self._check(request)
            if self._num_running >= self._options.vllm.max_running + self._limits.max_queued:
                raise EngineBusyError(f"{self._num_running} requests already run or wait; retry")
            self._num_running += 1
            try:
                async with aclosing(self._chunks(request)) as chunks:
                    async for chunk in chunks:
                        watch.see(chunk)
                        yield chunk
            finally:
                self._num_running -= 1

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay served tokens for an audit, one by one as they were served.

        Each replay has a prefix cache of its own: dense and sparse costs are compared, and neither may find
        a prompt that the other must compute.
        """
        with self._replay_span(request) as span:
            result = await self._score(request)
            span.say(compute_s=result.compute_s)
        return result

    async def _score(self, request: ScoreRequest) -> ScoreResult:
        from sentei.serving.vllm.wire import read_scores, replay_params

        self._check(request)
        if self._num_replays >= self._limits.max_scores:
            raise EngineBusyError(f"{self._num_replays} replays already wait; retry")
        self._num_replays += 1
        prompt = {
            "prompt_token_ids": list(request.ids[: request.num_prompt]),
            "cache_salt": request.request_id,
        }
        final: Any = None
        try:
            outputs = self._engine.generate(
                prompt, replay_params(request), request.request_id, priority=REPLAYS
            )
            async with aclosing(outputs):
                async for output in outputs:
                    final = output
            use = await self._use("sentei_take_use", request.request_id)
        finally:
            self._num_replays -= 1
        answer = final.outputs[0]
        served = request.ids[request.num_prompt :]
        if use.has_bad_logits or tuple(answer.token_ids) != served:
            raise BadLogitsError("logits of a replay are NaN or infinite; see the variant's log")
        found = read_scores(served, answer.logprobs, num_top=request.num_top, compute_s=use.compute_s)
        return replace(found, artifact=self._artifact, dropped_mass=use.dropped_mass)

    async def _set_fault(self, fault: dict[str, Any] | None) -> None:
        """Strike between two steps; what was computed under another fault, or none, is forgotten."""
        if fault != self._fault:
            await self._engine.collective_rpc("sentei_plant", timeout=CONTROL_TIMEOUT_S, args=(fault,))
            await self._engine.reset_prefix_cache()

    async def check_health(self) -> None:
        """Raise if vLLM's processes are gone; Serve then replaces this replica."""
        try:
            await self._engine.check_health()
        except Exception as error:  # whatever vLLM calls it, the replica must restart
            raise ServingError(f"vLLM of variant {self._options.variant!r} is gone: {error}") from error

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()

    async def _chunks(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        from sentei.serving.vllm.wire import generation_params

        prompt = {"prompt_token_ids": [*request.prompt_ids, *request.sent_ids]}
        outputs = self._engine.generate(
            prompt, generation_params(request), request.request_id, priority=USERS
        )
        early: asyncio.Task[Use] | None = None
        use = Use()
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    # Asked for once on the way, so that a client that leaves early leaves a record behind.
                    early = early or asyncio.create_task(self._use("sentei_read_use", request.request_id))
                    if output.finished:
                        use = await self._use("sentei_take_use", request.request_id)
                    elif early.done():
                        use = early.result()
                    yield self._chunk(request, output.outputs[0], use)
        finally:
            if early is not None:
                early.cancel()

    def _chunk(self, request: EngineRequest, piece: Any, use: Use) -> TokenChunk:
        from sentei.serving.vllm.wire import read_logprob

        if use.grammar_error:
            raise GrammarError(use.grammar_error)
        if use.has_bad_logits:
            raise BadLogitsError(f"logits of {request.request_id} are NaN or infinite; see the variant's log")
        if piece.finish_reason not in (None, "stop", "length"):
            raise EngineError(f"vLLM ended {request.request_id} with {piece.finish_reason!r}")
        ids, logprobs = tuple(piece.token_ids), piece.logprobs or ()
        finish = None if piece.finish_reason is None else FinishReason(piece.finish_reason)
        if finish is FinishReason.STOP:
            ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
        num_top = request.sampling.num_top_logprobs or 0
        attention = None if request.rung_id == DENSE_RUNG else use.attention
        return TokenChunk(
            ids,
            tuple(read_logprob(i, found, num_top) for i, found in zip(ids, logprobs, strict=False)),
            finish,
            use.compute_s,
            attention,
        )

    async def _use(self, method: str, ticket: str) -> Use:
        found = await self._engine.collective_rpc(method, timeout=CONTROL_TIMEOUT_S, args=(ticket,))
        return Use.from_dict(found[0])  # tensor-parallel workers count alike: the first speaks for all

    def _check(self, request: EngineRequest | ScoreRequest) -> None:
        check_artifact(request, self._artifact)
        if (refusal := size_refusal(request, self._limits)) is not None:
            raise refusal
        if request.rung_id not in self._rung_ids:
            raise EngineRefusedError(
                f"rung {request.rung_id!r} is not served here; there are {', '.join(self._rung_ids)}"
            )

        if isinstance(request, EngineRequest) and request.sampling.json_schema is not None:
            read_schema(request.sampling.json_schema)  # refused here, before it costs a pass

    async def _warm_up(self) -> None:
        """Run the boldest rung once, so that no user waits for a compiler."""
        num = min(1024, self._limits.max_context_tokens - 3)
        if num > 0:
            ids = (1,) * (num + 2)
            await self.score(ScoreRequest("warm-up", ids, num, self._rung_ids[-1]))


def read_model(options: VariantOptions) -> tuple[ServedModel, tuple[str, ...], str, str]:
    """Load the model as Transformers does, to know it and to hold the adapter against it; then let go of it.

    Returns what is known of it, the rungs that can be served, its dtype's name, and the artifact's digest.
    """
    served = load_served_model(options, to_read=True)  # vLLM's workers hold the one that runs
    rung_ids: tuple[str, ...] = (DENSE_RUNG,)
    artifact = ""
    if options.variant == "sparse":
        from sentei.kernels.hf.adapter import load_adapter

        if options.adapter is None:
            raise ConfigError(
                "variant 'sparse' has no adapter; give `adapter`, a folder made by `sentei distill`"
            )
        adapter = load_adapter(options.adapter, served.model)
        rung_ids = tuple(rung.id for rung in adapter.ladder.rungs)
        artifact = artifact_digest(adapter.digest, NUMERICS, served.model)
    dtype = str(served.model.dtype).removeprefix("torch.")
    return replace(served, model=None), rung_ids, dtype, artifact
