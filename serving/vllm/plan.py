"""Which rows of a step are thinned, and how: a function of positions alone, never of how a prompt was cut.

Before the user's prompt ends, rows choose in query blocks; behind it each row chooses by itself, also where
vLLM computes several of an answer's rows at once: after a preemption, or behind tokens that were sent before.
A query block whose first row sees fewer tokens than the rung's break-even keeps everything, and so do the
last rows of the user's prompt, as many as the rung says; a row that chooses alone has the break-even of a
decode step. A context longer than the rung was verified for is dense.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from sentei.kernels.hf.ladder import Rung
from sentei.serving.engine.request import MEASURED_ROWS


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `first` to `last` - 1 of one sequence, which lie in the batch from `token` on."""

    index: int
    ticket: str
    rung: Rung
    token: int
    first: int
    last: int
    measured: tuple[int, ...] = ()  # positions among them whose dropped mass is asked for

    @property
    def num_tokens(self) -> int:
        """How many tokens."""
        return self.last - self.first

    def causal_blocks(self, block_q: int, block_k: int) -> float:
        """How many key blocks its query blocks may see, summed; a single token is a block of its own."""
        ends = range(min(self.first + block_q, self.last), self.last + block_q, block_q)
        return float(sum((min(end, self.last) - 1) // block_k + 1 for end in ends))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step's rows for layers that some rungs thin: dense ones, prompts in blocks, tokens that choose alone.

    `fed` are the rows that are thinned, now or once they are longer: their features are kept.
    """

    dense: tuple[Part, ...]
    prompts: tuple[Part, ...]
    singles: tuple[Part, ...]
    fed: tuple[Part, ...]

    @property
    def thins_nothing(self) -> bool:
        """Whether all rows are dense in this step."""
        return not self.prompts and not self.singles


def plan_step(
    parts: Sequence[Part], prompt_ends: Sequence[int], thinning: Set[str], *, block_q: int
) -> StepPlan:
    """Sort a step's rows, for layers that the rungs `thinning` thin.

    `prompt_ends` says for each row where its user's prompt ends; `block_q` rows of it choose together.
    """
    dense: list[Part] = []
    prompts: list[Part] = []
    singles: list[Part] = []
    fed: list[Part] = []
    for part, end in zip(parts, prompt_ends, strict=True):
        if part.rung.id not in thinning:
            dense.append(part)
            continue
        if not part.rung.covers_prompt(end):
            dense.append(part)
            continue
        fed.append(part)
        border = min(max(end, part.first), part.last)
        closing = min(max(part.rung.last_from(end, block_q), part.first), border)
        for in_prompt in _cut(part, part.first, closing):
            (prompts if in_prompt.last >= part.rung.break_even_tokens else dense).append(in_prompt)
        dense += _cut(part, closing, border)
        open_ = [i for i in range(border, part.last) if part.rung.covers_step(i + 1)]
        opening, ending = (open_[0], open_[-1] + 1) if open_ else (part.last, part.last)
        dense += [*_cut(part, border, opening), *_cut(part, ending, part.last)]
        for i in open_:
            singles += _cut(part, i, i + 1)
    return StepPlan(tuple(dense), tuple(prompts), tuple(singles), tuple(fed))


def _cut(part: Part, first: int, last: int) -> list[Part]:
    """Return the tokens first to last - 1 of a part; nothing where there are none."""
    if last <= first:
        return []
    measured = tuple(position for position in part.measured if first <= position < last)
    return [Part(part.index, part.ticket, part.rung, part.token + first - part.first, first, last, measured)]


def measured_rows(first: int, last: int, *, closing: int, end: int, served: int) -> tuple[int, ...]:
    """Return which positions of a replay, of `served` tokens behind a prompt of `end`, say what they dropped.

    As on the built-in engine: the last of the prompt that choose, before `closing`, and as many spread evenly
    over the answer.
    """
    every = -(-served // MEASURED_ROWS)
    return tuple(
        position
        for position in range(max(first, closing - MEASURED_ROWS), last)
        if position < closing or (position >= end and (position - end) % every == 0)
    )
