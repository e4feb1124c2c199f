"""Needles: notes hidden in filler, one of them asked for, after RULER's family of that name, own words.

Each task ends with the beginning of one note, so that the only way to continue it rightly is to find that
note again.
"""

import random
from collections.abc import Sequence
from typing import Any

from sentei.pipeline.tasks.prompt import (
    LIST_WORDS,
    RecallTask,
    TaskError,
    check_depth,
    fit_prompt,
    make_filler,
    make_task,
    usable_words,
)
from sentei.pipeline.text.corpus import Document

PASSKEY_NOTE, PASSKEY_QUESTION = "Remember the passkey {}.\n", "Now repeat the passkey"
PAIR_NOTE, PAIR_QUESTION = "Remember the pair {} {}.\n", "Now repeat the pair {}"
LIST_NOTE, LIST_QUESTION = "Remember the list {}.\n", "Now repeat the list {}"
KEY_NOTE, KEY_QUESTION = "Remember the passkey of {} {}.\n", "Now repeat the passkey of {}"
NUM_NEEDLES = 4


def make_passkey(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Hide one passkey of two words in filler; the prompt takes at most `prompt_tokens` tokens."""
    rng = random.Random(f"passkey {seed}")
    answer = " ".join(rng.sample(usable_words(tokenizer), 2))
    notes = [(check_depth(depth), PASSKEY_NOTE.format(answer))]
    lines = make_filler(rng, documents)
    prompt = fit_prompt(tokenizer, lines, notes, PASSKEY_QUESTION, prompt_tokens)
    return make_task(tokenizer, "passkey", prompt, answer, depth)


def make_key_value(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    num_pairs: int | None = None,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Hide pairs of words in filler and ask for one of them, whose note lies at `depth`."""
    rng = random.Random(f"key_value {seed}")
    words = usable_words(tokenizer)
    pairs = num_pairs if num_pairs is not None else max(2, min(24, prompt_tokens // 128))
    if not 1 <= pairs <= len(words) // 2:
        raise TaskError(f"num_pairs is {pairs}; this tokenizer has words for 1 to {len(words) // 2} pairs")
    chosen = rng.sample(words, 2 * pairs)
    depths = [check_depth(depth), *(rng.random() for _ in range(pairs - 1))]
    notes = [
        (d, PAIR_NOTE.format(k, v)) for d, k, v in zip(depths, chosen[:pairs], chosen[pairs:], strict=True)
    ]
    lines = make_filler(rng, documents)
    prompt = fit_prompt(tokenizer, lines, notes, PAIR_QUESTION.format(chosen[0]), prompt_tokens)
    return make_task(tokenizer, "key_value", prompt, chosen[pairs], depth)


def make_copy(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Hide a list of eight words in filler; the question gives the first and asks for the other seven."""
    rng = random.Random(f"copy {seed}")
    words = rng.sample(usable_words(tokenizer), LIST_WORDS)
    notes = [(check_depth(depth), LIST_NOTE.format(" ".join(words)))]
    lines = make_filler(rng, documents)
    prompt = fit_prompt(tokenizer, lines, notes, LIST_QUESTION.format(words[0]), prompt_tokens)
    return make_task(tokenizer, "copy", prompt, " ".join(words[1:]), depth)


def make_multi_key(
    tokenizer: Any,
    *,
    prompt_tokens: int,
    depth: float,
    seed: int,
    num_needles: int = NUM_NEEDLES,
    documents: Sequence[Document] | None = None,
) -> RecallTask:
    """Hide several passkeys, each under a name of its own, and ask for the one whose note lies at `depth`."""
    rng = random.Random(f"multi_key {seed}")
    words = usable_words(tokenizer)
    if not 2 <= num_needles <= len(words) // 3:
        raise TaskError(
            f"num_needles is {num_needles}; this tokenizer has words for 2 to {len(words) // 3} needles"
        )
    chosen = rng.sample(words, 3 * num_needles)
    keys, values = chosen[:num_needles], chosen[num_needles:]
    passkeys = [" ".join(values[2 * i : 2 * i + 2]) for i in range(num_needles)]
    depths = [check_depth(depth), *(rng.random() for _ in range(num_needles - 1))]
    notes = [(d, KEY_NOTE.format(k, v)) for d, k, v in zip(depths, keys, passkeys, strict=True)]
    lines = make_filler(rng, documents)
    prompt = fit_prompt(tokenizer, lines, notes, KEY_QUESTION.format(keys[0]), prompt_tokens)
    return make_task(tokenizer, "multi_key", prompt, passkeys[0], depth)
