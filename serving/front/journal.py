"""What a stream leaves behind on its way out, so that another ingress can go on where the first one died.

Ray's proxy asks for a journal by a header. The ingress then puts one line before each event of a stream: the
ids of the tokens in it and, before the first, a *ticket*, which says how the request was understood: its id,
seeds and assignment. The proxy keeps what the lines say and sends none of them on. When the stream breaks, it
asks again with the journal in the header. The ticket is signed with the key that all ingresses share: what a
client makes up starts no answer at a rung of the client's choice. It holds the hash of the request's body, so
it goes on with that request alone. The ids are not signed: an ingress takes a journal from our proxy only.
"""

from __future__ import annotations

import base64
import hmac
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sentei.serving.errors import RequestError

HEADER = "x-sentei-journal"
NEW = "new"  # the header's value where there is nothing to go on with
MARK = b": sentei "  # a line of server-sent events that clients pass over
MAX_TICKET_BYTES = 4096


@dataclass(slots=True)
class Choice:
    """How far one answer of a stream has come."""

    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    compute_s: float = 0.0  # model time that these tokens took


@dataclass(slots=True)
class Journal:
    """What was sent of a stream."""

    ticket: str
    choices: dict[int, Choice] = field(default_factory=dict)
    has_usage: bool = False
    has_end: bool = False  # there is nothing left to ask for

    @classmethod
    def read(cls, text: str) -> Journal:
        """Read a header's value; raises RequestError for one that no proxy of ours wrote."""
        try:
            raw = json.loads(text)
            choices = {
                int(i): Choice([int(n) for n in ids], finish, float(compute_s))
                for i, (ids, finish, compute_s) in raw["c"].items()
            }
            return cls(str(raw["t"]), choices, bool(raw["u"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"header {HEADER} cannot be read; leave it out", param=HEADER) from error

    def write(self) -> str:
        """Return the header's value."""
        choices = {
            str(i): (choice.ids, choice.finish, choice.compute_s) for i, choice in self.choices.items()
        }
        return json.dumps({"t": self.ticket, "c": choices, "u": self.has_usage}, separators=(",", ":"))

    def take(self, line: bytes) -> None:
        """Take in one line, without its mark."""
        told = json.loads(line)
        self.ticket = told.get("ticket", self.ticket)
        self.has_usage = self.has_usage or "usage" in told
        self.has_end = self.has_end or "end" in told
        if "index" in told:
            choice = self.choices.setdefault(told["index"], Choice())
            choice.ids += told["ids"]
            choice.finish = told["finish"] or choice.finish
            choice.compute_s = told["compute_s"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """How a request was understood; its siblings' ids and seeds follow from it."""

    request_id: str
    unit: str
    seed: int
    assignment: dict[str, Any]  # the fields of a `router.Assignment`
    body_sha256: str = ""  # hexadecimal
    ttft_s: float = 0.0
    first_at_s: float = 0.0  # epoch seconds of the first token
    traceparent: str = ""  # of the answer's first part, where it is traced

    def sign(self, key: bytes) -> str:
        """Return the ticket as one word that only holders of the key can make."""
        word = base64.urlsafe_b64encode(json.dumps(asdict(self)).encode())
        return f"{word.decode()}.{_mac(key, word)}"

    @classmethod
    def check(cls, text: str, key: bytes, body_sha256: str) -> Ticket:
        """Read a signed ticket; raises RequestError if it is none of ours, or of another body."""
        word, _, mac = text.rpartition(".")
        is_ours = text.isascii() and len(text) <= MAX_TICKET_BYTES
        if not is_ours or not hmac.compare_digest(mac, _mac(key, word.encode())):
            raise RequestError(f"header {HEADER} was not made here; leave it out", param=HEADER)
        ticket = cls(**json.loads(base64.urlsafe_b64decode(word)))
        if not hmac.compare_digest(ticket.body_sha256, body_sha256):
            raise RequestError(
                f"header {HEADER} is of a request with another body; leave it out", param=HEADER
            )
        return ticket


class JournalWriter:
    """Writes the lines of one stream, each before its event."""

    def __init__(self, ticket: str | None, sent: Journal | None) -> None:
        self._ticket = ticket  # None: whoever reads the lines has it
        choices = sent.choices if sent is not None else {}
        self._num_told = {index: len(choice.ids) for index, choice in choices.items()}

    def piece(self, index: int, ids: list[int], num_tokens: int, finish: str | None, compute_s: float) -> str:
        """Return the line of an event after which `num_tokens` of an answer's `ids` are sent."""
        begin = self._num_told.get(index, 0)
        self._num_told[index] = num_tokens
        told = {"index": index, "ids": ids[begin:num_tokens], "finish": finish}
        return self._line({**told, "compute_s": round(compute_s, 6)})

    def usage(self) -> str:
        """Return the line of the event that tells the usage."""
        return self._line({"usage": True})

    def end(self) -> str:
        """Return the line of the event that ends the stream."""
        return self._line({"end": True})

    def _line(self, told: dict[str, Any]) -> str:
        if self._ticket is not None:
            told, self._ticket = {"ticket": self._ticket, **told}, None
        return f"{MARK.decode()}{json.dumps(told, separators=(',', ':'))}\n"


def _mac(key: bytes, word: bytes) -> str:
    return hmac.new(key, b"journal\0" + word, "sha256").hexdigest()
