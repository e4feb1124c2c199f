"""Text at the ingress: detokenizer and stop scanner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sentei.serving.openai.messages import SystemMessage, UserMessage
from sentei.serving.text.chat import chat_ids
from sentei.serving.text.pieces import Detokenizer, StopScanner
from tests.fakes_serving import FakeTokenizer


def pieces(text: str) -> list[str]:
    """Detokenize byte by byte; returns each step's text, and the flush."""
    tokenizer = FakeTokenizer()
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add([i]) for i in tokenizer.encode(text)), detokenizer.flush()]


@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text(text: str) -> None:
    """Whatever the text, its pieces joined are the text."""
    assert "".join(pieces(text)) == text


def test_half_a_character_is_held_back() -> None:
    """A character of several bytes comes once, whole, and never as a replacement sign."""
    assert pieces("aé剪") == ["a", "", "é", "", "", "剪", ""]


def test_broken_end_is_flushed() -> None:
    """An answer that ends inside a character still ends, with the decoder's sign for it."""
    tokenizer = FakeTokenizer()
    detokenizer = Detokenizer(tokenizer)
    first = detokenizer.add(tokenizer.encode("é")[:1])

    assert (first, detokenizer.flush()) == ("", "\ufffd")


def scan(stops: list[str], *texts: str) -> tuple[list[str], str, bool]:
    """What comes out step by step, at the flush, and whether a stop was found."""
    scanner = StopScanner(stops)
    found = [scanner.add(text) for text in texts]
    return found, scanner.flush(), scanner.has_stopped


def test_stop_across_pieces_is_found_and_cut() -> None:
    """A stop string that comes in pieces is never sent, and nothing after it is."""
    assert scan(["END"], "one E", "N", "D two", "three") == (["one ", "", "", ""], "", True)


def test_beginning_of_a_stop_that_does_not_come_is_sent() -> None:
    """What was held back is sent when it turns out to be no stop string."""
    assert scan(["END"], "an E", "mpty") == (["an ", "Empty"], "", False)


def test_held_back_end_is_flushed() -> None:
    """At the end of the answer the held back beginning of a stop string is part of the answer."""
    assert scan(["END"], "the EN") == (["the "], "EN", False)


def test_earliest_of_several_stops_wins() -> None:
    """With several stop strings the answer ends at the first one in it."""
    assert scan(["b", "ab"], "xab") == (["x"], "", True)


@given(st.lists(st.text(alphabet="abE", max_size=4), max_size=8))
def test_scanner_agrees_with_search_in_the_whole(texts: list[str]) -> None:
    """However the text is cut, the result is the text up to the stop string."""
    sent, rest, _ = scan(["aE"], *texts)

    assert "".join(sent) + rest == "".join(texts).partition("aE")[0]


def test_conversation_without_template_is_plain_lines() -> None:
    """A base model gets the plain texts; a chat model gets its template."""
    tokenizer = FakeTokenizer()
    messages = [SystemMessage(role="system", content="a"), UserMessage(role="user", content="b")]
    plain = tokenizer.decode(chat_ids(tokenizer, messages, context_tokens=100))
    tokenizer.chat_template = "x"

    assert plain == "a\nb"
    assert tokenizer.decode(chat_ids(tokenizer, messages, context_tokens=100)) == "<system>a<user>b"
