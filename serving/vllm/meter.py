"""What each request cost and what its attention kept: counted in the worker, asked for by ticket.

A step's processor time is measured from the batch's update to the sampler. Attention is timed by itself and
goes to the rows that caused it; the rest of the step goes to its rows by their tokens.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from sentei.serving.engine.attention_use import AttentionUse, LayerUse

TICKETS_KEPT = 4096  # requests whose use nobody came for: the oldest is forgotten


@dataclass(frozen=True, slots=True)
class Use:
    """What one request has used so far."""

    compute_s: float = 0.0
    attention: AttentionUse | None = None
    has_bad_logits: bool = False
    grammar_error: str = ""
    dropped_mass: tuple[float, ...] = ()  # one share per measured row, head and layer

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as vLLM's remote calls carry them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Use:
        """Read back what `to_dict` gave."""
        seen = found["attention"]
        attention = None
        if seen is not None:
            layers = tuple(LayerUse(**layer) for layer in seen["layers"])
            attention = AttentionUse(seen["sparse_calls"], seen["dense_calls"], layers)
        dropped = tuple(found["dropped_mass"])
        return cls(found["compute_s"], attention, found["has_bad_logits"], found["grammar_error"], dropped)


@dataclass(slots=True)
class _Account:
    compute_s: float = 0.0
    sparse_calls: int = 0
    dense_calls: int = 0
    has_bad_logits: bool = False
    grammar_error: str = ""
    dropped_mass: list[float] = field(default_factory=list)
    # By layer: kept and causal blocks of the prompt, kept and causal blocks of single tokens.
    blocks: dict[int, list[float]] = field(default_factory=dict)


class UseMeter:
    """Accounts by ticket; a row without a ticket is counted for nobody."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._began_s: float | None = None
        self._attention_s = 0.0
        self._tokens: dict[str, int] = {}

    def begin_step(self) -> None:
        """A step begins."""
        self._began_s, self._attention_s, self._tokens = self._clock(), 0.0, {}

    def set_rows(self, tokens: Mapping[str, int]) -> None:
        """Say whose tokens this step computes."""
        self._tokens = dict(tokens)

    @contextmanager
    def attention(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Time attention that was done for these rows, shared by weight."""
        began_s = self._clock()
        yield
        spent_s = self._clock() - began_s
        self._attention_s += spent_s
        self._share(spent_s, weights)

    @contextmanager
    def unpaid(self) -> Iterator[None]:
        """Take out of the step what is measured beside it; no request pays for it."""
        began_s = self._clock()
        yield
        self._attention_s += self._clock() - began_s

    def note_dropped(self, ticket: str, shares: Iterable[float]) -> None:
        """Keep what measured rows of a replay dropped."""
        self._account(ticket).dropped_mass += shares

    def note_blocks(self, ticket: str, layer: int, *, kept: float, causal: float, is_single: bool) -> None:
        """Count an attention call that thinned; kept and causal are blocks, the mean over heads."""
        self._note(ticket, layer, kept, causal, is_single)
        self._account(ticket).sparse_calls += 1

    def note_dense(self, layer: int, rows: Iterable[tuple[str, float, bool]]) -> None:
        """Count rows that kept everything: whose they are, blocks in sight, whether it is a single token."""
        for ticket, causal, is_single in rows:
            self._note(ticket, layer, causal, causal, is_single)
            self._account(ticket).dense_calls += 1

    def note_bad_logits(self, ticket: str) -> None:
        """Remember that a request's logits were not finite."""
        self._account(ticket).has_bad_logits = True

    def note_grammar_error(self, ticket: str, words: str) -> None:
        """Remember that a request's answer cannot go on under its schema."""
        self._account(ticket).grammar_error = words

    def end_step(self) -> None:
        """Share what the step took beside attention."""
        if self._began_s is None:
            return
        rest_s = max(self._clock() - self._began_s - self._attention_s, 0.0)
        self._share(rest_s, {ticket: float(num) for ticket, num in self._tokens.items()})
        self._began_s = None

    def read(self, ticket: str) -> Use:
        """Return what a request has used so far."""
        account = self._accounts.get(ticket, _Account())
        calls = account.sparse_calls + account.dense_calls
        layers = tuple(
            LayerUse(layer, _ratio(sums[0], sums[1]), _ratio(sums[2], sums[3]))
            for layer, sums in sorted(account.blocks.items())
        )
        attention = AttentionUse(account.sparse_calls, account.dense_calls, layers) if calls else None
        dropped = tuple(account.dropped_mass)
        return Use(account.compute_s, attention, account.has_bad_logits, account.grammar_error, dropped)

    def take(self, ticket: str) -> Use:
        """Return it and forget it."""
        found = self.read(ticket)
        self._accounts.pop(ticket, None)
        return found

    def _note(self, ticket: str, layer: int, kept: float, causal: float, is_single: bool) -> None:
        sums = self._account(ticket).blocks.setdefault(layer, [0.0, 0.0, 0.0, 0.0])
        at = 2 if is_single else 0
        sums[at] += kept
        sums[at + 1] += causal

    def _share(self, spent_s: float, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        for ticket, weight in weights.items():
            self._account(ticket).compute_s += spent_s * weight / total if total else 0.0

    def _account(self, ticket: str) -> _Account:
        if ticket not in self._accounts:
            self._accounts[ticket] = _Account()
            if len(self._accounts) > TICKETS_KEPT:
                self._accounts.popitem(last=False)
        return self._accounts[ticket]


def _ratio(kept: float, causal: float) -> float | None:
    return round(kept / causal, 4) if causal else None
