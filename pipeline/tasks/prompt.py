"""What all recall tasks share: words, filler, and a prompt that fits a number of tokens."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sentei.errors import SenteiError
from sentei.pipeline.text.corpus import Corpus, Document, encode_text, load_corpus, split_documents

TaskName = Literal["passkey", "key_value", "copy", "multi_key", "variable_value", "variable_names"]

_WORD_TEXT = """
acorn actor amber anchor angel apple april arrow autumn bacon badge bamboo banana barrel basil beach
bear beaver berry blanket boat bottle brick bridge butter button cabin cactus camel candle canyon
carpet carrot castle cedar cherry chicken circus clock cloud clover coast cobra coconut coffee
copper coral cotton cousin cradle crystal daisy dancer desert diamond doctor dolphin donkey dragon
eagle ember engine falcon farmer feather fiddle flower forest fossil fox garden garlic ginger
glacier goose grape guitar hammer harbor harvest hazel helmet honey horse island ivory jacket jaguar
jewel jungle kettle kitten ladder lantern lemon lion lizard lobster magnet mango maple marble meadow
melon mirror monkey moose mountain muffin needle ocean olive onion orange orchid otter oyster
panther parrot peanut pearl pepper piano pigeon pillow pirate planet potato prairie pumpkin rabbit
radish raven ribbon river rocket saddle salmon shadow silver spider sugar summer sunset thunder
tiger tomato tulip turtle valley velvet violin walnut whale willow window winter wizard wolf zebra
"""
WORDS = tuple(_WORD_TEXT.split())
LIST_WORDS = 8
MAX_LINE_CHARS = 160


class TaskError(SenteiError, ValueError):
    """A task that cannot be made; the message names the value and the way out."""


@dataclass(frozen=True, slots=True)
class RecallTask:
    """One prompt with one right answer; depth 0 puts the note first, 1 right before the question."""

    name: TaskName
    prompt: str
    answer: str
    depth: float
    prompt_tokens: int
    answer_tokens: int
    is_ordered: bool = True


def is_correct(task: RecallTask, generated_text: str) -> bool:
    """Say whether the text generated after the prompt starts with the answer as whole words.

    Where order does not matter, its first words must be the answer's, whatever stands between them.
    """
    if not task.is_ordered:
        wanted = task.answer.casefold().split()
        words = [word for word in re.findall(r"\w+", generated_text.casefold()) if word != "and"]
        return sorted(words[: len(wanted)]) == sorted(wanted)
    found = " ".join(generated_text.lstrip(" \t\n\"'`*:").casefold().split())
    answer = task.answer.casefold()
    return found.startswith(answer) and not found[len(answer) : len(answer) + 1].isalnum()


def usable_words(tokenizer: Any) -> list[str]:
    """Return the words that take the fewest tokens: one each, or two where too few of one exist."""
    by_size: dict[int, list[str]] = {1: [], 2: []}
    encoded = tokenizer([f" {word}" for word in WORDS], add_special_tokens=False)["input_ids"]
    for word, ids in zip(WORDS, encoded, strict=True):
        for size in range(max(1, len(ids)), 3):
            by_size[size].append(word)
    words = by_size[1] if len(by_size[1]) >= 64 else by_size[2]
    if len(words) < 2 * LIST_WORDS:
        raise TaskError(
            f"only {len(words)} of {len(WORDS)} task words take at most two tokens in this tokenizer; "
            f"at least {2 * LIST_WORDS} are needed, so it does not suit recall tasks"
        )
    return words


def split_lines(text: str) -> list[str]:
    """Return a text's lines with their newlines, without the overlong ones."""
    return [line + "\n" for line in text.split("\n") if len(line) <= MAX_LINE_CHARS]


@lru_cache(maxsize=1)
def _held_out_documents() -> tuple[Document, ...]:
    corpus: Corpus = load_corpus(None)
    return split_documents(corpus)[1]


def make_filler(rng: random.Random, documents: Sequence[Document] | None) -> list[str]:
    """Return lines of held-out text from a random place."""
    sources = list(documents if documents is not None else _held_out_documents())
    rng.shuffle(sources)
    lines: list[str] = []
    for document in sources:
        own = split_lines(document.text)
        lines.extend(own[rng.randrange(max(1, len(own) // 2)) :])
        if len(lines) > 20_000:
            break
    if not any(line.strip() for line in lines):
        raise TaskError(
            f"{len(sources)} document(s) hold no filler line of at most {MAX_LINE_CHARS} characters"
        )
    return lines


def fit_prompt(
    tokenizer: Any,
    lines: Sequence[str],
    notes: Sequence[tuple[float, str]],
    question: str,
    prompt_tokens: int,
) -> str:
    """Put notes between as many filler lines as fit; the count is checked on the whole prompt."""
    bare = count_tokens(tokenizer, _join_prompt([], notes, question))
    if bare > prompt_tokens:
        raise TaskError(
            f"prompt_tokens is {prompt_tokens}, but notes and question take {bare}; "
            "allow more tokens, or ask for fewer pairs"
        )
    chosen = _take_lines(tokenizer, lines, prompt_tokens - bare)
    prompt = _join_prompt(chosen, notes, question)
    while chosen and (excess := count_tokens(tokenizer, prompt) - prompt_tokens) > 0:
        del chosen[-max(1, excess // 40) :]
        prompt = _join_prompt(chosen, notes, question)
    return prompt


def _take_lines(tokenizer: Any, lines: Sequence[str], budget: int) -> list[str]:
    chosen: list[str] = []
    start = 0
    while True:
        batch = [lines[(start + i) % len(lines)] for i in range(min(len(lines), 256))]
        for line, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):
            budget -= max(1, len(ids))
            if budget < 0:
                return chosen
            chosen.append(line)
        start += len(batch)


def _join_prompt(lines: Sequence[str], notes: Sequence[tuple[float, str]], question: str) -> str:
    parts: list[str] = []
    done = 0
    for depth, note in sorted(notes):
        place = round(depth * len(lines))
        parts.extend([*lines[done:place], note])
        done = place
    return "".join([*parts, *lines[done:], question])


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return a prompt's size with the special tokens that the tokenizer adds."""
    return len(tokenizer(text, verbose=False)["input_ids"])


def check_depth(depth: float) -> float:
    """Return the depth, or raise TaskError if it is none."""
    if not 0.0 <= depth <= 1.0:
        raise TaskError(f"depth is {depth}; it must lie between 0 (start) and 1 (end)")
    return depth


def make_task(
    tokenizer: Any, name: TaskName, prompt: str, answer: str, depth: float, *, is_ordered: bool = True
) -> RecallTask:
    """Count the tokens of prompt and answer, and return the task."""
    return RecallTask(
        name=name,
        prompt=prompt,
        answer=answer,
        depth=depth,
        prompt_tokens=count_tokens(tokenizer, prompt),
        answer_tokens=len(encode_text(tokenizer, f" {answer}")),
        is_ordered=is_ordered,
    )
