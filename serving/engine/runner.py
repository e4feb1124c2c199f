"""The only part of the engine that touches tensors: one Hugging Face model and one KV cache per request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from sentei.serving.engine.attention_use import AttentionMeter, AttentionUse, Call
from sentei.serving.engine.grammar import Grammars
from sentei.serving.engine.request import DENSE_RUNG, EngineRequest, ScoreRequest, ScoreResult, TokenLogprob
from sentei.serving.engine.sampler import Sampler
from sentei.serving.errors import BadLogitsError, EngineRefusedError


class Stats(Protocol):
    """The attention calls since the last reset."""

    @property
    def calls(self) -> Iterable[Call]:
        """One by one."""


class Retrofit(Protocol):
    """What the runner needs of `sentei.kernels.hf.retrofit`: switch rungs between passes, see their calls."""

    def set_rung(self, rung_id: str) -> None:
        """Make the next forward pass run at this rung."""

    def stats(self) -> Stats:
        """What the attention calls did since the last reset."""

    def reset_stats(self) -> None:
        """Start counting anew."""


@dataclass(slots=True)
class _Live:
    """A request with its cache; `next_id` was chosen and sent, but not fed to the model yet."""

    request: EngineRequest
    cache: Any
    sampler: Sampler
    next_id: int = -1
    compute_s: float = 0.0
    meter: AttentionMeter = field(default_factory=AttentionMeter)


@dataclass(slots=True)
class _Scores:
    """Collects one row per served position while a replay is fed piece by piece."""

    argmax_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_ids: list[tuple[int, ...]] = field(default_factory=list)
    top_logprobs: list[tuple[float, ...]] = field(default_factory=list)


class ModelRunner:
    """Prefill, decode and replay; all calls come from one thread."""

    def __init__(
        self, model: Any, retrofit: Retrofit | None = None, grammars: Grammars | None = None
    ) -> None:
        self._model = model
        self._grammars = grammars
        self._device = model.device
        self._live: dict[str, _Live] = {}
        self._rung_id = DENSE_RUNG
        self.retrofit = retrofit

    @property
    def num_caches(self) -> int:
        """Requests that hold a KV cache now."""
        return len(self._live)

    def prefill(self, request: EngineRequest) -> tuple[TokenLogprob, float]:
        """Feed the prompt and what was sent already; returns the next token and the model seconds so far."""
        sampler = Sampler(request, self._grammars)  # first: a grammar that is none costs no pass
        live = _Live(request, DynamicCache(config=self._model.config), sampler)
        self._live[request.request_id] = live
        return self._advance(live, [*request.prompt_ids, *request.sent_ids])

    def decode(self, request_id: str) -> tuple[TokenLogprob, float]:
        """Feed the token chosen last and choose the next one."""
        live = self._live[request_id]
        return self._advance(live, [live.next_id])

    def attention(self, request_id: str) -> AttentionUse | None:
        """Say what a running request's attention kept so far; None at the dense rung."""
        live = self._live[request_id]
        if self.retrofit is None or live.request.rung_id == DENSE_RUNG:
            return None
        return live.meter.read()

    def drop(self, request_id: str) -> None:
        """Free a request's cache; unknown ids are fine."""
        self._live.pop(request_id, None)

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Teacher-force a sequence and report what the model would have said at each served position."""
        self._use_rung(request.rung_id)
        cache = DynamicCache(config=self._model.config)
        scores, start_s = _Scores(), _cpu_s()
        for begin, end in _pieces(request):
            # Positions num_prompt - 1 .. len - 2 predict the served tokens; all others need no logits.
            first = max(begin, request.num_prompt - 1)
            logits = self._forward(list(request.ids[begin:end]), cache, keep=max(end - first, 1))
            last = min(end, len(request.ids) - 1)
            if last > first:
                self._collect(
                    scores, logits[: last - first], request.ids[first + 1 : last + 1], request.num_top
                )
        return ScoreResult(
            argmax_ids=tuple(scores.argmax_ids),
            token_logprobs=tuple(scores.token_logprobs),
            top_ids=tuple(scores.top_ids),
            top_logprobs=tuple(scores.top_logprobs),
            compute_s=_cpu_s() - start_s,
        )

    def _advance(self, live: _Live, ids: list[int]) -> tuple[TokenLogprob, float]:
        start_s = _cpu_s()
        self._use_rung(live.request.rung_id)
        if self.retrofit is not None:
            self.retrofit.reset_stats()
        logits = self._forward(ids, live.cache, keep=1)[0]
        if self.retrofit is not None:
            live.meter.add(self.retrofit.stats().calls)
        token = live.sampler.choose(logits)
        live.next_id = token.token_id
        live.compute_s += _cpu_s() - start_s
        return token, live.compute_s

    def _forward(self, ids: list[int], cache: Any, keep: int) -> torch.Tensor:
        """Run the model over `ids` behind `cache`; returns logits [keep, V] of the last positions."""
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=self._device)
            output = self._model(input_ids=inputs, cache=cache, use_cache=True, logits_to_keep=keep)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _use_rung(self, rung_id: str) -> None:
        if self.retrofit is None:
            if rung_id != DENSE_RUNG:
                raise EngineRefusedError(
                    f"rung {rung_id!r} on a model without an adapter; only 'dense' runs here"
                )
            return
        if rung_id != self._rung_id:
            self.retrofit.set_rung(rung_id)
            self._rung_id = rung_id

    def replace_retrofit(self, retrofit: Retrofit | None) -> None:
        """Run on with another retrofit, for example one with a planted fault."""
        self.retrofit, self._rung_id = retrofit, ""

    @staticmethod
    def _collect(scores: _Scores, logits: torch.Tensor, served: tuple[int, ...], num_top: int) -> None:
        logprobs = logits.float().log_softmax(-1)
        if bool(torch.isnan(logprobs).any()):
            raise BadLogitsError("logits of a replay are NaN; see the variant's log")
        top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
        chosen = logprobs.gather(-1, torch.tensor(served, device=logprobs.device)[:, None])[:, 0]
        scores.argmax_ids += logprobs.argmax(-1).tolist()
        scores.token_logprobs += chosen.tolist()
        scores.top_ids += [tuple(row) for row in top.indices.tolist()]
        scores.top_logprobs += [tuple(row) for row in top.values.tolist()]


def _pieces(request: ScoreRequest) -> Iterator[tuple[int, int]]:
    """Cut a replay into pieces: the prompt and the served tokens each by their own size, or all in one."""
    size = len(request.ids)
    if request.prompt_chunk_tokens is None and request.served_chunk_tokens is None:
        yield 0, size
        return
    for begin, end, step in (
        (0, request.num_prompt, request.prompt_chunk_tokens),
        (request.num_prompt, size, request.served_chunk_tokens),
    ):
        for i in range(begin, end, step or end - begin):
            yield i, min(i + (step or end - begin), end)


def _cpu_s() -> float:
    """Processor seconds of this process: the cost of a request, whatever else runs on the same cores."""
    return time.process_time()
