"""Tells the receivers of a policy's `notify` what the event log says: each event at least once, in order.

The log is the queue. What is kept beside it is one place per rollout and receiver, in the store, moved only
after the receiver has taken what lies before it: while a receiver is away its place stands still, and when
it is back, or the controller is, it is told the rest. Nothing here is on the way of a decision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from sentei.errors import SenteiError
from sentei.monitors.events import Event, EventLog
from sentei.monitors.records import Rollout
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import CallError, Secrets, call
from sentei.pipeline.integrations.notices import Notice, Place, read_event, read_time, told_time
from sentei.pipeline.integrations.shapes import sign, to_json_body, to_slack_body
from sentei.pipeline.rollout.revisions import EDITED, STARTED, PolicyBook
from sentei.policies.schema.integrations.notify import Webhook
from sentei.policies.schema.kept import read_kept
from sentei.policies.state import state_from_json

PLACE = "notify."  # + rollout id + "." + webhook id
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
HEADERS = {"content-type": "application/json", "user-agent": "sentei-notify/1"}

Destination = tuple[str, str]  # id of the webhook, and where it is: never said, a URL is nobody's business


@dataclass(frozen=True, slots=True)
class NotifyResult:
    """How many notices were taken, and why others were not."""

    num_sent: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Course:
    """One rollout's log on its way to one receiver."""

    rollout: Rollout
    webhook: Webhook
    latest_seq: int

    @property
    def place_name(self) -> str:
        return f"{PLACE}{self.rollout.rollout_id}.{self.webhook.id}"


@dataclass(slots=True)
class _Patience:
    """After which failure in a row, and when, the next try is due."""

    failures: int = 0
    due_s: float = 0.0
    reason: str = ""


class Notifier:
    """Delivers what is new; run it now and then in a thread of its own, one run at a time."""

    def __init__(
        self,
        store: Store,
        secrets: Secrets,
        *,
        wall: Callable[[], float] = time.time,  # receivers compare the signature's time with their own clock
    ) -> None:
        self._store = store
        self._log = EventLog(store)
        self._book = PolicyBook(store)
        self._secrets = secrets
        self._now_s = 0.0
        self._wall = wall
        self._over: set[str] = set()  # rollouts whose log is over and told
        self._patience: dict[Destination, _Patience] = {}
        self.num_sent = 0

    def run_once(self, now_s: float) -> NotifyResult:
        """Deliver until all was taken or each receiver has failed; receivers do not wait for each other."""
        before, self._now_s = self.num_sent, now_s
        unread: list[str] = []
        try:
            routes = self._routes(unread)
            asyncio.run(self._deliver_all(routes))
        except (SenteiError, LookupError) as error:
            return NotifyResult(self.num_sent - before, (*unread, str(error)))
        failing = (self._patience[to].reason for to in routes if to in self._patience)
        return NotifyResult(self.num_sent - before, (*unread, *filter(None, failing)))

    def _routes(self, unread: list[str]) -> dict[Destination, list[_Course]]:
        """For each receiver the logs that it is told of, the oldest rollout first.

        A rollout whose policy or state cannot be read any more is told to nobody, said in `unread`, and keeps
        nothing of the others back.
        """
        routes: dict[Destination, list[_Course]] = {}
        following = None  # the newest event of the rollout that came after
        for rollout in reversed(self._store.read_rollouts()):
            if rollout.rollout_id in self._over:
                continue
            latest = self._log.latest(rollout.rollout_id)
            if latest is None:
                continue
            try:
                policy = self._book.find(rollout.rollout_id, state_from_json(latest.state).policy_digest)
            except (SenteiError, LookupError) as error:
                unread.append(f"rollout {rollout.rollout_id}: {error}")
                following = latest
                continue
            courses = [_Course(rollout, item, latest.seq) for item in policy.spec.notify.webhooks]
            # A rollout's log ends where its successor's begins.
            if following is not None and all(self._place(item).seq >= latest.seq for item in courses):
                self._over.add(rollout.rollout_id)
            else:
                for item in courses:
                    to = (item.webhook.id, item.webhook.url or str(item.webhook.url_from))
                    routes[to] = [item, *routes.get(to, ())]
            following = latest
        return routes

    async def _deliver_all(self, routes: dict[Destination, list[_Course]]) -> None:
        await asyncio.gather(*(self._deliver_to(to, courses) for to, courses in routes.items()))

    async def _deliver_to(self, to: Destination, courses: list[_Course]) -> None:
        patience = self._patience.setdefault(to, _Patience())
        if self._now_s < patience.due_s:
            return
        for course in courses:
            try:
                await self._deliver(course)
            except CallError as error:
                self._fail(to, patience, error)
                return
        self._patience[to] = _Patience()

    def _fail(self, to: Destination, patience: _Patience, error: CallError) -> None:
        reason = f"webhook {to[0]}: {error}"
        wait_s = min(BACKOFF_S * 2.0**patience.failures, MAX_BACKOFF_S)
        if isinstance(error, _NotTakenError) and error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s)
        self._patience[to] = _Patience(min(patience.failures + 1, 10), self._now_s + wait_s, reason)

    async def _deliver(self, course: _Course) -> None:
        """Everything that is new in one log, to one receiver; CallError where it stops taking."""
        place = begun = self._place(course)
        last = self._event_at(course, place)
        for event in self._log.read(course.rollout.rollout_id, after=place.seq):
            place = await self._deliver_time(course, place, last, event.at_s)
            found, after = read_event(place, event)
            for number, notice in enumerate(found):
                if number < place.told or notice.kind not in course.webhook.events:
                    continue
                await self._send(course, notice)
                self._save(course, replace(place, told=number + 1))
            place, last = after, event
        if place != begun:
            self._save(course, place)
        await self._deliver_time(course, place, last, self._now_s)

    async def _deliver_time(self, course: _Course, place: Place, last: Event | None, now_s: float) -> Place:
        """That a stay was long, before whatever ended it."""
        notice = read_time(place, last, course.webhook.hold_longer_than, now_s)
        if notice is None or place.told:
            return place
        await self._send(course, notice)
        place = told_time(place)
        self._save(course, place)
        return place

    async def _send(self, course: _Course, notice: Notice) -> None:
        webhook, policy = course.webhook, self._book.find(course.rollout.rollout_id, notice.policy_digest)
        url = self._secrets.url(webhook)
        headers = dict(HEADERS)
        if webhook.secret is None:  # of Slack
            body = to_slack_body(notice, policy)
        else:
            body = to_json_body(notice, policy)
            headers |= sign(notice.notice_id, body, self._secrets.read(webhook.secret), int(self._wall()))
        answer = await call("POST", url, headers=headers, content=body, timeout_s=webhook.timeout)
        if not answer.is_ok:
            text = "; redirects are not followed" if 300 <= answer.status < 400 else ""
            raise _NotTakenError(f"answered {answer.status}{text}", answer.retry_after_s)
        self.num_sent += 1

    def _place(self, course: _Course) -> Place:
        kept = self._store.read_value(course.place_name)
        return self._begin(course) if kept is None else Place.from_json(kept)

    def _begin(self, course: _Course) -> Place:
        """The beginning, or the event of the edit that has added the receiver; kept from then on."""
        since_seq = 0
        had = True
        for event in self._log.read(course.rollout.rollout_id, kinds=(STARTED, EDITED)):
            if "policy_digest" not in event.payload:
                continue
            hooks = read_kept(event.payload).spec.notify.webhooks
            has = any(item.id == course.webhook.id for item in hooks)
            if has and not had:
                since_seq = event.seq
            had = has
        place = Place()
        for event in self._log.read(course.rollout.rollout_id) if since_seq else ():
            if event.seq > since_seq:
                break
            _, place = read_event(place, event)
        self._save(course, place)
        return place

    def _event_at(self, course: _Course, place: Place) -> Event | None:
        """The event at a place: the newest one, mostly."""
        if not place.seq:
            return None
        if place.seq == course.latest_seq:
            return self._log.latest(course.rollout.rollout_id)
        return next(self._log.read(course.rollout.rollout_id, after=place.seq - 1), None)

    def _save(self, course: _Course, place: Place) -> None:
        self._store.save_value(course.place_name, place.to_json())


class _NotTakenError(CallError):
    """An answer that says no."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
