"""Prompts too long to be worth a tokenizer's time: told by bytes first, then by a part of the text."""

from __future__ import annotations

from typing import Any

from sentei.serving.errors import RequestError
from sentei.serving.ports import Tokenizer

PROBE_CHARS_PER_TOKEN = 4  # most texts that fit are not longer, so they are never probed
SURE = 1.25  # a part with this many contexts of tokens never fits, whatever is merged at its end
JSON_BYTES_PER_BYTE = 6  # the longest spelling of one byte of text in JSON: \u0041
OTHER_FIELDS_BYTES = 256 << 10  # tools, schemas, biases, the names of all fields


def longest_token_bytes(tokenizer: Tokenizer) -> int | None:
    """Return how many bytes of text one token can stand for; None where the tokenizer does not tell."""
    read: Any = getattr(tokenizer, "get_vocab", None)
    # Byte-level vocabularies spell a byte as a character of up to two bytes: never too few.
    return None if read is None else max((len(text.encode()) for text in read()), default=1)


def body_limit_bytes(limit_bytes: int, context_tokens: int, token_bytes: int | None) -> int:
    """Return how long a body can be whose prompt may still fit the context, at most `limit_bytes`."""
    if token_bytes is None:
        return limit_bytes
    # A prompt may also come as ids, which take up to a dozen characters each.
    per_token = max(12, token_bytes * JSON_BYTES_PER_BYTE)
    return min(limit_bytes, context_tokens * per_token + OTHER_FIELDS_BYTES)


def encode_bounded(
    tokenizer: Tokenizer, text: str, *, context_tokens: int, param: str, add_special_tokens: bool = True
) -> list[int]:
    """Return a text's ids; raises RequestError as soon as its beginning alone is sure not to fit."""
    num_chars = PROBE_CHARS_PER_TOKEN * context_tokens
    while num_chars < len(text):
        found = len(tokenizer.encode(text[:num_chars], add_special_tokens=add_special_tokens))
        if found > SURE * context_tokens:
            raise RequestError(
                f"{param} has {len(text)} characters; the first {num_chars} are {found} tokens already, and "
                f"the model's context is {context_tokens} tokens; shorten it",
                code="context_length_exceeded",
                param=param,
            )
        num_chars *= 2
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
