"""Between our requests and vLLM's: sampling parameters there, token chunks and scores back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from sentei.serving.engine.request import EngineRequest, ScoreRequest, ScoreResult, TokenLogprob
from sentei.serving.vllm.asked import Asked


def generation_params(request: EngineRequest) -> SamplingParams:
    """Return a user's parameters; the plugin draws tokens, so that vLLM is always asked for the best."""
    asked = Asked(
        rung=request.rung_id,
        ticket=request.request_id,
        prompt_tokens=len(request.prompt_ids) if request.sent_ids else None,
        sampling=request.sampling,
    )
    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens - len(request.sent_ids),
        stop_token_ids=sorted(request.stop_ids),
        ignore_eos=True,
        detokenize=False,
        logprobs=request.sampling.num_top_logprobs,
        output_kind=RequestOutputKind.DELTA,
        extra_args=asked.to_extra_args(),
    )


def replay_params(request: ScoreRequest) -> SamplingParams:
    """Return a replay's parameters: decode emits the served ids and says what the model thought of them."""
    served = request.ids[request.num_prompt :]
    asked = Asked(
        rung=request.rung_id,
        ticket=request.request_id,
        prompt_tokens=request.prompt_end,
        chunk_tokens=request.prompt_chunk_tokens,
        forced=served,
    )
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(served),
        ignore_eos=True,
        detokenize=False,
        logprobs=request.num_top,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=asked.to_extra_args(),
    )


def read_logprob(token_id: int, found: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """Return a token's log-probability and the best `num_top`, best first, from one position of vLLM's."""
    ordered = sorted(found.items(), key=lambda item: int(item[1].rank or 0))
    best = [(int(i), float(entry.logprob)) for i, entry in ordered if (entry.rank or 0) <= num_top]
    return TokenLogprob(token_id, float(found[token_id].logprob), tuple(best[:num_top]))


def read_scores(
    served: Sequence[int], logprobs: Sequence[Mapping[int, Any]], *, num_top: int, compute_s: float
) -> ScoreResult:
    """Return what the model thought of each served token."""
    rows = [read_logprob(i, found, num_top) for i, found in zip(served, logprobs, strict=True)]
    return ScoreResult(
        top_ids=tuple(tuple(i for i, _ in row.top) for row in rows),
        top_logprobs=tuple(tuple(value for _, value in row.top) for row in rows),
        compute_s=compute_s,
    )
