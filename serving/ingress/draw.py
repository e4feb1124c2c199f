"""Which requests are audited: drawn before they are served, with a known probability, blind to their text.

Nothing that a client sends takes part in the draw, so no client can steer an audit to or away from a request.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace

from sentei.serving.ingress.router import Assignment
from sentei.serving.ports import AuditLoad

MAX_STREAMS = 50_000


@dataclass(slots=True)
class _Stream:
    """Where a stream is in its window of requests, and which place of the window is audited."""

    probability: float
    window: int
    place: int
    position: int = 0


class AuditDraws:
    """Draws one request of each window of a stream, at a place chosen by lot.

    A stream is one session's requests of one slice, rung and variant, in the order in which they come. Its
    window is 1 / probability rounded up or down by lot, so that each request, wherever it stands in its
    conversation, is drawn with exactly that probability.
    """

    def __init__(self, lots: random.Random | None = None, *, max_streams: int = MAX_STREAMS) -> None:
        self._lots = lots or random.SystemRandom()
        self._max_streams = max_streams
        self._streams: OrderedDict[Hashable, _Stream] = OrderedDict()

    def draw(self, stream_id: Hashable, probability: float) -> bool:
        """Return whether the stream's next request is audited."""
        if probability <= 0.0:
            return False
        stream = self._streams.get(stream_id)
        if stream is None or stream.probability != probability:
            window = self._window(probability)
            stream = self._streams[stream_id] = _Stream(probability, window, self._lots.randrange(window))
        self._streams.move_to_end(stream_id)
        if len(self._streams) > self._max_streams:
            self._streams.popitem(last=False)
        is_drawn = stream.position == stream.place
        stream.position += 1
        if stream.position == stream.window:
            stream.position, stream.place = 0, self._lots.randrange(stream.window)
        return is_drawn

    def span_place(self) -> float:
        """Return where in its answer the audited span lies: 0 for the first place, towards 1 for the last."""
        return self._lots.random()

    def _window(self, probability: float) -> int:
        """Return n or n + 1 by lot, so that the mean of 1 / window is the probability."""
        if probability >= 1.0:
            return 1
        n = int(1.0 / probability)
        return n if self._lots.random() < (probability * (n + 1) - 1) * n else n + 1


class AuditBudget:
    """Lets through as many draws as the auditor can replay in time: it looks at a clock and a queue only.

    It fills at the pace at which replays are done, and is closed while what waits would take longer than
    `wait_s`. As long as no auditor has said anything it is open: what is lost is then written as missing.
    """

    def __init__(self, *, wait_s: float) -> None:
        self._wait_s = wait_s
        self._load: AuditLoad | None = None
        self._filled_at_s = 0.0
        self._left = 0.0

    def observe(self, load: AuditLoad | None, now_s: float) -> None:
        """Take in what the auditor says, or that it said nothing."""
        self._fill(now_s)
        if self._load is None and load is not None:
            self._left = self._most(load)
        self._load = load

    def has_room(self, now_s: float) -> bool:
        """Return whether one more audit can be done in time."""
        self._fill(now_s)
        return self._load is None or (self._left >= 1.0 and self._load.waiting <= self._most(self._load))

    def take(self) -> None:
        """Count a drawn audit."""
        self._left -= 1.0

    def give_back(self) -> None:
        """Take back a drawn audit that came to nothing, such as of a request that got no answer."""
        self._left += 1.0

    def _fill(self, now_s: float) -> None:
        if self._load is not None:
            grown = self._left + (now_s - self._filled_at_s) * self._load.jobs_per_s
            self._left = min(self._most(self._load), grown)
        self._filled_at_s = now_s

    def _most(self, load: AuditLoad) -> float:
        return max(1.0, self._wait_s * load.jobs_per_s)


def draw_audit(
    assigned: Assignment, unit: str, *, draws: AuditDraws, budget: AuditBudget, now_s: float
) -> Assignment:
    """Return the assignment with its draw; a request that no replay would be in time for is left out.

    What is left out has probability 0 in its record, so that the rate that was reached can be read there.
    """
    if assigned.audit_probability <= 0.0:
        return assigned
    if not budget.has_room(now_s):
        return replace(assigned, audit_probability=0.0)
    stream = (assigned.rollout_id, assigned.slice_id, assigned.rung_id, assigned.variant, unit)
    if not draws.draw(stream, assigned.audit_probability):
        return assigned
    budget.take()
    return replace(assigned, is_audited=True, span_place=draws.span_place())
