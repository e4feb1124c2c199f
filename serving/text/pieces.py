"""Text at the ingress: ids back to text piece by piece, the bytes of a token, and stop strings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sentei.serving.engine.grammar import make_vocabulary
from sentei.serving.errors import GrammarError
from sentei.serving.ports import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character whose rest is still to come


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made; `arguments` is JSON text, `index` counts the calls of one answer."""

    index: int
    call_id: str
    name: str
    arguments: str


class TokenTexts:
    """Each token alone: its own bytes, and a name by which no two tokens are the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _vocabulary(self) -> Any:
        try:
            return make_vocabulary(self._tokenizer)
        except GrammarError:
            return None  # a tokenizer without bytes of its own, such as a slow one: its text must do

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; half a character is what it is."""
        text = self._tokenizer.decode([token_id])
        if self._vocabulary is None:
            return text.encode()
        found: bytes = self._vocabulary.decode_bytes([token_id])
        # The library keeps byte 255, which no UTF-8 text has, as a mark of its own, and gives nothing for it.
        return found if found or text != UNFINISHED else b"\xff"

    def name_of(self, token_id: int) -> str:
        """Return a token's text, or its bytes as OpenAI writes those of half a character."""
        found = self.bytes_of(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class Detokenizer:
    """Turns ids into text as they come; half a character is held back until it is whole, and then counted.

    Only a window is decoded again at each step: `_begin` starts it early enough that joining rules, such as a
    dropped leading space, work out the same as in the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        self._done = 0
        self.num_chars = 0

    def add(self, ids: Sequence[int]) -> str:
        """Take in ids and return the text that is certain now."""
        self._ids += ids
        before = self._decode(self._begin, self._done)
        whole = self._decode(self._begin, len(self._ids))
        if len(whole) <= len(before) or whole.endswith(UNFINISHED):
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return self._count(whole[len(before) :])

    def flush(self) -> str:
        """Return what is left at the end, even if it is half a character."""
        before = self._decode(self._begin, self._done)
        whole = self._decode(self._begin, len(self._ids))
        self._begin = self._done = len(self._ids)
        return self._count(whole[len(before) :])

    def _count(self, text: str) -> str:
        self.num_chars += len(text)
        return text

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)


class StopScanner:
    """Finds stop strings in a stream of text; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False
        self.rest = ""  # what came behind the stop string, together with it

    def add(self, text: str) -> str:
        """Take in text and return what may be sent; after a stop string nothing more comes."""
        if self.has_stopped or not self._stops:
            return "" if self.has_stopped else text
        self._held += text
        found = [(i, stop) for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            i, stop = min(found)
            sendable, self.rest, self._held = self._held[:i], self._held[i + len(stop) :], ""
            return sendable
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        sendable, self._held = self._held[:cut], self._held[cut:]
        return sendable

    def flush(self) -> str:
        """Return what was held back when no more text comes."""
        left, self._held = self._held, ""
        return left


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
