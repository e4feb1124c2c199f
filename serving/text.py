"""Text at the ingress: prompts to ids, ids back to text piece by piece, and stop strings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentei.serving.openai import Message
from sentei.serving.ports import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character whose rest is still to come


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation; a model without chat template gets the plain texts, one per line."""
    if getattr(tokenizer, "chat_template", None):
        conversation: Any = [{"role": m.role, "content": m.text()} for m in messages]
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(str(rendered), add_special_tokens=False)
    return tokenizer.encode("\n".join(message.text() for message in messages))


class Detokenizer:
    """Turns ids into text as they come; half a character is held back until it is whole.

    Only a window is decoded again at each step: `_begin` starts it early enough that joining rules, such as a
    dropped leading space, work out the same as in the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        self._done = 0

    def add(self, ids: Sequence[int]) -> str:
        """Take in ids and return the text that is certain now."""
        self._ids += ids
        before = self._decode(self._begin, self._done)
        whole = self._decode(self._begin, len(self._ids))
        if len(whole) <= len(before) or whole.endswith(UNFINISHED):
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return whole[len(before) :]

    def flush(self) -> str:
        """Return what is left at the end, even if it is half a character."""
        before = self._decode(self._begin, self._done)
        whole = self._decode(self._begin, len(self._ids))
        self._begin = self._done = len(self._ids)
        return whole[len(before) :]

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)


class StopScanner:
    """Finds stop strings in a stream of text; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False

    def add(self, text: str) -> str:
        """Take in text and return what may be sent; after a stop string nothing more comes."""
        if self.has_stopped or not self._stops:
            return "" if self.has_stopped else text
        self._held += text
        found = [i for i in (self._held.find(stop) for stop in self._stops) if i >= 0]
        if found:
            self.has_stopped = True
            sendable, self._held = self._held[: min(found)], ""
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
