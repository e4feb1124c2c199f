"""Variable tracking: chains of assignments hidden in filler, after RULER's task of that name, own words.

A chain gives a number to a variable and hands it on from name to name; other chains lie between. Asked for is
the number at the end of one chain, or all names that hold a number.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentei.pipeline.tasks.prompt import (
    RecallTask,
    TaskError,
    check_depth,
    fit_prompt,
    make_filler,
    make_task,
    usable_words,
)
from sentei.pipeline.text.corpus import Document

VARIABLE_NOTE = "Remember the variable {} = {}.\n"
VALUE_QUESTION = "Now follow the variables: {} ="
NAMES_QUESTION = "Now list the variables that hold {}:"
NUM_CHAINS, NUM_HOPS = 2, 2


@dataclass(frozen=True, slots=True)
class _Chain:
    """A number and the names that hold it, in the order of their notes."""

    value: str
    names: tuple[str, ...]

    def notes(self, start: float) -> list[tuple[float, str]]:
        """Return the assignments, spread evenly from `start` to the end of the text."""
        sources = (self.value, *self.names[:-1])
        return [
            (start + (1 - start) * i / len(self.names), VARIABLE_NOTE.format(name, source))
            for i, (name, source) in enumerate(zip(self.names, sources, strict=True))
        ]


def make_variable_value(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    num_chains: int = NUM_CHAINS,
    num_hops: int = NUM_HOPS,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Ask for the number at the end of a chain of `num_hops` hand-overs that begins at `depth`."""
    rng = random.Random(f"variable_value {seed}")
    chains = _make_chains(rng, tokenizer, num_chains, num_hops)
    notes = _place_notes(rng, chains, depth)
    question = VALUE_QUESTION.format(chains[0].names[-1])
    prompt = fit_prompt(tokenizer, make_filler(rng, documents), notes, question, prompt_tokens)
    return make_task(tokenizer, "variable_value", prompt, chains[0].value, depth)


def make_variable_names(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    num_chains: int = NUM_CHAINS,
    num_hops: int = NUM_HOPS,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Ask for all names that hold a chain's number, in any order; the chain begins at `depth`."""
    rng = random.Random(f"variable_names {seed}")
    chains = _make_chains(rng, tokenizer, num_chains, num_hops)
    notes = _place_notes(rng, chains, depth)
    question = NAMES_QUESTION.format(chains[0].value)
    prompt = fit_prompt(tokenizer, make_filler(rng, documents), notes, question, prompt_tokens)
    answer = " ".join(chains[0].names)
    return make_task(tokenizer, "variable_names", prompt, answer, depth, is_ordered=False)


def _make_chains(rng: random.Random, tokenizer: Any, num_chains: int, num_hops: int) -> list[_Chain]:
    words = usable_words(tokenizer)
    size = num_hops + 1
    if num_hops < 1 or not 1 <= num_chains <= len(words) // size:
        raise TaskError(
            f"num_chains is {num_chains} and num_hops is {num_hops}; at least one hop is needed, and this "
            f"tokenizer has words for {len(words)} variables"
        )
    names = rng.sample(words, num_chains * size)
    values = rng.sample(range(10_000, 100_000), num_chains)
    return [_Chain(str(value), tuple(names[i * size : (i + 1) * size])) for i, value in enumerate(values)]


def _place_notes(rng: random.Random, chains: Sequence[_Chain], depth: float) -> list[tuple[float, str]]:
    starts = [check_depth(depth), *(rng.random() for _ in chains[1:])]
    # At depth 1 all notes of a chain would stand at one place, in no order.
    return [
        note for chain, start in zip(chains, starts, strict=True) for note in chain.notes(min(start, 0.999))
    ]
