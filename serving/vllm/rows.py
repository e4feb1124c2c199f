"""Who sits in which row of vLLM's batch, and which token comes next where it is not the model's first choice.

A logits processor is the one official hook of a worker that hears of requests: it is told of each row that
is added, removed or moved, and with which parameters, before the step's attention metadata is built.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from sentei.serving.engine.request import DENSE_RUNG, EngineRequest
from sentei.serving.engine.sampler import Sampler
from sentei.serving.errors import GrammarError
from sentei.serving.vllm.asked import Asked, read_asked
from sentei.serving.vllm.state import WorkerState, find_state

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One request in the batch; `written` grows as vLLM appends the tokens of its answer."""

    asked: Asked
    prompt: Sequence[int]
    written: Sequence[int]
    stop_id: int | None = None
    sampler: Sampler | None = None

    @property
    def user_prompt_tokens(self) -> int:
        """Where the user's prompt ends."""
        return self.asked.prompt_tokens or len(self.prompt)

    @property
    def num_answered(self) -> int:
        """Tokens of the answer so far, those that another engine sent included."""
        return len(self.prompt) - self.user_prompt_tokens + len(self.written)

    def is_complete(self, num_computed: int) -> bool:
        """Whether a step that ends there chooses a token; before, vLLM throws its choice away."""
        return num_computed == len(self.prompt) + len(self.written)


NOBODY = Row(Asked(), (), ())


class RowTracker(LogitsProcessor):
    """Keeps the rows for the attention backend, and forces or draws tokens."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory  # what follows lies on the host
        self._state: WorkerState | None = find_state(vllm_config, device)
        self._rows: dict[int, Row] = {} if self._state is None else self._state.rows

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse, in the frontend, a request whose wishes cannot be read."""
        read_asked(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """Forced rows change the argmax; without our options nothing is changed."""
        return self._state is None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch; vLLM calls this once in each step, first of all."""
        if self._state is None:
            return
        self._state.meter.begin_step()
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, written in batch_update.added:
            self._rows[index] = self._make_row(params, prompt or (), written)
        for one, other, direction in batch_update.moved:
            first, second = self._rows.pop(one, None), self._rows.pop(other, None)
            if first is not None:
                self._rows[other] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self._rows[one] = second

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave one choice in each row that is forced or drawn; raw log-probabilities were taken before."""
        if self._state is None:
            return logits
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        for index, row in self._rows.items():
            if index >= len(finite) or not row.is_complete(self._state.ends.get(index, 0)):
                continue
            if not finite[index]:
                self._state.meter.note_bad_logits(row.asked.ticket)
            chosen = self._choose(logits[index], row) if finite[index] else row.stop_id or 0
            if chosen is not None:
                logits[index] = -torch.inf
                logits[index, chosen] = 0.0
        self._state.meter.end_step()
        return logits

    def _choose(self, logits: torch.Tensor, row: Row) -> int | None:
        """Return the token that must come; None where the model's first choice stands."""
        if row.asked.forced:
            left = row.asked.forced[row.num_answered :]
            return left[0] if left else None
        if row.sampler is None:
            return None
        try:
            return row.sampler.choose(logits).token_id
        except GrammarError as error:
            assert self._state is not None
            self._state.meter.note_grammar_error(row.asked.ticket, str(error))
            return row.stop_id or 0

    def _make_row(self, params: Any, prompt: Sequence[int], written: Sequence[int]) -> Row:
        assert self._state is not None
        stops = sorted(params.stop_token_ids or ())
        row = Row(self._served(read_asked(params.extra_args)), prompt, written, stops[0] if stops else None)
        if row.asked.takes_the_best or row.asked.forced:
            return row
        end = row.user_prompt_tokens
        request = EngineRequest(
            row.asked.ticket,
            tuple(prompt[:end]),
            0,
            sampling=replace(row.asked.sampling, num_top_logprobs=None),
            sent_ids=(*prompt[end:], *written),
        )
        try:
            grammars = None if request.sampling.json_schema is None else self._state.grammars
            return replace(row, sampler=Sampler(request, grammars))
        except GrammarError as error:
            self._state.meter.note_grammar_error(row.asked.ticket, str(error))
            return row

    def _served(self, asked: Asked) -> Asked:
        """Serve dense what names a rung that is not there; our own server refuses it before it comes here."""
        assert self._state is not None
        if asked.rung in {rung.id for rung in self._state.ladder.rungs}:
            return asked
        log.warning("rung %r is not on this engine's ladder; the request is served dense", asked.rung)
        return replace(asked, rung=DENSE_RUNG)
