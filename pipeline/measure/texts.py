"""Texts to measure on: running text with the start token a model expects, and texts that ask for notes."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.pipeline.models import LoadedModel
from sentei.pipeline.tasks.notes import PAIR_NOTE, PAIR_QUESTION, make_key_value
from sentei.pipeline.tasks.prompt import TaskError
from sentei.pipeline.text.corpus import Document, token_windows

RECALL_BLOCKS = 5  # the questions at the end of a recall text take about so many blocks of 64 tokens


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens [T] to run; a recall text ends in questions about notes spread over it."""

    ids: torch.Tensor
    is_recall: bool = False


def make_texts(
    loaded: LoadedModel, documents: Sequence[Document], *, window_tokens: int, num: int, seed: int
) -> list[Text]:
    """Return `num` texts: one third, at least one of several, with notes that are asked for at the end."""
    num_recall = max(num // 3, min(1, num - 1))
    head = bos_tokens(loaded)
    windows = token_windows(
        loaded.tokenizer, documents, window_tokens - len(head), num - num_recall, seed=seed
    )
    texts = [Text(torch.tensor([*head, *window.tolist()])) for window in windows]
    for i in range(num_recall):
        texts.append(Text(_recall_ids(loaded, documents, window_tokens, seed * 1000 + i), is_recall=True))
    return texts


def _recall_ids(
    loaded: LoadedModel, documents: Sequence[Document], window_tokens: int, seed: int
) -> torch.Tensor:
    """Notes of pairs spread over filler, then every pair asked for and answered, in another order."""
    room = RECALL_BLOCKS * 48
    try:
        task = make_key_value(
            loaded.tokenizer, prompt_tokens=window_tokens - room, depth=0.5, seed=seed, documents=documents
        )
    except TaskError as error:
        raise TaskError(
            f"windows of {window_tokens} tokens (--tokens) are too short for a text that asks for notes: "
            f"{room} are kept for the questions at its end, and of the rest {error}"
        ) from error
    # The task's own note and question give the pattern by which the notes are found again.
    before, between, after = PAIR_NOTE.split("{}")
    pattern = re.escape(before) + r"(\w+)" + re.escape(between) + r"(\w+)" + re.escape(after)
    pairs = re.findall(pattern, task.prompt)
    random.Random(seed).shuffle(pairs)
    questions = "\n".join(f"{PAIR_QUESTION.format(key)} {value}" for key, value in pairs)
    ids = loaded.tokenizer(f"{task.prompt} {task.answer}\n{questions}", verbose=False)["input_ids"]
    return torch.tensor(ids[:window_tokens])


def bos_tokens(loaded: LoadedModel) -> list[int]:
    """Return what the tokenizer puts before a text: the start token, or nothing."""
    ids: list[int] = loaded.tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == loaded.tokenizer.bos_token_id else []


def make_windows(
    loaded: LoadedModel, documents: Sequence[Document], *, window_tokens: int, num: int, seed: int
) -> list[torch.Tensor]:
    """Return `num` windows of running text with the start token that the model expects."""
    head = bos_tokens(loaded)
    windows = token_windows(loaded.tokenizer, documents, window_tokens - len(head), num, seed=seed)
    return [torch.tensor([*head, *window.tolist()]) for window in windows]
