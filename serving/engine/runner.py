"""The only part of the engine that touches tensors: one Hugging Face model and one KV cache per request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from sentei.kernels.hf.prompt_pieces import cut_pieces, run_in_pieces
from sentei.kernels.placement import synchronize
from sentei.serving.engine.attention_use import AttentionMeter, AttentionUse, Call
from sentei.serving.engine.grammar import Grammars
from sentei.serving.engine.request import (
    DENSE_RUNG,
    MEASURED_ROWS,
    EngineRequest,
    ScoreRequest,
    ScoreResult,
    TokenLogprob,
)
from sentei.serving.engine.sampler import Sampler
from sentei.serving.errors import BadLogitsError, EngineRefusedError


class Rows(Protocol):
    """The rows of one attention call, as `sentei.kernels.hf.observe.AttendedRows` tells of them."""

    def dropped(self) -> torch.Tensor:
        """Return the share of dense attention that each row went without."""


class Stats(Protocol):
    """The attention calls since the last reset."""

    @property
    def calls(self) -> Iterable[Call]:
        """One by one."""


class Retrofit(Protocol):
    """What the runner needs of `sentei.kernels.hf.retrofit`: switch rungs between passes, see their calls."""

    def set_rung(self, rung_id: str) -> None:
        """Make the next forward pass run at this rung."""

    def set_prompt_tokens(self, tokens: int | None) -> None:
        """Say where the prompt of what runs next ends: its last rows may keep everything."""

    @property
    def piece_tokens(self) -> int | None:
        """How long the pieces are that a prompt should run in; None: one pass."""

    def stats(self) -> Stats:
        """What the attention calls did since the last reset."""

    def reset_stats(self) -> None:
        """Start counting anew."""

    def recording_rows(self, newest: int | None = None) -> AbstractContextManager[Sequence[Rows]]:
        """Keep what so many newest rows of each attention call read, until the next pass."""


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
    """Collects a replay while it is fed piece by piece: one row per served position, the mass, the cost."""

    top_ids: list[tuple[int, ...]] = field(default_factory=list)
    top_logprobs: list[tuple[float, ...]] = field(default_factory=list)
    dropped_mass: list[float] = field(default_factory=list)
    compute_s: float = 0.0

    def add(self, logits: torch.Tensor, num_top: int) -> None:
        """Take in the logits [n, V] of some served positions; one read for all of them."""
        top = logits.float().log_softmax(-1).topk(min(num_top, logits.shape[-1]), dim=-1)
        # fp64 holds ids and log-probabilities alike. Of a row with a NaN, all are NaN.
        values, ids = torch.stack((top.values.double(), top.indices.double())).cpu()
        if bool(torch.isnan(values).any()):
            raise BadLogitsError("logits of a replay are NaN; see the variant's log")
        self.top_ids += [tuple(row) for row in ids.long().tolist()]
        self.top_logprobs += [tuple(row) for row in values.tolist()]


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

    def prefill(self, request: EngineRequest) -> tuple[TokenLogprob, float]:
        """Feed the prompt and what was sent already; returns the next token and the model seconds so far."""
        sampler = Sampler(request, self._grammars)  # first: a grammar that is none costs no pass
        live = _Live(request, DynamicCache(config=self._model.config), sampler)
        self._live[request.request_id] = live
        return self._advance(live, [*request.prompt_ids, *request.sent_ids], len(request.prompt_ids))

    def decode(self, request_id: str) -> tuple[TokenLogprob, float]:
        """Feed the token chosen last and choose the next one."""
        live = self._live[request_id]
        return self._advance(live, [live.next_id], len(live.request.prompt_ids))

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
        """Teacher-force a sequence and report what the model would have said at each served position.

        A thinned replay also measures what mass some rows of answer and prompt drop, which it does not cost.
        """
        self._use_rung(request.rung_id, request.prompt_end)
        cache, scores = DynamicCache(config=self._model.config), _Scores()
        for begin, end, is_measured in _pieces(request, self._piece_tokens):
            start_s = self._now_s()
            # Positions num_prompt - 1 .. len - 2 predict the served tokens; all others need no logits.
            first, last = max(begin, request.num_prompt - 1), min(end, len(request.ids) - 1)
            with self._recording(request.rung_id, is_measured) as rows:
                logits = self._forward(list(request.ids[begin:end]), cache, keep=max(end - first, 0))
            if last > first:
                scores.add(logits[: last - first], request.num_top)
            else:
                synchronize(self._device)  # nothing was read: a GPU may still be at it
            scores.compute_s += self._now_s() - start_s
            if rows:
                scores.dropped_mass += torch.cat([part.dropped().flatten() for part in rows]).tolist()
        return ScoreResult(
            top_ids=tuple(scores.top_ids),
            top_logprobs=tuple(scores.top_logprobs),
            compute_s=scores.compute_s,
            dropped_mass=tuple(scores.dropped_mass),
        )

    def _recording(self, rung_id: str, is_measured: bool) -> AbstractContextManager[Sequence[Rows]]:
        if self.retrofit is None or rung_id == DENSE_RUNG or not is_measured:
            return nullcontext(())
        return self.retrofit.recording_rows(MEASURED_ROWS)

    def _advance(self, live: _Live, ids: list[int], num_prompt: int) -> tuple[TokenLogprob, float]:
        start_s = self._now_s()
        self._use_rung(live.request.rung_id, num_prompt)
        if self.retrofit is not None:
            self.retrofit.reset_stats()
        logits = self._forward(ids, live.cache, keep=1)[0]
        if self.retrofit is not None:
            live.meter.add(self.retrofit.stats().calls)
        token = live.sampler.choose(logits)
        live.next_id = token.token_id
        live.compute_s += self._now_s() - start_s
        return token, live.compute_s

    def _forward(self, ids: list[int], cache: Any, keep: int) -> torch.Tensor:
        """Run the model over `ids` behind `cache`; returns logits [keep, V] of the last positions."""
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=self._device)
            return run_in_pieces(self._model, inputs, cache, size=self._piece_tokens, keep=keep)[0]

    @property
    def _piece_tokens(self) -> int | None:
        return None if self.retrofit is None else self.retrofit.piece_tokens

    def _now_s(self) -> float:
        """Seconds that only work adds to, read where the device is idle: the cost of a request.

        Of this process's processors, whatever else runs on the same cores; with a GPU, which a replica keeps
        busy with one pass at a time, those of the wall clock.
        """
        return time.process_time() if self._device.type == "cpu" else time.perf_counter()

    def _use_rung(self, rung_id: str, num_prompt: int) -> None:
        if self.retrofit is None:
            if rung_id != DENSE_RUNG:
                raise EngineRefusedError(
                    f"rung {rung_id!r} on a model without an adapter; only 'dense' runs here"
                )
            return
        if rung_id != self._rung_id:
            self.retrofit.set_rung(rung_id)
            self._rung_id = rung_id
        self.retrofit.set_prompt_tokens(num_prompt)


def _pieces(request: ScoreRequest, piece_tokens: int | None) -> Iterator[tuple[int, int, bool]]:
    """Cut the prompt and the answer each by its own size: begin, end, and whether rows are measured there."""
    served = len(request.ids) - request.num_prompt
    size = request.prompt_chunk_tokens
    if size is None:
        borders = list(cut_pieces(request.num_prompt, piece_tokens))
    else:
        begins = range(0, request.num_prompt, size)
        borders = [(begin, min(begin + size, request.num_prompt)) for begin in begins]
    for begin, end in borders:
        yield begin, end, end == request.num_prompt
    size = request.served_chunk_tokens or served
    every = -(-served // (size * MEASURED_ROWS))
    for i, begin in enumerate(range(request.num_prompt, len(request.ids), size)):
        yield begin, min(begin + size, len(request.ids)), i % every == 0
