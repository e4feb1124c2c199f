"""The operations API over a real SQLite store and a real controller, with fakes for the variants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sentei.monitors.signals_reader import SignalQuery, read_signals
from sentei.monitors.store import Store
from sentei.serving.errors import VariantError
from sentei.serving.front.access import Operator, OperatorBook, Role
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.rollout.controller import Controller
from sentei.serving.rollout.operations import add_admin_routes
from sentei.serving.settings import Limits
from tests.fakes_records import make_request
from tests.fakes_serving import MODEL, FakeClock, FakeTokenizer, FakeVariant, make_table

POLICY = (Path(__file__).parents[2] / "policies" / "examples" / "demo.yaml").read_text(encoding="utf-8")
HEADERS = {"authorization": "Bearer secret"}
NAMES = {Role.LOOK: "looker", Role.OPERATE: "operator", Role.APPROVE: "admin"}
ADMIN = Operator(name="secretary", token_sha256=hashlib.sha256(b"secret").hexdigest(), role=Role.APPROVE)
OPERATORS = [Operator(name=name, token=role.value * 8, role=role) for role, name in NAMES.items()]


@dataclass
class Office:
    """An ingress with its operations API, the store behind it, and a controller that tests tick by hand."""

    client: httpx.AsyncClient
    store: Store
    controller: Controller
    sparse: FakeVariant
    clock: FakeClock
    gateway: Gateway
    down: dict[str, int]  # ready replicas of each variant, as the controller counts them


@asynccontextmanager
async def open_office(
    folder: Path,
    *,
    has_sparse: bool = True,
    allow_faults: bool = False,
    operators: Sequence[Operator] = (),
) -> AsyncIterator[Office]:
    """Serve over ASGI with one store for ingress and controller."""
    sparse, clock = FakeVariant("sparse"), FakeClock()
    variants = {"dense": FakeVariant("dense"), **({"sparse": sparse} if has_sparse else {})}
    with Store.open(f"sqlite:///{folder / 'state.db'}") as store:
        limits = Limits(poll_every_s=60)
        gateway = Gateway(
            variants, store, tokenizer=FakeTokenizer(), model_name=MODEL, limits=limits, note="no adapter"
        )
        api = build_api(gateway)
        book = OperatorBook([ADMIN, *operators])
        add_admin_routes(api, gateway, store, operators=book, allow_faults=allow_faults, now_s=clock)
        ready = {"dense": 1, "sparse": 1}
        controller = Controller(store, mirror=None, reports=folder, clock=clock, replicas=lambda: ready)
        async with api.router.lifespan_context(api):
            for name in variants:
                await gateway.introduce_once(name)
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=HEADERS) as client:
                yield Office(client, store, controller, sparse, clock, gateway, ready)


async def start(office: Office, **fields: Any) -> httpx.Response:
    """Start the demo's policy."""
    return await office.client.post("/admin/v1/rollouts", json={"policy": POLICY, **fields})


@pytest.mark.parametrize(
    ("role", "path", "body", "status"),
    [
        ("look", "", {"policy": POLICY}, 403),
        ("operate", "", {"policy": POLICY}, 201),
        ("look", "/none/commands", {"kind": "abort"}, 403),
        ("operate", "/none/commands", {"kind": "abort"}, 404),
        ("operate", "/none/commands", {"kind": "promote"}, 403),
        ("approve", "/none/commands", {"kind": "promote"}, 404),
        ("look", "/none/policy", {"policy": POLICY}, 403),
    ],
)
async def test_role_decides_what_a_token_may_do(
    tmp_path: Path, role: str, path: str, body: dict[str, Any], status: int
) -> None:
    """Who may look reads everything and changes nothing; to let a rollout advance is a role of its own."""
    async with open_office(tmp_path, operators=OPERATORS) as office:
        headers = {"authorization": f"Bearer {role * 8}"}
        listed = await office.client.get("/admin/v1/rollouts", headers=headers)
        response = await office.client.post(f"/admin/v1/rollouts{path}", json=body, headers=headers)

    assert (listed.status_code, response.status_code) == (200, status)


async def test_order_carries_the_name_of_its_token(tmp_path: Path) -> None:
    """Who gave an order is known by the token; a name in the body is refused."""
    async with open_office(tmp_path, operators=OPERATORS) as office:
        headers = {"authorization": f"Bearer {'operate' * 8}"}
        rollout_id = (await start(office)).json()["rollout_id"]
        path = f"/admin/v1/rollouts/{rollout_id}/commands"
        forged = await office.client.post(path, json={"kind": "pause", "by": "eve"}, headers=headers)
        await office.client.post(path, json={"kind": "pause"}, headers=headers)
        query = SignalQuery(rollout_id, frozenset(), health_window_s=60.0, audit_limit_s=60.0)
        orders = read_signals(office.store, query, cursor=0, now_s=0.0).commands

    assert (forged.status_code, forged.json()["error"]["param"]) == (400, "by")
    assert [(order.kind, order.by) for order in orders] == [("pause", "operator")]


async def test_rollout_is_started_taken_up_and_shown(tmp_path: Path) -> None:
    """A started rollout waits for the controller; after its first tick the page shows where it stands."""
    async with open_office(tmp_path) as office:
        started = await start(office)
        path = f"/admin/v1/rollouts/{started.json()['rollout_id']}"
        before = (await office.client.get(path)).json()
        office.controller.tick()
        after = (await office.client.get(path)).json()
        routing = (await office.client.get("/admin/v1/routing")).json()

    assert (started.status_code, before["phase"], before["routes"]) == (201, "waiting", [])
    assert (after["phase"], after["stage_id"], after["rung_id"]) == ("running", "shadow", "mild")
    assert [route["slice_id"] for route in after["routes"]] == ["short", "long", "longer"]
    assert after["events"][0]["kind"] == "started"
    assert (routing["table"]["rollout_id"], routing["renewals"]) == (after["rollout_id"], 1)
    assert not routing["is_obeyed"]


async def test_request_record_is_shown_without_its_text(tmp_path: Path) -> None:
    """An operator sees a request's record with what its attention kept; an unknown id is a 404."""
    async with open_office(tmp_path) as office:
        kept = {"sparse_calls": 4, "dense_calls": 0, "layers": {"0": [0.1, None]}}
        office.store.add_request(make_request(1, attention=json.dumps(kept)))
        office.store.add_request(make_request(2))
        found = (await office.client.get("/admin/v1/requests/q1")).json()
        plain = (await office.client.get("/admin/v1/requests/q2")).json()
        missing = await office.client.get("/admin/v1/requests/nobody")

    assert (found["request_id"], found["rung_id"], found["attention"]) == ("q1", "medium", kept)
    assert plain["attention"] is None
    assert not {"prompt", "text", "messages"} & found.keys()
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")


async def test_command_acts_at_the_next_tick(tmp_path: Path) -> None:
    """An abort is taken at once and carried out by the controller; then a new rollout may start."""
    async with open_office(tmp_path) as office:
        rollout_id = (await start(office)).json()["rollout_id"]
        office.controller.tick()
        second = await start(office)
        order = {"kind": "abort", "reason": "drill"}
        taken = await office.client.post(f"/admin/v1/rollouts/{rollout_id}/commands", json=order)
        office.clock.now_s += 1
        office.controller.tick()
        listed = (await office.client.get("/admin/v1/rollouts")).json()["rollouts"]

    assert (second.status_code, second.json()["error"]["code"]) == (409, "rollout_running")
    assert taken.status_code == 202
    assert (listed[0]["outcome"], listed[0]["policy_name"]) == ("rolled_back", "demo")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("rollouts", {"policy": POLICY.replace("stages:", "stagse:")}, 400, "stages"),
        ("rollouts", {"policy": "["}, 400, "policy.yaml"),
        ("rollouts", {"policy": POLICY.replace("rung: bold", "rung: wild")}, 400, "'wild'"),
        ("rollouts", {}, 400, "policy is missing"),
        ("rollouts", {"policy": POLICY, "rollout_id": "../x"}, 400, "rollout_id"),
        ("rollouts/none/commands", {"kind": "abort"}, 404, "'none'"),
        ("rollouts/none/commands", {"kind": "explode"}, 400, "'explode'"),
    ],
)
async def test_bad_orders(tmp_path: Path, path: str, body: dict[str, Any], status: int, words: str) -> None:
    """A bad order is refused by name and changes nothing."""
    async with open_office(tmp_path) as office:
        response = await office.client.post(f"/admin/v1/{path}", json=body)
        rollouts = office.store.read_rollouts()

    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert rollouts == ()


async def test_dense_only_app_refuses_a_rollout(tmp_path: Path) -> None:
    """Without an adapter there is nothing to roll out, and the refusal says why."""
    async with open_office(tmp_path, has_sparse=False) as office:
        response = await start(office)

    assert (response.status_code, response.json()["error"]["code"]) == (409, "no_sparse_variant")
    assert "no adapter" in response.json()["error"]["message"]


async def test_history_comes_in_pages(tmp_path: Path) -> None:
    """A page says where the one before it ends; the last one says that there is none."""
    async with open_office(tmp_path) as office:
        path = f"/admin/v1/rollouts/{(await start(office)).json()['rollout_id']}"
        for kind in ("pause", "resume", "pause"):
            office.controller.tick()
            await office.client.post(f"{path}/commands", json={"kind": kind, "reason": "[/x]"})
            office.clock.now_s += 1
        office.controller.tick()
        newest = (await office.client.get(f"{path}/events?limit=2")).json()
        older = (await office.client.get(f"{path}/events?limit=50&before={newest['before']}")).json()
        found = (await office.client.get(path)).json()

    kinds = [event["kind"] for event in older["events"] + newest["events"]]
    assert (len(newest["events"]), older["before"]) == (2, None)
    assert [kind for kind in kinds if kind != "hold"] == ["started", "pause", "resume", "pause"]
    assert found["num_events"] == len(kinds)
    assert found["stage_entered_s"] is not None


async def test_an_order_to_a_rollout_that_is_over_is_refused(tmp_path: Path) -> None:
    """The controller runs the newest rollout only, so nobody is told that an older one will act."""
    async with open_office(tmp_path) as office:
        first = (await start(office, rollout_id="first")).json()["rollout_id"]
        office.controller.tick()
        path, order = f"/admin/v1/rollouts/{first}/commands", {"kind": "abort"}
        await office.client.post(path, json=order)
        office.clock.now_s += 1
        office.controller.tick()
        again = await start(office, rollout_id="second", release_quarantine=True)
        late = await office.client.post(path, json={**order, "kind": "retry"})
        about = (await office.client.get("/admin/v1/rollouts/second")).json()["about"]

    assert (again.status_code, about["started_by"]) == (201, "secretary")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "rollout_over")
    assert "'second' was started after it" in late.json()["error"]["message"]


@pytest.mark.parametrize("allow_faults", [True, False])
async def test_faults_only_where_allowed(tmp_path: Path, allow_faults: bool) -> None:
    """Faults are planted only in an app that was started for drills."""
    fault = {"kind": "pooled_keys_off_by_one", "past_tokens": 8}
    async with open_office(tmp_path, allow_faults=allow_faults) as office:
        response = await office.client.put("/admin/v1/fault", json={"fault": fault})

    assert response.status_code == (200 if allow_faults else 403)
    assert office.sparse.fault == (fault if allow_faults else None)


@pytest.mark.parametrize("fault", [{"kind": "nope"}, {"past_tokens": -1}, {"colour": "red"}])
async def test_impossible_fault_is_refused_in_our_words(tmp_path: Path, fault: dict[str, Any]) -> None:
    """What no scorer knows never reaches a replica, so no answer shows what Ray says of it."""
    async with open_office(tmp_path, allow_faults=True) as office:
        response = await office.client.put("/admin/v1/fault", json={"fault": fault})

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "fault")
    assert "its fields are kind and past_tokens" in error["message"]
    assert office.sparse.fault is None


async def test_fault_that_a_replica_did_not_take_shows_nothing_of_ray(tmp_path: Path) -> None:
    """The log has the paths and process ids; the caller learns that it did not work."""
    async with open_office(tmp_path, allow_faults=True) as office:

        async def die(fault: Any) -> None:
            raise VariantError("sparse", "crash", "ray::Replica (pid=7, ip=10.0.0.1) /usr/lib/x.py")

        office.sparse.plant = die  # type: ignore[method-assign]
        response = await office.client.put("/admin/v1/fault", json={"fault": {"past_tokens": 8}})

    assert response.status_code == 503
    assert "pid" not in response.text


async def test_status_page_names_workers_that_are_away(tmp_path: Path) -> None:
    """The status page comes also when somebody on it does not answer."""
    async with open_office(tmp_path) as office:
        found = (await office.client.get("/admin/v1/status")).json()

    assert found["workers"]["sparse"]["is_up"]
    assert found["workers"]["dense"]["rung_ids"] == ["dense", "mild", "medium", "bold"]


async def test_second_controller_waits_for_the_lease(tmp_path: Path) -> None:
    """A controller that starts while another holds the lease waits until it has run out, then goes on."""
    async with open_office(tmp_path) as office:
        await start(office)
        office.controller.tick()
        successor = Controller(office.store, mirror=None, reports=tmp_path, clock=office.clock)
        renewals = [office.store.read_routing()]
        successor.tick()
        renewals.append(office.store.read_routing())
        office.clock.now_s += 10
        successor.tick()
        renewals.append(office.store.read_routing())

    assert [found[1] for found in renewals if found is not None] == [1, 1, 2]


async def test_safer_edit_is_taken_at_the_next_tick(tmp_path: Path) -> None:
    """The answer lists what changes; the controller takes it, and goes on under it."""
    async with open_office(tmp_path) as office:
        rollout_id = (await start(office)).json()["rollout_id"]
        early = await edit(office, rollout_id, POLICY.replace("c50, share: 50%", "c50, share: 10%"))
        office.controller.tick()
        taken = await edit(office, rollout_id, POLICY.replace("c50, share: 50%", "c50, share: 10%"))
        office.clock.now_s += 1
        office.controller.tick()
        found = (await office.client.get(f"/admin/v1/rollouts/{rollout_id}")).json()

    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_begun")
    assert taken.status_code == 202
    assert taken.json()["changes"] == ["spec.stages[c50].share: 0.5 -> 0.1"]
    assert [event["kind"] for event in found["events"]] == ["started", "hold", "edit", "hold"]
    assert (found["rung_id"], found["waits_for"]) == ("mild", "signal")


async def edit(office: Office, rollout_id: str, policy: str) -> httpx.Response:
    """Ask for an edit of a running rollout."""
    body = {"policy": policy}
    return await office.client.post(f"/admin/v1/rollouts/{rollout_id}/policy", json=body)


@pytest.mark.parametrize(
    ("change", "status", "code", "words"),
    [
        (
            ("c50, share: 50%", "c50, share: 60%"),
            409,
            "unsafe_edit",
            "spec.stages[c50].share: 0.5 -> 0.6 may only fall",
        ),
        (("salt: demo", "salt: other"), 409, "unsafe_edit", "spec.assignment.salt"),
        (("salt: demo", "salt: demo"), 409, "unsafe_edit", "nothing would change"),
        (("stages:", "stagse:"), 400, "invalid_policy", "stages"),
    ],
)
async def test_edit_that_cannot_apply_is_refused_by_field(
    tmp_path: Path, change: tuple[str, str], status: int, code: str, words: str
) -> None:
    """The refusal names the field and the way out, and nothing reaches the controller."""
    async with open_office(tmp_path) as office:
        rollout_id = (await start(office)).json()["rollout_id"]
        office.controller.tick()
        response = await edit(office, rollout_id, POLICY.replace(*change))
        waiting = office.store.read_revisions(rollout_id)

    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    assert waiting == ()


async def test_policy_that_failed_before_cannot_be_edited_into(tmp_path: Path) -> None:
    """The quarantine holds for edits too."""
    failed = POLICY.replace("c50, share: 50%", "c50, share: 10%")
    async with open_office(tmp_path) as office:
        first = (await start(office, policy=failed, rollout_id="first")).json()["rollout_id"]
        office.controller.tick()
        order = {"kind": "abort"}
        await office.client.post(f"/admin/v1/rollouts/{first}/commands", json=order)
        office.clock.now_s += 1
        office.controller.tick()
        second = (await start(office, rollout_id="second")).json()["rollout_id"]
        office.clock.now_s += 1
        office.controller.tick()
        response = await edit(office, second, failed)

    assert (response.status_code, response.json()["error"]["code"]) == (409, "quarantined")


async def begin_half(office: Office) -> str:
    """A rollout that sends everybody to sparse, as far as this ingress can tell; returns its id."""
    rollout_id = str((await start(office)).json()["rollout_id"])
    token = office.store.acquire_lease("controller", ttl_s=100, now_s=0)
    assert token is not None
    for _ in range(2):
        table = replace(make_table(), rollout_id=rollout_id)
        office.store.publish_routing(table, token=token, now_s=0)
        await office.gateway.read_routing_once()
    return rollout_id


async def test_abort_reaches_this_ingress_with_the_answer(tmp_path: Path) -> None:
    """No controller ticks, and yet the next request is dense; another ingress reads the same."""
    async with open_office(tmp_path) as office:
        rollout_id = await begin_half(office)
        before = office.gateway._assign(20, "s").variant
        answer = await office.client.post(
            f"/admin/v1/rollouts/{rollout_id}/commands", json={"kind": "abort", "reason": "drill"}
        )
        after = office.gateway._assign(20, "s").variant
        other = office.store.read_routing()

    assert (before, after) == ("sparse", "dense")
    assert answer.json()["acts"] == "at once: every ingress serves dense within 60 s"
    assert other is not None
    assert {route.rung_id for route in other[0].routes} == {"dense"}


async def test_abort_that_the_store_does_not_take_stops_this_ingress_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away cannot tell the others, and the operator is not told that it did."""
    async with open_office(tmp_path) as office:
        rollout_id = await begin_half(office)
        monkeypatch.setattr("sentei.monitors.database.BUSY_TIMEOUT_MS", 1)
        office.store.close()
        with Store.open(f"sqlite:///{tmp_path / 'state.db'}") as other, other.write("a stopped controller"):
            answer = await office.client.post(
                f"/admin/v1/rollouts/{rollout_id}/commands", json={"kind": "abort"}
            )
        await office.gateway.read_routing_once()
        after = office.gateway._assign(20, "s").variant

    assert answer.status_code == 503
    assert "this ingress serves dense from now on, others until" in answer.json()["error"]["message"]
    assert after == "dense"


async def test_abort_while_dense_is_down_says_that_sparse_stays(tmp_path: Path) -> None:
    """A stop would send users to a variant that cannot answer: the policy's shelter says what is done."""
    async with open_office(tmp_path) as office:
        rollout_id = await begin_half(office)
        office.down["dense"] = 0
        office.clock.now_s = 200.0
        office.controller.tick()
        answer = await office.client.post(f"/admin/v1/rollouts/{rollout_id}/commands", json={"kind": "abort"})
        table = office.store.read_routing()

    assert answer.json()["acts"] == "dense is down: sparse stays until dense is back; abort again to insist"
    assert table is not None
    assert {route.rung_id for route in table[0].routes} != {"dense"}
