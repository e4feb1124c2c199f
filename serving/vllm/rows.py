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

from sentei.serving.engine.request import DENSE_RUNG, Sampling
from sentei.serving.engine.sampler import sample_token
from sentei.serving.vllm.asked import Asked, read_asked
from sentei.serving.vllm.state import WorkerState, find_state

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One request in the batch; `written` grows as vLLM appends the tokens of its answer."""

    asked: Asked
    prompt_tokens: int
    written: Sequence[int]
    stop_id: int | None = None

    def num_answered(self) -> int:
        """Tokens of the answer so far, those that another engine sent included."""
        return self.prompt_tokens - (self.asked.prompt_tokens or self.prompt_tokens) + len(self.written)

    @property
    def user_prompt_tokens(self) -> int:
        """Where the user's prompt ends."""
        return self.asked.prompt_tokens or self.prompt_tokens


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
            stops = sorted(params.stop_token_ids or ())
            self._rows[index] = Row(
                self._served(read_asked(params.extra_args)),
                len(prompt or ()),
                written,
                stops[0] if stops else None,
            )
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
            if index >= logits.shape[0]:
                continue
            chosen = self._choose(logits[index], row) if finite[index] else self._give_up(row)
            if chosen is not None:
                logits[index] = -torch.inf
                logits[index, chosen] = 0.0
        self._state.meter.end_step()
        return logits

    def _served(self, asked: Asked) -> Asked:
        """Serve dense what names a rung that is not there; our own server refuses it before it comes here."""
        assert self._state is not None
        if asked.rung in {rung.id for rung in self._state.ladder.rungs}:
            return asked
        log.warning("rung %r is not on this engine's ladder; the request is served dense", asked.rung)
        return replace(asked, rung=DENSE_RUNG)

    def _choose(self, logits: torch.Tensor, row: Row) -> int | None:
        i_token, asked = row.num_answered(), row.asked
        if asked.forced:
            return asked.forced[i_token] if i_token < len(asked.forced) else None
        if asked.temperature == 0.0:
            return None
        return sample_token(logits, Sampling(asked.temperature, asked.top_p, asked.seed), i_token).token_id

    def _give_up(self, row: Row) -> int:
        """End a row whose logits are not finite; whoever asks what it used hears why."""
        assert self._state is not None
        self._state.meter.note_bad_logits(row.asked.ticket)
        return row.stop_id if row.stop_id is not None else 0
