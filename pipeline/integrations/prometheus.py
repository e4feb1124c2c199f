"""Asks Prometheus for the guardrails of a policy that are its own, and writes each answer down as a sample.

Whatever comes back becomes a record: a number, or the reason why there is none. The next tick reads it there.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from sentei.errors import SenteiError
from sentei.monitors.records import MetricResult
from sentei.monitors.store import Store
from sentei.pipeline.integrations.calls import CallError, Secrets, call
from sentei.pipeline.integrations.newest import NewestRollout, Pace
from sentei.policies.machine import Phase
from sentei.policies.schema.integrations.prometheus import PrometheusGuardrail

MAX_ANSWER_BYTES = 256 << 10
MAX_DETAIL_CHARS = 300
OLDEST_ANSWER_S = 60.0  # by Prometheus' own clock: a cache that answers with an older value is stale
OK, NO_DATA, STALE, ERROR = "ok", "no_data", "stale", "error"


class MetricReader:
    """Queries for the newest rollout; run it now and then in a thread of its own, one run at a time."""

    def __init__(self, store: Store, secrets: Secrets, *, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._newest = NewestRollout(store)
        self._secrets = secrets
        self._wall = wall
        self._pace = Pace()  # of each rollout's metrics

    def run_once(self, now_s: float) -> tuple[str, ...]:
        """Query what is due and write it down; returns what gave no number, and why."""
        newest = self._newest.read()
        if newest is None or newest.state.phase == Phase.ROLLED_BACK:
            return ()
        rollout_id = newest.state.rollout_id
        items = newest.policy.spec.guardrails.prometheus
        due = [item for item in items if self._pace.is_due((rollout_id, item.id), item.every, now_s)]
        if not due:
            return ()
        found = asyncio.run(self._ask_all(rollout_id, due, now_s))
        for result in found:
            self._store.add_metric(result)
            self._pace.note((rollout_id, result.metric_id), now_s)
        return tuple(f"{item.metric_id}: {item.detail}" for item in found if item.status != OK)

    async def _ask_all(
        self, rollout_id: str, items: list[PrometheusGuardrail], now_s: float
    ) -> list[MetricResult]:
        return list(await asyncio.gather(*(self._ask(rollout_id, item, now_s) for item in items)))

    async def _ask(self, rollout_id: str, item: PrometheusGuardrail, now_s: float) -> MetricResult:
        value = None
        try:
            status, value, detail = await self._query(item)
        except SenteiError as error:
            status, detail = ERROR, str(error)
        return MetricResult(rollout_id, item.id, now_s, status, value, detail[:MAX_DETAIL_CHARS])

    async def _query(self, item: PrometheusGuardrail) -> tuple[str, float | None, str]:
        headers = {"accept": "application/json", "user-agent": "sentei-metrics/1"}
        if item.token is not None:
            headers["authorization"] = f"Bearer {self._secrets.read(item.token)}"
        url = f"{self._secrets.url(item).rstrip('/')}/api/v1/query?{urlencode({'query': item.query})}"
        answer = await call("GET", url, headers=headers, timeout_s=item.timeout, max_bytes=MAX_ANSWER_BYTES)
        if not answer.is_ok:
            raise CallError(f"answered {answer.status}{_reason(answer.body)}")
        return read_answer(answer.body, self._wall())


def read_answer(body: bytes, wall_s: float) -> tuple[str, float | None, str]:
    """Status, value and words of the answer to an instant query; CallError where it is none."""
    try:
        document = json.loads(body)
        if document["status"] != "success":
            raise CallError(f"the query failed{_reason(body)}")
        data = document["data"]
        kind, result = data["resultType"], data["result"]
        if kind == "vector":
            if not result:
                return NO_DATA, None, "the query gives no series"
            if len(result) > 1:
                raise CallError(
                    f"the query gives {len(result)} series; aggregate them to one, such as by sum()"
                )
            result = result[0]["value"]
        elif kind != "scalar":
            raise CallError(f"the query gives a {str(kind)[:20]}, not a number at one moment")
        at_s, value = float(result[0]), float(result[1])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CallError(f"the answer is not Prometheus' JSON ({type(error).__name__})") from error
    if not math.isfinite(value):
        return NO_DATA, None, f"the query gives {value}"
    if not wall_s - at_s <= OLDEST_ANSWER_S:
        return STALE, None, f"the answer is of {wall_s - at_s:.0f} s ago by its own time"
    return OK, value, ""


def _reason(body: bytes) -> str:
    """What Prometheus says is wrong, if it says so in its own form."""
    try:
        found: Any = json.loads(body)
        return f": {str(found['error'])[:200]}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
