"""Which rows of a step are thinned, and how: a function of positions alone, never of how a prompt was cut.

Before the user's prompt ends, rows choose in query blocks; behind it each row chooses by itself, also where
vLLM computes several of an answer's rows at once: after a preemption, or behind tokens that were sent before.
A query block whose first row sees fewer tokens than the break-even keeps everything, and so do the last
rows of the user's prompt, as many as the rung says.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from sentei.kernels.hf.ladder import Rung


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `first` to `last` - 1 of one sequence, which lie in the batch from `token` on."""

    index: int
    ticket: str
    rung: Rung
    token: int
    first: int
    last: int

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
        fed.append(part)
        opens = part.rung.break_even_tokens - 1  # the first position that may be thinned
        border = min(max(end, part.first), part.last)
        closing = min(max(part.rung.last_from(end, block_q), part.first), border)
        for in_prompt in _cut(part, part.first, closing):
            (prompts if in_prompt.last > opens else dense).append(in_prompt)
        dense += _cut(part, closing, border)
        opening = min(max(opens, border), part.last)
        dense += _cut(part, border, opening)
        for i in range(opening, part.last):
            singles += _cut(part, i, i + 1)
    return StepPlan(tuple(dense), tuple(prompts), tuple(singles), tuple(fed))


def _cut(part: Part, first: int, last: int) -> list[Part]:
    """Return the tokens first to last - 1 of a part; nothing where there are none."""
    if last <= first:
        return []
    return [Part(part.index, part.ticket, part.rung, part.token + first - part.first, first, last)]
