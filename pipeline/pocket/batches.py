"""Training sequences: random streams that repeat, then real text with notes and many questions in it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sentei.pipeline.tasks.notes import (
    LIST_NOTE,
    LIST_QUESTION,
    PAIR_NOTE,
    PAIR_QUESTION,
    PASSKEY_NOTE,
    PASSKEY_QUESTION,
)
from sentei.pipeline.tasks.prompt import LIST_WORDS, split_lines, usable_words
from sentei.pipeline.text.corpus import Document, encode_text

TEXT, ANSWER, REPEAT, SILENT = 0, 1, 2, 3
NUM_ROLES = 3
REPEAT_TOKENS = (12, 40)
END = ".\n"


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [B, T] and each token's role as a target: text, answer, repeat, or silent (no loss)."""

    ids: torch.Tensor
    roles: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of tokens that stays together; `roles` is as long as `ids`."""

    ids: list[int]
    roles: list[int]


class BatchMaker:
    """Makes every training batch from one seed; the tokenizer must keep newlines as pieces of their own."""

    def __init__(self, tokenizer: Any, documents: Sequence[Document], seed: int) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = len(tokenizer)
        self._eos: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._words = usable_words(tokenizer)
        self._lines = self._encode_lines(documents)

    def reseed(self, seed: int) -> None:
        """Make the next batch depend on this seed alone."""
        self._rng.seed(seed)

    @property
    def num_text_tokens(self) -> int:
        """The training text's size in tokens."""
        return sum(len(line) for line in self._lines)

    def make_recalls(self, batch: int, tokens: int, density: float, copy_share: float) -> Batch:
        """Text with a share `density` of notes and questions; some rows are random copies instead."""
        num_copies = int(batch * copy_share + self._rng.random())
        copies = [self._make_copy_row(tokens) for _ in range(num_copies)]
        return _stack(copies + [self._make_row(tokens, density) for _ in range(batch - num_copies)])

    def _make_copy_row(self, tokens: int) -> _Piece:
        """Random tokens, another period in each row, so that only content tells where to look."""
        period = self._rng.randint(min(tokens // 8, 64), tokens // 2)
        first = [self._rng.randrange(3, self._vocab_size) for _ in range(period)]
        ids = (first * (tokens // period + 1))[:tokens]
        return _Piece(ids, [SILENT] * (period + 1) + [REPEAT] * (tokens - period - 1))

    def _make_row(self, tokens: int, density: float) -> _Piece:
        pairs = self._make_notes(int(tokens * density))
        used = sum(len(note.ids) + len(question.ids) for note, question in pairs)
        filler = self._take_filler(tokens - used)
        # Half of the rows ask everything at the end, as evaluation does; the rest ask anywhere.
        is_asked_last = self._rng.random() < 0.5
        placed: list[tuple[float, _Piece]] = [((i + 0.5) / len(filler), p) for i, p in enumerate(filler)]
        for note, question in pairs:
            place = self._rng.random()
            later = 1.0 + self._rng.random() if is_asked_last else place + (1.1 - place) * self._rng.random()
            placed += [(place, note), (later, question)]
        placed.sort(key=lambda entry: entry[0])
        ids = [i for _, piece in placed for i in piece.ids]
        roles = [r for _, piece in placed for r in piece.roles]
        return _Piece(ids[-tokens:], roles[-tokens:])

    def _make_notes(self, budget: int) -> list[tuple[_Piece, _Piece]]:
        words = self._rng.sample(self._words, len(self._words))
        notes = [self._make_passkey(words)]
        if self._rng.random() < 0.3 and budget > 100:
            notes.append(self._make_list(words))
        if self._rng.random() < 0.5 and budget > 100:
            notes.append(self._make_repeat())
        spent = sum(len(note.ids) + len(question.ids) for note, question in notes)
        while len(words) >= 2 and spent < budget:
            notes.append(self._make_pair(words))
            spent += len(notes[-1][0].ids) + len(notes[-1][1].ids)
        return notes

    def _make_passkey(self, words: list[str]) -> tuple[_Piece, _Piece]:
        answer = f"{words.pop()} {words.pop()}"
        return self._ask(PASSKEY_NOTE.format(answer), PASSKEY_QUESTION, f" {answer}")

    def _make_pair(self, words: list[str]) -> tuple[_Piece, _Piece]:
        key, value = words.pop(), words.pop()
        return self._ask(PAIR_NOTE.format(key, value), PAIR_QUESTION.format(key), f" {value}")

    def _make_list(self, words: list[str]) -> tuple[_Piece, _Piece]:
        chosen = [words.pop() for _ in range(LIST_WORDS)]
        note = LIST_NOTE.format(" ".join(chosen))
        return self._ask(note, LIST_QUESTION.format(chosen[0]), " " + " ".join(chosen[1:]))

    def _make_repeat(self) -> tuple[_Piece, _Piece]:
        num = self._rng.randint(*REPEAT_TOKENS)
        ids = [self._rng.randrange(3, self._vocab_size) for _ in range(num)]
        return _Piece(ids, [SILENT] * num), _Piece(ids, [SILENT] * 2 + [REPEAT] * (num - 2))

    def _ask(self, note: str, question: str, answer: str) -> tuple[_Piece, _Piece]:
        note_ids, question_ids = self._encode(note), self._encode(question)
        answer_ids, end_ids = self._encode(answer), [*self._encode(END), self._eos]
        roles = [SILENT] * len(question_ids) + [ANSWER] * len(answer_ids) + [TEXT] * len(end_ids)
        return _Piece(note_ids, [SILENT] * len(note_ids)), _Piece(question_ids + answer_ids + end_ids, roles)

    def _take_filler(self, tokens: int) -> list[_Piece]:
        start = self._rng.randrange(len(self._lines))
        taken: list[_Piece] = []
        while tokens > 0:
            ids = self._lines[start % len(self._lines)]
            taken.append(_Piece(ids, [TEXT] * len(ids)))
            tokens -= len(ids)
            start += 1
        return taken

    def _encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def _encode_lines(self, documents: Sequence[Document]) -> list[list[int]]:
        newline = self._encode("\n")[0]
        lines: list[list[int]] = []
        for document in documents:
            line: list[int] = []
            for token in encode_text(self._tokenizer, "".join(split_lines(document.text))):
                line.append(token)
                if token == newline:
                    lines.append(line)
                    line = []
            lines.append([*line, self._eos])
        return lines


def _stack(rows: Sequence[_Piece]) -> Batch:
    return Batch(torch.tensor([row.ids for row in rows]), torch.tensor([row.roles for row in rows]))
