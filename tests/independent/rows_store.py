"""A7, A8, B9, B12 and B14: what store and runner make of records; who writes them is invented here."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from tests.independent.counting import Count, Progress, Row, count
from tests.independent.product import IS_NOW, records, runner, store_class, tell

START_S = 1_790_000_000.0  # in the past of any machine that runs this
GRACE_S, AFTER_S = 300.0, 900.0
HOLD_S = 600.0
DAY_S = 86_400.0
STAGES = """
    - {id: shadow, share: 0, rung: mild}
    - {id: half, share: 50%, rung: mild}
    - {id: full, share: 95%, rung: mild, bake: 2s}"""
POLICY = f"""
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {{name: kept}}
spec:
  ladder: [{{id: mild}}]
  slices: {{buckets: [{{id: long, range: [0, 131072]}}]}}
  assignment: {{salt: kept}}
  stages: STAGES
  advance: {{need: all_safe, min_units: 20}}
  audit: {{select: {{fraction: 1.0}}}}
  guardrails:
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: 0.10, floor_cap: 0.10}},
         test: betting_paired, action: rollback}}
  breaker: {{variant: {{window: 60s, min_requests: 20, failure_share: 50%}}}}
  data: {{max_age: 60s, no_data: {{grace: {GRACE_S:.0f}s, after: {AFTER_S:.0f}s}}, monitor_lease: 30s}}
  schedule: {{check_every: 1s}}
"""
WITH_RATIO = POLICY.replace(
    "  breaker:",
    "      - {id: srm, value: assignment, test: split_ramp, alpha: 0.001, action: freeze}\n  breaker:",
)


def rows() -> tuple[Row, ...]:
    """All that a store can show."""
    return (
        Row(
            "A7",
            "one request 1 min to 30 days ahead, then nothing: sparse serves after `no_data.after`",
            "never",
            _from_the_future,
            30,
            key="future",
        ),
        Row(
            "A7",
            "clocks step up to 2 days, processes restart: a hold is short, or silence falls late",
            "never",
            _stepping,
            20,
            key="steps",
        ),
        Row(
            "A8",
            "a new rollout over a promoted one is taken without a question",
            "never",
            _over,
            10,
            key="over",
        ),
        Row("A8", "two starts at once, and both are told that they won", "never", _two_starts, 20, key="two"),
        Row(
            "B9",
            "promoted, then no audit is scored: neither alert nor fall by `no_data.after`",
            "never",
            _auditor_dies,
            20,
        ),
        Row(
            "B12",
            "dense 20 s, sparse 10 s, 10 sessions a second, four minutes: frozen by the sample ratio",
            "alpha 0.1%",
            _faster,
            20,
        ),
        Row(
            "B14",
            "5 to 40 good requests, then 40 bad ones of one client in 40 s: rolled back",
            "never",
            _one_client,
            20,
        ),
    )


class Story:
    """A rollout on a store of its own."""

    def __init__(self, store: Any, policy: str) -> None:
        self.store, self.now_s, self.number = store, START_S, 0
        module = runner()
        module.start_rollout(store, policy, now_s=self.now_s, rollout_id="r1")
        self._runner = module.RolloutRunner.open(store, "r1", module.RunnerOptions("one"))

    def tick(self, after_s: float = 1.0) -> Any:
        """One tick; the decision."""
        self.now_s += after_s
        result = self._runner.tick(self.now_s)
        assert result.decision is not None, result.error
        return result.decision

    def state(self) -> Any:
        """The newest state."""
        return self._runner.state()

    def request(self, **changes: Any) -> None:
        """One request, answered by sparse."""
        self.number += 1
        values = {"request_id": f"q{self.number}", "session_id": f"s{self.number}", "at_s": self.now_s}
        self.store.add_request(make_request(**{**values, **changes}))

    def audited(self, disagreement: float = 0.0, variant: str = "sparse", **changes: Any) -> None:
        """One request and its score."""
        self.request(chosen_for_audit=True, variant_assigned=variant, variant_served=variant, **changes)
        self.store.add_audit(
            tell(
                records().AuditScore,
                request_id=f"q{self.number}",
                session_id=changes.get("session_id", f"s{self.number}"),
                rollout_id="r1",
                at_s=changes.get("at_s", self.now_s),
                slice_id="long",
                rung_id="mild",
                variant_served=variant,
                status="scored",
                tokens=50,
                token_disagreement=disagreement,
                token_disagreement_floor=0.0,
                kl=0.0,
                kl_floor=0.0,
                first_divergence=None,
                dropped_mass_mean=None,
                dropped_mass_p99=None,
                dense_compute_s=1.0,
                sparse_compute_s=0.5,
                prompt_tokens=4000,
                share=0.5,
            )
        )

    def promote(self) -> None:
        """Enough good audits for each stage."""
        for _ in range(60):
            variant = "dense" if self.state() is None or self.state().stage_id == "shadow" else "sparse"
            for _ in range(12):
                self.audited(variant=variant)
            if self.tick().state.outcome == "promoted":
                return
        raise AssertionError("not promoted")


def make_request(**changes: Any) -> Any:
    """A request as it is written down."""
    values: dict[str, Any] = {
        "rollout_id": "r1",
        "slice_id": "long",
        "variant_assigned": "sparse",
        "variant_served": "sparse",
        "rung_id": "mild",
        "share": 0.5,
        "prompt_tokens": 4000,
        "completion_tokens": 50,
        "ttft_ms": 400.0,
        "tpot_ms": 30.0,
        "total_ms": 1900.0,
        "outcome": "ok",
        "chosen_for_audit": False,
        "compute_s": 1.0,
    }
    return tell(records().RequestRecord, **{**values, **changes})


@contextmanager
def on_store(policy: str = POLICY, stages: str = STAGES) -> Iterator[Story]:
    """A story on a store in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store = store_class().open(f"sqlite:///{Path(folder) / 'state.db'}")
        try:
            yield Story(store, policy.replace("STAGES", stages))
        finally:
            store.close()


def serves_sparse(story: Story) -> bool:
    """Whether the routing table sends anybody to sparse."""
    found = story.store.read_routing()
    return found is not None and any(route.share > 0 for route in found[0].routes)


def _from_the_future(trials: int, progress: Progress) -> Count:
    def is_wrong(seed: int) -> bool:
        ahead_s = float(np.exp(np.random.default_rng((seed, 7)).uniform(np.log(60), np.log(30 * DAY_S))))
        with on_store() as story:
            story.store.own_time = lambda: story.now_s  # a store of now holds records against its own time
            for _ in range(60):
                story.audited(variant="dense")
            story.tick()
            for _ in range(60):
                story.audited()
            story.tick()
            story.request(at_s=story.now_s + ahead_s)
            for _ in range(12):
                story.tick(after_s=AFTER_S / 10)
            return serves_sparse(story)

    return count(trials, progress, is_wrong)


def _stepping(trials: int, progress: Progress) -> Count:
    return count(trials, progress, _step_once)


def _step_once(seed: int) -> bool:
    """Hold, then silence, under a wall clock that steps; `true_s` is what a stopwatch says."""
    rng = np.random.default_rng((seed, 8))
    stages = STAGES.replace("share: 50%, rung: mild", f"share: 50%, rung: mild, hold_min: {HOLD_S:.0f}s")
    true_s, step_s = 0.0, 0.0
    with on_store(stages=stages) as story:
        store, module = story.store, runner()

        def wall() -> float:
            return START_S + 1.0 + true_s + step_s

        def clock() -> Callable[[], float]:
            return store.clock(wall, lambda: true_s, "machine") if IS_NOW else wall

        writer, ticker = clock(), clock()
        own = module.RolloutRunner.open(store, "r1", module.RunnerOptions("one"))
        entered_s: float | None = None
        last_news_s = 0.0
        for number in range(200):
            true_s += 20.0
            if rng.random() < 0.03:
                step_s += float(rng.choice([-1.0, 1.0]) * np.exp(rng.uniform(0, np.log(2 * DAY_S))))
            if rng.random() < 0.05:
                writer = clock()
            if rng.random() < 0.05:
                ticker = clock()
                own = module.RolloutRunner.open(store, "r1", module.RunnerOptions(f"{number}"))
            is_talking = number < 120
            for _ in range(4 if is_talking else 0):
                story.audited(variant="sparse" if entered_s is not None else "dense", at_s=writer())
                last_news_s = true_s
            result = own.tick(ticker())
            state = own.state()
            if state is None or result.decision is None:
                continue
            if state.outcome == "rolled_back":
                return is_talking or true_s - last_news_s > AFTER_S + 60.0
            if state.stage_id == "half" and entered_s is None:
                entered_s = true_s
            if state.stage_id == "full" and entered_s is not None and true_s - entered_s < HOLD_S - 1.0:
                return True
            if state.stage_id == "full":
                entered_s = -HOLD_S
        return True  # silence never rolled it back


def _over(trials: int, progress: Progress) -> Count:
    def is_wrong(_seed: int) -> bool:
        with on_store() as story:
            story.promote()
            return _starts(story.store, story.now_s + 5.0, "r2")

    return count(trials, progress, is_wrong)


def _starts(store: Any, now_s: float, name: str) -> bool:
    policy = POLICY.replace("STAGES", STAGES).replace("name: kept", f"name: {name}")
    try:
        runner().start_rollout(store, policy, now_s=now_s, rollout_id=name)
    except Exception:  # whatever the version calls a refusal
        return False
    return True


def _two_starts(trials: int, progress: Progress) -> Count:
    def is_wrong(_seed: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'state.db'}"
            stores = [store_class().open(url) for _ in range(2)]
            gate, won = threading.Barrier(2), list[bool]()

            def start(store: Any, name: str) -> None:
                gate.wait()
                won.append(_starts(store, START_S, name))

            threads = [threading.Thread(target=start, args=(s, f"r{i}")) for i, s in enumerate(stores)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for store in stores:
                store.close()
            return won == [True, True]

    return count(trials, progress, is_wrong)


def _auditor_dies(trials: int, progress: Progress) -> Count:
    def is_wrong(seed: int) -> bool:
        rng = np.random.default_rng((seed, 9))
        with on_store() as story:
            story.promote()
            for _ in range(int(rng.integers(0, 5))):
                story.audited()
                story.tick(after_s=30.0)
            end_s, has_alert = story.now_s + AFTER_S + 120.0, False
            while story.now_s < end_s:
                for _ in range(int(rng.integers(1, 4))):
                    story.request(chosen_for_audit=True, share=0.95)
                decision = story.tick(after_s=30.0)
                has_alert |= any(item.kind == "alert" for item in decision.actions)
                if decision.state.outcome == "rolled_back":
                    return not has_alert
            return True

    return count(trials, progress, is_wrong)


def _faster(trials: int, progress: Progress) -> Count:
    return count(trials, progress, partial(_freezes, per_s=10.0, dense_s=20.0, sparse_s=10.0, last_s=240))


def _freezes(seed: int, *, per_s: float, dense_s: float, sparse_s: float, last_s: int) -> bool:
    """Sessions go where a fair hash sends them; records come when answers end, sparse ones sooner."""
    rng = np.random.default_rng((seed, 12))
    tables: Any = __import__("sentei.monitors.tables", fromlist=["REQUESTS"])
    stages = (
        "\n    - {id: one, share: 50%, rung: mild, hold_min: 1h}\n    - {id: two, share: 95%, rung: mild}"
    )
    with on_store(WITH_RATIO, stages) as story:
        ends: list[tuple[float, str, str]] = []
        next_s, number = rng.exponential(1 / per_s), 0
        for second in range(1, last_s + 1):
            rows: dict[Any, list[dict[str, Any]]] = {}
            while next_s <= second:
                number += 1
                name = f"u{seed}-{number}"
                digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
                arm = "sparse" if int.from_bytes(digest, "big") < 2**63 else "dense"
                took_s = (sparse_s if arm == "sparse" else dense_s) * rng.lognormal(0, 0.2)
                heapq.heappush(ends, (next_s + took_s, name, arm))
                if IS_NOW:
                    rows.setdefault(tables.ARRIVALS, []).append(
                        asdict(records().Arrival("r1", name, "long", START_S + next_s, 0.5, arm))
                    )
                next_s += rng.exponential(1 / per_s)
            while ends and ends[0][0] <= second:
                end_s, name, arm = heapq.heappop(ends)
                record = asdict(
                    make_request(
                        request_id=name,
                        session_id=name,
                        at_s=START_S + end_s,
                        variant_assigned=arm,
                        variant_served=arm,
                    )
                )
                record.pop("attention", None)
                rows.setdefault(tables.REQUESTS, []).append(record | {"is_arrival": True, "is_unit": True})
            with story.store.write("rows") as connection:  # a second's rows in one transaction
                for table, found in rows.items():
                    for row in found:
                        number_ = story.store.next_number(connection)
                        connection.execute(sa.insert(table).values(seq=number_, **row))
            if story.tick().state.phase == "paused":
                return True
    return False


def _one_client(trials: int, progress: Progress) -> Count:
    def is_wrong(seed: int) -> bool:
        rng = np.random.default_rng((seed, 14))
        stages = STAGES.split("\n", 2)[2]
        with on_store(stages="\n" + stages) as story:
            story.tick()
            for _ in range(int(rng.integers(5, 41))):
                story.request()
            for _ in range(40):
                story.request(session_id="client", outcome="fallback_before")
                if story.tick().state.outcome == "rolled_back":
                    return True
            return False

    return count(trials, progress, is_wrong)
