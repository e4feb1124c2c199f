"""`/metrics` over a real store and a real controller: what it says, to whom, and how much at most."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sentei.monitors.errors import StoreError
from sentei.monitors.records import Missing
from sentei.monitors.store import Store
from sentei.monitors.tally import read_audit_tally
from sentei.pipeline.rollout.runner import start_rollout
from sentei.serving.engine.attention_use import AttentionUse, LayerUse
from sentei.serving.front.access import Operator, OperatorBook, Role
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.metrics.counts import OUTCOMES, REASONS
from sentei.serving.metrics.names import MAX_WORDS, METRICS
from sentei.serving.metrics.sharing import ALONE_S, FRESH_S, KEEP_S, PREFIX
from sentei.serving.rollout.controller import Controller
from sentei.serving.rollout.scrape import AuditCounts, Scrape, add_metrics_route
from sentei.serving.settings import Limits
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request
from tests.fakes_serving import (
    MODEL,
    FakeClock,
    FakeDesk,
    FakeTokenizer,
    FakeVariant,
    crash,
)

LONG = "a long enough prompt"
HEADERS = {"authorization": f"Bearer {'look' * 8}"}
BOOK = [Operator(name="prometheus", token="look" * 8, role=Role.LOOK)]
USE = AttentionUse(4, 2, (LayerUse(0, 0.5, None), LayerUse(1, 0.25, 0.125)))
Found = dict[str, dict[tuple[tuple[str, str], ...], float]]


@dataclass
class House:
    """Ingresses on one store, each with its client, and one controller that tests tick by hand."""

    store: Store
    clock: FakeClock = field(default_factory=FakeClock)
    sparse: FakeVariant = field(default_factory=lambda: FakeVariant("sparse", attention=USE))
    desk: FakeDesk = field(default_factory=FakeDesk)
    gateways: list[Gateway] = field(default_factory=list)
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def __post_init__(self) -> None:
        ready = {"dense": 1, "sparse": 1}
        folder = Path("unused")
        self.controller = Controller(
            self.store, mirror=None, reports=folder, clock=self.clock, replicas=lambda: ready
        )

    async def controller_status(self) -> dict[str, Any]:
        """What the controller says of itself."""
        return self.controller.status()

    async def auditor_status(self) -> dict[str, Any]:
        """What an auditor says of itself that has lost two records."""
        numbers = {"waiting": 3, "records_waiting": 0, "written": 7, "dropped": 2, "num_errors": 9}
        return {"pid": 1, **numbers}

    @asynccontextmanager
    async def ingress(self, *, is_open: bool = False) -> AsyncIterator[Gateway]:
        """One more ingress."""
        variants = {"dense": FakeVariant("dense"), "sparse": self.sparse}
        gateway = Gateway(
            variants,
            self.store,
            tokenizer=FakeTokenizer(),
            model_name=MODEL,
            limits=Limits(poll_every_s=60),
            desk=self.desk,
            clock=self.clock,
            now_s=self.clock,
        )
        api = build_api(gateway)
        workers = {"controller": self.controller_status, "auditor": self.auditor_status}
        add_metrics_route(
            api,
            gateway,
            self.store,
            operators=OperatorBook(BOOK),
            is_open=is_open,
            workers=workers,
            now_s=self.clock,
            clock=self.clock,
        )
        async with api.router.lifespan_context(api):
            for name in variants:
                await gateway.introduce_once(name)
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                self.gateways.append(gateway)
                self.clients.append(client)
                yield gateway

    def play(self, num_s: int = 15) -> None:
        """Let a rollout go on: eight good sessions and a tick each second."""
        for second in range(num_s):
            for i in range(second * 8, second * 8 + 8):
                self.store.add_request(make_request(i, at_s=self.clock.now_s, share=0.5))
                self.store.add_audit(make_audit(i, at_s=self.clock.now_s + 0.25))
            self.clock.now_s += 1.0
            self.controller.tick()

    async def obey(self) -> None:
        """Let each ingress see that the controller renews its lease."""
        for gateway in self.gateways:
            await gateway.read_routing_once()
        self.clock.now_s += 1.0
        self.controller.tick()
        for gateway in self.gateways:
            await gateway.read_routing_once()

    async def scrape(self, i: int = 0) -> Found:
        """Scrape one ingress, a second after the last look; it has just shared its counts."""
        self.clock.now_s += 1.5
        with suppress(StoreError):
            self.gateways[i].shared.write()
        response = await self.clients[i].get("/metrics", headers=HEADERS)
        assert response.status_code == 200, response.text
        return read(response.text)

    async def settle(self, num_requests: int) -> None:
        """Wait until so many requests are written: the writer has a thread of its own."""
        while len(self.store.read_requests(ROLLOUT)) < num_requests:
            await asyncio.sleep(0.01)

    async def ask(self, i: int = 0, content: str = LONG, **headers: str) -> None:
        """Send one chat."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        await self.clients[i].post("/v1/chat/completions", json=body, headers=headers)


def read(text: str) -> Found:
    """Samples by name and labels."""
    found: Found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            series = found.setdefault(sample.name, {})
            assert key not in series, "a series twice makes Prometheus refuse the whole page"
            series[key] = sample.value
    return found


def total(found: Found, name: str, **labels: str) -> float:
    """Sum of the series that have these labels."""
    return sum(value for key, value in found.get(name, {}).items() if labels.items() <= dict(key).items())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A store with one rollout that is promoted, and one ingress that obeys it."""
    with Store.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        house = House(store)
        house.clock.now_s = START_S
        start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT)
        async with house.ingress():
            house.play()
            await house.obey()
            yield house


async def test_page_has_every_metric_of_the_list_and_no_other(house: House) -> None:
    """After traffic with a fallback, audits and ticks each metric of the list is there, with its labels."""
    for i in range(20):
        await house.ask(**{"x-session-id": f"s{i}"})
    house.sparse.fail_after, house.sparse.failure = 2, crash("sparse")
    for i in range(20):
        await house.ask(**{"x-session-id": f"s{i}"})

    found = await house.scrape()

    expected = {spec.name + suffix for spec in METRICS for suffix in spec.suffixes}
    assert found.keys() == expected
    for spec in METRICS:
        for suffix in spec.suffixes:
            labels = {name for key in found[spec.name + suffix] for name, _ in key} - {"le"}
            assert labels == set(spec.labels), spec.name


async def test_numbers_are_those_that_were_planted(house: House) -> None:
    """Requests, fallbacks, times, audits, evidence, share, phase and workers, each with its value."""
    for i in range(20):
        await house.ask(**{"x-session-id": f"s{i}"})
    house.sparse.fail_after, house.sparse.failure = 2, crash("sparse")
    await house.ask(**{"x-session-id": "s0"})
    await house.settle(120 + 21)
    house.store.add_request(make_request(900, at_s=house.clock.now_s))
    house.store.add_audit(make_audit(900, status="missing", reason="expired", at_s=house.clock.now_s + 9))
    house.store.add_request(make_request(901, at_s=house.clock.now_s))

    found = await house.scrape()

    assert total(found, "sentei_requests_total") == 21
    assert total(found, "sentei_requests_total", variant="sparse", rung="medium", outcome="ok") >= 15
    assert total(found, "sentei_requests_total", variant="sparse", outcome="fallback_mid") == 1
    assert total(found, "sentei_fallbacks_total", slice="long", reason="crash") == 1
    assert total(found, "sentei_ttft_seconds_count") == 21
    assert total(found, "sentei_queue_seconds_sum") <= total(found, "sentei_ttft_seconds_sum")
    sparse = total(found, "sentei_requests_total", variant="sparse")
    for name, density in (("prefill", 0.375), ("decode", 0.125)):
        labels = {"slice": "long", "rung": "medium", "pass": name}
        assert total(found, "sentei_attention_density_ratio_count", **labels) == sparse
        assert total(found, "sentei_attention_density_ratio_sum", **labels) == pytest.approx(density * sparse)
    assert total(found, "sentei_audits_chosen_total") == 122 + len(house.desk.jobs)
    assert total(found, "sentei_audits_total", status="scored") == 120
    assert total(found, "sentei_audits_total", status="missing", reason="expired") == 1
    assert total(found, "sentei_audit_lag_seconds_sum") == pytest.approx(120 * 0.25)
    assert total(found, "sentei_audit_unscored_age_seconds") > 0
    assert total(found, "sentei_dropped_mass_ratio_sum", rung="medium") == pytest.approx(1.2)
    assert total(found, "sentei_rollout_phase") == total(found, "sentei_rollout_phase", phase="promoted") == 1
    info = {"rollout": ROLLOUT, "policy": "test", "stage": "full", "rung": "medium"}
    assert total(found, "sentei_rollout_info", **info) == 1
    assert total(found, "sentei_share_ratio", slice="long", rung="medium") == 0.95
    assert total(found, "sentei_lease_seconds") == 3
    assert total(found, "sentei_lease_age_seconds") == 1.5
    assert total(found, "sentei_lease_is_fresh") == 1
    for of in ("harm", "safe"):
        bound = total(found, "sentei_guardrail_log_evidence_bound", guardrail="agree", of=of)
        assert (total(found, "sentei_guardrail_log_evidence", guardrail="agree", of=of) >= bound) == (
            of == "safe"
        )
    assert total(found, "sentei_guardrail_verdict") == 1
    assert total(found, "sentei_guardrail_verdict", guardrail="agree", verdict="safe") == 1
    assert total(found, "sentei_guardrail_mean_bound", guardrail="agree") == 0.1
    assert total(found, "sentei_ticks_total") == 16
    assert total(found, "sentei_tick_errors_total") == 0
    assert total(found, "sentei_tick_age_seconds") == 1.5
    assert total(found, "sentei_records_dropped_total", process="auditor") == 2
    assert total(found, "sentei_records_written_total", process=house.gateways[0].counts.process) > 0
    assert total(found, "sentei_store_up") == total(found, "sentei_worker_up", worker="controller") == 1


async def test_nothing_that_a_client_or_a_policy_sends_makes_many_series(house: House) -> None:
    """Thousands of sessions, users, models, slices, rungs and words make few series, and none shows."""
    for i in range(300):
        body = {
            "model": MODEL if i % 2 else f"model-{i}",
            "user": f"user{i}@example.org",
            "messages": [{"role": "user", "content": f"{LONG} secret{i}"}],
        }
        headers = {"x-session-id": f"session-{i}", "x-request-id": f"request-{i}"}
        await house.clients[0].post("/v1/chat/completions", json=body, headers=headers)
    counts = house.gateways[0].counts
    for i in range(3000):
        changes = {"slice_id": f"slice{i}", "rung_id": f"rung{i}", "variant_assigned": f"v{i}"}
        record = make_request(10_000 + i, **changes, outcome=f"outcome{i}")
        counts.end(record, failed_by=f"reason{i}", queue_s=0.1, attention={"prefill_density": 0.5})
        counts.end(make_request(i, slice_id=f'"}}\n{i}'), failed_by="", queue_s=None, attention=None)
    audits = AuditCounts(ROLLOUT)
    for i in range(3000):
        changes = {
            "slice_id": f"slice{i}",
            "rung_id": f"rung{i}",
            "reason": f"it broke {i}",
            "status": "error",
        }
        house.store.add_audit(make_audit(20_000 + i, **changes))
    audits.add(read_audit_tally(house.store, ROLLOUT, after=0, since_s=0.0, now_s=house.clock.now_s))

    house.clock.now_s += 1.5
    house.gateways[0].shared.write()  # as it does by itself every few seconds
    text = (await house.clients[0].get("/metrics", headers=HEADERS)).text

    found = read(text)
    for secret in ("session-", "example.org", "secret", "request-", "model-", "it broke", "user"):
        assert secret not in text
    slices = {dict(key)["slice"] for key in found["sentei_requests_total"]}
    assert len(slices) == MAX_WORDS + 1
    assert {dict(key)["variant"] for key in found["sentei_requests_total"]} <= {"dense", "sparse", "other"}
    assert {dict(key)["outcome"] for key in found["sentei_requests_total"]} <= {*OUTCOMES, "other"}
    assert {dict(key)["reason"] for key in found["sentei_audits_total"]} <= {"", *Missing, "other"}
    assert {dict(key)["reason"] for key in found.get("sentei_fallbacks_total", {})} <= {*REASONS, "other"}
    assert sum(len(series) for series in found.values()) < 6_000
    assert len(audits.samples()) < 6_000


async def test_every_ingress_tells_of_all_and_no_counter_falls(house: House) -> None:
    """Whichever ingress is asked, the sum is that of all, and each series only grows, also when one ends."""
    seen: Found = {}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(house.ingress())
        await house.obey()
        for turn in range(12):
            await house.ask(turn % 2, **{"x-session-id": f"s{turn}"})
            house.gateways[turn % 2].shared.write()  # as it does by itself every few seconds
            found = await house.scrape((turn // 2) % 2)
            assert total(found, "sentei_requests_total") == turn + 1
            for name, series in found.items():
                if name.endswith(("_total", "_count", "_bucket")):
                    before = seen.get(name, {})
                    assert all(value >= before.get(key, 0) for key, value in series.items()), name
                    assert before.keys() <= series.keys()
            seen = found
        await house.ask(1)
        gone = house.gateways[1].counts.process

    last = await house.scrape()
    house.clock.now_s += FRESH_S
    later = await house.scrape()

    assert total(last, "sentei_requests_total", process=gone) == 7  # written as it ended
    assert total(later, "sentei_requests_total", process=gone) == 0
    assert total(later, "sentei_requests_total") == 6


async def test_store_that_is_away_is_said_and_own_counts_go_on(house: House, tmp_path: Path) -> None:
    """A page comes without the store: at first with what was shared, then with what this ingress knows."""
    await house.ask(**{"x-session-id": "s0"})
    before = await house.scrape()
    (tmp_path / "state.db").rename(tmp_path / "away.db")
    await house.ask(**{"x-session-id": "s1"})
    soon = await house.scrape()
    house.clock.now_s += ALONE_S
    later = await house.scrape()
    (tmp_path / "away.db").rename(tmp_path / "state.db")
    back = await house.scrape()

    assert [total(page, "sentei_store_up") for page in (before, soon, later, back)] == [1, 0, 0, 1]
    assert [total(p, "sentei_requests_total") for p in (before, soon, later, back)] == [1, 1, 2, 2]
    assert total(later, "sentei_store_errors_total", operation="read_metrics") >= 1
    assert "sentei_rollout_phase" not in later
    assert total(back, "sentei_audits_total") == 120  # not counted twice


async def test_a_scrape_writes_nothing(house: House) -> None:
    """Who may look changes nothing, however often: the store was read, and counts are as shared."""
    await house.ask(**{"x-session-id": "s0"})
    before = house.store.read_values(PREFIX)
    house.clock.now_s += 1.5

    pages = [read((await house.clients[0].get("/metrics", headers=HEADERS)).text) for _ in range(3)]

    assert house.store.read_values(PREFIX) == before
    assert {total(page, "sentei_store_up") for page in pages} == {1}
    assert {total(page, "sentei_requests_total") for page in pages} == {0}  # the next share tells of it


async def test_a_scrape_that_is_given_up_counts_nothing_twice(house: House) -> None:
    """Prometheus hangs up in the middle of a look, which goes on, and asks again."""
    is_inside, may_go_on = threading.Event(), threading.Event()

    def slow_clock() -> float:
        is_inside.set()
        may_go_on.wait(10)
        return house.clock.now_s

    scrape = Scrape(house.gateways[0], house.store, workers={}, now_s=slow_clock)
    given_up = asyncio.create_task(scrape.page())
    await asyncio.to_thread(is_inside.wait, 10)
    given_up.cancel()
    again = asyncio.create_task(scrape.page())
    await asyncio.sleep(0.1)  # a second look would be under way by now
    may_go_on.set()
    page = await again

    audits = [metric for metric in page.collect() if metric.name == "sentei_audits"]
    assert sum(sample.value for metric in audits for sample in metric.samples) == 120


async def test_worker_that_is_away_is_said(house: House) -> None:
    """The page comes without the controller, and says so."""

    async def away() -> dict[str, Any]:
        raise RuntimeError("ActorDiedError")

    async with AsyncExitStack() as stack:
        house.controller_status = away  # type: ignore[method-assign]
        await stack.enter_async_context(house.ingress())
        found = await house.scrape(1)

    assert total(found, "sentei_worker_up", worker="controller") == 0
    assert "sentei_ticks_total" not in found


async def test_who_may_read(house: House) -> None:
    """A token of role `look`, or anybody where the setting says so."""
    async with house.ingress(is_open=True):
        answers = [
            await house.clients[i].get("/metrics", headers=headers)
            for i, headers in ((0, {}), (0, {"authorization": "Bearer x"}), (0, HEADERS), (1, {}))
        ]

    assert [answer.status_code for answer in answers] == [401, 401, 200, 200]
    assert answers[2].headers["content-type"].startswith("text/plain")


async def test_counts_of_processes_that_are_long_gone_are_deleted(house: House) -> None:
    """The store does not fill with what ingresses of last week have counted."""
    house.store.save_value(f"{PREFIX}ingress-old", '{"at_s": 0.0, "samples": []}')
    house.store.save_value(f"{PREFIX}ingress-odd", "not JSON")
    house.clock.now_s += KEEP_S
    async with house.ingress():
        found = await house.scrape(1)

    assert total(found, "sentei_store_up") == 1
    kept = {name.removeprefix(PREFIX) for name in house.store.read_values(PREFIX)}
    assert house.gateways[1].counts.process in kept
    assert kept <= {gateway.counts.process for gateway in house.gateways}


async def test_real_prometheus_reads_the_page(house: House) -> None:
    """Prometheus' own checker finds nothing to complain of: names, units, help, types."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool on this machine: apt-get install prometheus")
    await house.ask()
    house.clock.now_s += 1.5
    text = (await house.clients[0].get("/metrics", headers=HEADERS)).text

    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
