"""Several ingresses on one store: how old a table each may obey, and for how long they may disagree."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from sentei.monitors.store import Store
from sentei.policies.signals import RoutingTable
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.settings import Limits
from tests.fakes_serving import MODEL, FakeStore, FakeTokenizer, FakeVariant, make_table
from tests.integration.test_ingress import World

POLL_S = 0.05
RUN_S = 4.0


class TimedStore:
    """A real store that knows how long its longest read of the table took."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.longest_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read_routing(self) -> tuple[RoutingTable, int] | None:
        began_s = time.monotonic()
        try:
            return self._store.read_routing()
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)


async def test_ingresses_obey_one_table_within_a_poll_and_a_read(tmp_path: Path) -> None:
    """While versions are published: none obeys one that was replaced longer ago, none differs for longer."""
    url = f"sqlite:///{tmp_path / 'state.db'}"
    published: list[tuple[float, int]] = []  # when it was in the store, version
    seen: list[tuple[float, int, int, float]] = []  # when, the versions of both, how late the look was
    is_over = threading.Event()

    def publish() -> None:
        with Store.open(url) as store:
            token = store.acquire_lease("one", ttl_s=60, now_s=time.time())
            assert token is not None
            version = 0
            while not is_over.wait(0.02):
                version += 1
                store.publish_routing(make_table(version=version, lease_s=30), token=token, now_s=time.time())
                published.append((time.monotonic(), version))

    publisher = threading.Thread(target=publish)
    stores = [TimedStore(Store.open(url)) for _ in range(2)]
    gateways = [_gateway(store) for store in stores]
    for gateway in gateways:
        await gateway.start()
    publisher.start()
    end_s = last_s = time.monotonic()
    end_s += RUN_S
    while (now_s := time.monotonic()) < end_s:
        tables = [gateway.lease.table(now_s) for gateway in gateways]
        if all(tables):
            one, other = (table.version for table in tables if table is not None)
            seen.append((now_s, one, other, now_s - last_s))
        last_s = time.monotonic()
        await asyncio.sleep(0.002)
    is_over.set()
    publisher.join()
    for gateway, store in zip(gateways, stores, strict=True):
        await gateway.stop()
        store._store.close()

    # A busy machine makes the event loop late: what it is late by is on top, and measured.
    late_s = max(late for *_, late in seen)
    bound_s = POLL_S + 2 * max(store.longest_s for store in stores) + 2 * late_s
    lags = [at_s - _replaced_at(published, min(one, other), at_s) for at_s, one, other, _ in seen]
    print(
        f"{len(published)} versions, {len(seen)} looks: longest {max(lags):.3f} s of at most {bound_s:.3f} s"
    )
    assert len(published) > 20
    assert len({version for _, version, *_ in seen}) > 10
    assert max(lags) <= bound_s
    assert _longest_difference(seen) <= bound_s


def _replaced_at(published: list[tuple[float, int]], version: int, at_s: float) -> float:
    """When the store had a newer version; `at_s` if it had none."""
    return next((when for when, newer in published if newer > version and when <= at_s), at_s)


def _longest_difference(seen: list[tuple[float, int, int, float]]) -> float:
    """How long one ingress lacked a version that the other obeyed."""
    longest_s, first_s = 0.0, dict[int, float]()
    for at_s, one, other, _ in seen:
        first_s.setdefault(max(one, other), at_s)
        ahead = [when for version, when in first_s.items() if version > min(one, other)]
        longest_s = max([longest_s, *(at_s - when for when in ahead)])
        first_s = {version: when for version, when in first_s.items() if version > min(one, other)}
    return longest_s


def _gateway(store: TimedStore) -> Gateway:
    variants = {name: FakeVariant(name) for name in ("dense", "sparse")}
    return Gateway(
        variants,  # type: ignore[arg-type]
        store,  # type: ignore[arg-type]
        tokenizer=FakeTokenizer(),
        model_name=MODEL,
        limits=Limits(poll_every_s=POLL_S),
    )


class SlowStore(FakeStore):
    """A store whose first read takes until it is let go, and gives what it saw at its beginning."""

    has_begun = threading.Event()
    may_end = threading.Event()
    is_slow = False

    def read_routing(self) -> tuple[RoutingTable, int] | None:
        found = self.routing
        if self.is_slow:
            self.is_slow = False
            self.has_begun.set()
            assert self.may_end.wait(10)
        return found


async def test_late_read_does_not_bring_an_older_table_back() -> None:
    """The poll began before an abort and ends after it: the share that was taken away stays away."""
    store = SlowStore(routing=(make_table(version=1), 1))
    world = World(store=store)
    async with world.run():
        store.is_slow = True
        poll = asyncio.create_task(world.gateway.read_routing_once())
        await asyncio.to_thread(store.has_begun.wait, 10)
        dense = make_table(version=1, share=0.0, rung_id="dense")
        store.routing = (dense, 3)
        abort = asyncio.create_task(world.gateway.read_routing_once())
        await asyncio.sleep(0.1)
        store.may_end.set()
        await asyncio.gather(poll, abort)
        found = world.gateway.lease.table(world.clock())

    assert found == dense


async def test_readiness_says_which_table_is_obeyed() -> None:
    """Version, renewals and age of the read: what two ingresses obey can be compared from outside."""
    world = World(store=FakeStore(routing=(make_table(version=7), 4)))
    async with world.run() as client:
        world.clock.now_s += 1.5
        found = (await client.get("/readyz")).json()["routing"]

    assert found == {"rollout_id": "r1", "version": 7, "renewals": 5, "read_ago_s": 1.5}
