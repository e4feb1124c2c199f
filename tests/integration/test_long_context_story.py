"""The guardrails of `long-context-only` on the pocket model: every number comes from a real replay.

Ingress, auditor and controller are the real ones, in this process, over a real store; only Ray is left out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from sentei.kernels.hf.adapter import save_adapter
from sentei.monitors.store import Store
from sentei.pipeline.models import resolve_model
from sentei.pipeline.text.corpus import load_corpus
from sentei.serving.front.access import TOKEN_VARIABLE
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.ingress.writer import RecordWriter
from sentei.serving.replica.variant import ModelServer
from sentei.serving.rollout.auditor import Auditor
from sentei.serving.rollout.controller import Controller
from sentei.serving.rollout.operations import add_admin_routes
from sentei.serving.settings import AppArgs, Limits
from tests.trial_ladders import exact_adapter

pytestmark = pytest.mark.timeout(900)  # a hundred sessions, four passes over each prompt, on a busy machine

PROMPT_TOKENS = 1024
BATCH = 12  # sessions between two ticks: enough for one tick to prove harm
FAULT = {"kind": "pooled_keys_lost", "past_tokens": 512}
HEADERS = {"authorization": "Bearer a-token-of-tests"}


def shrunk_policy(*, asks_gain: bool = False) -> str:
    """The shipped policy, its guardrails untouched, for prompts from 1k tokens and a test's patience.

    The pocket model saves nothing at this length, so where it shall be promoted no benefit is asked for.
    """
    text = resources.files("sentei.policies").joinpath("examples/long-context-only.yaml").read_text()
    document = yaml.safe_load(text)
    spec = document["spec"]
    spec["slices"]["buckets"] = [
        {"id": "rest", "range": [0, PROMPT_TOKENS], "pin": "control"},
        {"id": "long", "range": [PROMPT_TOKENS, 4096]},
    ]
    spec["ladder"] = spec["ladder"][:1]
    spec["stages"] = [
        {"id": "shadow", "share": 0, "rung": "mild"},
        {"id": "full", "share": "90%", "rung": "mild", "hold_min": "1s"},
    ]
    spec["advance"] |= {"min_units": BATCH, "min_served_units": 1}
    spec["schedule"]["check_every"] = "100ms"
    if not asks_gain:
        del spec["benefit"]
    return yaml.safe_dump(document, sort_keys=False)


class Variant(ModelServer):
    """A model server in this process, under the name that the ingress knows it by."""

    def __init__(self, args: AppArgs, name: Any) -> None:
        super().__init__(args.variant_options(name))
        self.name = name


@dataclass
class Shop:
    """Everything that serves, and prompts for it."""

    client: httpx.AsyncClient
    gateway: Gateway
    auditor: Auditor
    store: Store
    controller: Controller
    prompts: Sequence[Sequence[int]]
    num_sessions: int = 0

    async def order(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the operations API."""
        response = await self.client.request(method, f"/admin/v1/{path}", json=body, headers=HEADERS)
        return response.raise_for_status().json()

    async def serve(self, rollout_id: str) -> dict[str, Any]:
        """Answer a batch of new sessions, audit them, let the controller tick; returns where it stands."""
        await self.gateway.read_routing_once()
        for _ in range(BATCH):
            prompt = list(self.prompts[self.num_sessions % len(self.prompts)])
            self.num_sessions += 1
            response = await self.client.post(
                "/v1/completions",
                json={"model": "pocket", "prompt": prompt, "max_tokens": 2},
                headers={"x-session-id": f"session-{self.num_sessions}"},
            )
            response.raise_for_status()
        drawn = [row for row in self.store.read_requests(rollout_id) if row["chosen_for_audit"]]
        while len(self.store.read_audits(rollout_id)) < len(drawn):
            await asyncio.sleep(0.02)
        self.controller.tick()
        found: dict[str, Any] = await self.order("GET", f"rollouts/{rollout_id}")
        return found

    def dropped(self, rollout_id: str) -> list[tuple[str, float, float]]:
        """Of each audit in the store: status, mean and 99th percentile of the dropped mass."""
        rows = self.store.read_audits(rollout_id)
        return [(row["status"], row["dropped_mass_mean"], row["dropped_mass_p99"]) for row in rows]

    async def run(self, most_batches: int, *, asks_gain: bool = False) -> dict[str, Any]:
        """Start the rollout and serve until it has an outcome."""
        policy = shrunk_policy(asks_gain=asks_gain)
        body = {"policy": policy, "release_quarantine": True, "replace": True}
        rollout_id = (await self.order("POST", "rollouts", body))["rollout_id"]
        self.controller.tick()
        await self.gateway.read_routing_once()
        self.controller.tick()
        for _ in range(most_batches):
            found = await self.serve(rollout_id)
            if found["outcome"] is not None:
                break
        return found


@asynccontextmanager
async def open_shop(folder: Path) -> AsyncIterator[Shop]:
    """Serve the pocket model, dense and with an exact scorer, over one store."""
    loaded = resolve_model("pocket")
    save_adapter(exact_adapter(loaded.model, {"mild": 1e-3}), folder / "adapter")
    text = "\n".join(document.text for document in load_corpus().documents[:8])
    ids = loaded.tokenizer.encode(text[:60_000], verbose=False)
    prompts = [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids) - PROMPT_TOKENS, 100)]
    args = AppArgs(adapter=str(folder / "adapter"))
    variants = {name: Variant(args, name) for name in ("dense", "sparse")}
    with Store.open(f"sqlite:///{folder / 'state.db'}") as store:
        writer = RecordWriter(store)
        auditor = Auditor(variants, writer)
        gateway = Gateway(
            variants,
            store,
            tokenizer=loaded.tokenizer,
            model_name="pocket",
            limits=Limits(poll_every_s=60),
            desk=auditor,
        )
        api = build_api(gateway)
        add_admin_routes(api, gateway, store, allow_faults=True)
        replicas = dict.fromkeys(variants, 1)
        controller = Controller(store, mirror=None, reports=folder, replicas=lambda: replicas)
        writer.start()
        auditor.start()
        async with api.router.lifespan_context(api):
            for name in variants:
                await gateway.introduce_once(name)
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                yield Shop(client, gateway, auditor, store, controller, prompts)
        await auditor.stop()
        writer.stop()
    for variant in variants.values():
        variant._engine.stop()


async def test_guardrails_promote_on_real_replays_and_roll_back_a_planted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good rung earns the proof of every gate; lost pooled keys are harm at once, worst rows included."""
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-tests")

    async with open_shop(tmp_path) as shop:
        good = await shop.run(most_batches=40)
        await shop.order("PUT", "fault", {"fault": FAULT})
        bad = await shop.run(most_batches=4)
        dropped = [shop.dropped(found["rollout_id"]) for found in (good, bad)]

    assert (good["outcome"], verdict(good, "worst_rows")) == ("promoted", "safe")
    assert all(status == "scored" and 0.0 < mean < p99 < 0.3 for status, mean, p99 in dropped[0])
    assert (bad["outcome"], verdict(bad, "worst_rows")) == ("rolled_back", "harm")
    assert all(status == "scored" and mean > 0.3 and p99 > 0.9 for status, mean, p99 in dropped[1])


async def test_a_rung_that_saves_nothing_is_held_before_anybody_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as dense and dearer: held in shadow, with the ratio that the real replays measured."""
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-tests")

    async with open_shop(tmp_path) as shop:
        found = await shop.run(most_batches=12, asks_gain=True)
        audits = shop.store.read_audits(found["rollout_id"])

    ratios = [row["sparse_compute_s"] / row["dense_compute_s"] for row in audits]
    assert (found["outcome"], found["phase"], found["by"]) == ("held", "paused", "compute")
    assert (found["stage_id"], [route["share"] for route in found["routes"]]) == ("shadow", [0.0, 0.0])
    assert verdict(found, "compute") == "no_gain"
    mean = sum(min(ratio, 2.0) for ratio in ratios) / len(ratios)
    said = re.search(
        r"no gain: ([\d.]+) times dense's model time \(([\d.]+) to ([\d.]+) with 95%\)", found["reason"]
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(mean, rel=0.01)
    assert float(said[2]) <= mean <= float(said[3])
    assert all(row["variant_served"] == "dense" for row in audits)


def verdict(found: dict[str, Any], guardrail_id: str) -> str:
    """The newest verdict of one guardrail in the long slice."""
    return next(str(item["verdict"]) for item in found["verdicts"] if item["id"] == guardrail_id)
