"""JSON schemas as masks over the vocabulary, by llguidance; the only place that knows it. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from sentei.serving.errors import GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One spelling of JSON, that of `json.dumps`: where any white space may stand, the pocket model wrote little
# else (three of three answers were cut off at 60 tokens, llguidance 1.7.6). What is not understood must be
# refused, whatever a schema says of it.
OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


def read_schema(schema: str) -> str:
    """Return a JSON schema as llguidance's grammar; raises GrammarError in its words."""
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
        is_bad, words = LLMatcher.validate_grammar_with_warnings(grammar)
    except (ValueError, TypeError) as error:
        raise GrammarError(_shorten(str(error))) from error
    if is_bad:
        raise GrammarError(_shorten("; ".join(words)))
    return grammar


def make_vocabulary(
    tokenizer: Any, vocab_size: int | None = None, stop_ids: Sequence[int] = ()
) -> LLTokenizer:
    """Return a fast Hugging Face tokenizer's tokens as bytes; raises GrammarError for any other tokenizer."""
    from llguidance.hf import from_tokenizer

    try:
        size = None if vocab_size is None else max(vocab_size, len(tokenizer))
        return from_tokenizer(tokenizer, n_vocab=size, eos_token=list(stop_ids) or None)
    except Exception as error:  # a panic of the Rust code, or of a tokenizer that is none of its kinds
        raise GrammarError(f"this model's tokenizer has no tokens for a grammar: {error}") from error


class Grammars:
    """Makes the follower of one answer; the vocabulary is turned into a tree when it is first needed."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._vocabulary: LLTokenizer | None = None

    def follow(self, schema: str, sent_ids: Sequence[int] = ()) -> Follower:
        """Return a follower that has read what was sent already."""
        if self._vocabulary is None:
            self._vocabulary = make_vocabulary(self._tokenizer, self._vocab_size, self._stop_ids)
        matcher = LLMatcher(self._vocabulary, read_schema(schema), log_level=0)
        follower = Follower(matcher, self._vocab_size)
        for token_id in sent_ids:
            follower.take(token_id)
        return follower


class Follower:
    """Says which tokens may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """Return the mask [V] of tokens that may come next; raises GrammarError where there is none."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(np.bool_)
        if not mask.any():
            raise GrammarError("no token of this model can go on under response_format; send another schema")
        return mask

    def take(self, token_id: int) -> None:
        """Note that this token was chosen."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"response_format cannot be followed: {_shorten(self._matcher.get_error())}")


def _shorten(words: str) -> str:
    return " ".join(words.split())[:200]
