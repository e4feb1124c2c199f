"""The whole app on a real local Ray with a tiny random model: official client, killed replica, controller."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.adapter import new_adapter, save_adapter
from sentei.monitors.store import Store
from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.rollout.client import AdminClient, AdminError
from sentei.serving.ingress.router import position
from tests.fakes_models import save_byte_tokenizer
from tests.machine import wait_for
from tests.trial_ladders import uncalibrated_ladder

TOKEN = "a-token-of-tests"
PROMPT = "def add(a, b): return a + b\n" * 12
SALT = "ray-test"
POLICY = f"""
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {{name: ray-test}}
spec:
  ladder: [{{id: mild}}]
  slices:
    buckets:
      - {{id: short, range: [0, 64], pin: control}}
      - {{id: long, range: [64, 1024]}}
  assignment: {{unit: session_id, salt: {SALT}}}
  stages:
    - {{id: half, share: 50%, rung: mild, hold_min: 1h}}
    - {{id: full, share: 95%, rung: mild, hold_min: 1h}}
  advance: {{need: all_safe, min_units: 1000}}
  audit: {{select: {{fraction: 1.0}}}}
  guardrails:
    alpha_total: 0.05
    detector_arl: 10000
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: 0.5, floor_cap: 0.1}},
          test: betting_paired, action: rollback}}
  breaker:
    variant: {{window: 30s, min_requests: 100, failure_share: 90%, no_replica_for: 120s}}
  data:
    max_age: 10m
    no_data: {{grace: 10m, then: hold, after: 60m, finally: rollback}}
    monitor_lease: 3s
  schedule: {{check_every: 1s}}
"""


def save_tiny_model(folder: Path, adapter_folder: Path) -> None:
    """Write a random Llama over bytes that never ends an answer by itself, and an untrained adapter."""
    save_byte_tokenizer(folder)
    config = LlamaConfig(
        hidden_size=128,  # heads of 32, the smallest that vLLM takes
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[0] = 0.0  # its logit is 0, and some other one is always above
    model.save_pretrained(folder)
    adapter = new_adapter(model, "tiny", rank=8, block_tokens=32)
    save_adapter(adapter.with_ladder(uncalibrated_ladder(adapter, {"mild": 1e-3})), adapter_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the app keeps what it has."""
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    """The app in processes of its own, ended with the module."""
    save_tiny_model(folder / "tiny", folder / "adapter")
    config = {
        "model": str(folder / "tiny"),
        "adapter": str(folder / "adapter"),
        "store_url": store_url(folder),
        "mlflow_uri": "off",
        "tick_every_s": 0.5,
        "allow_faults": True,
    }
    environment = {
        "SENTEI_HOME": str(folder / "home"),
        "SENTEI_ADMIN_TOKEN": TOKEN,
        "RAY_AUTH_MODE": "disabled",
    }
    with LocalServer(config, folder / "server", environment=environment) as running:
        process = running._process
        yield running
    assert process is not None
    assert process.stdout is not None
    process.stdout.close()  # else its end of the pipe warns when it is collected


def store_url(folder: Path) -> str:
    """The app's store, which a test may read too."""
    return f"sqlite:///{folder / 'state.db'}"


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    """The official client; retries would hide what we want to see."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=60) as made:
        yield made


def admin(server: LocalServer, path: str) -> dict[str, Any]:
    """Read one page of the operations API."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    response = httpx.get(f"{server.url}/admin/v1/{path}", headers=headers, timeout=20, trust_env=False)
    found: dict[str, Any] = response.raise_for_status().json()
    return found


@pytest.fixture(scope="module")
def operator(server: LocalServer) -> Iterator[AdminClient]:
    """The operations client that the CLI uses."""
    made = AdminClient(server.url, TOKEN)
    yield made
    made.close()


def session(*, candidate: bool) -> str:
    """A session that the half share gives to sparse, or to dense."""
    return next(s for s in map(str, range(1000)) if (position(s, SALT) < 0.5) == candidate)


def candidates(num: int) -> list[str]:
    """Sessions that the half share gives to sparse."""
    return [s for s in map(str, range(100)) if position(s, SALT) < 0.5][:num]


def who_answers(client: openai.OpenAI) -> str:
    """The variant that a candidate session gets now."""
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=1, extra_headers={"x-session-id": session(candidate=True)}
    )
    return str(raw.headers["x-sentei-variant"])


def test_official_client_lists_chats_and_streams(client: openai.OpenAI) -> None:
    """The openai package lists the model, chats, and streams the same answer with usage."""
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    assert [model.id for model in client.models.list()] == ["tiny"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, chunks[-1].usage) == (8, whole.usage)
    assert whole.system_fingerprint == "dense/dense"


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"max_tokens": -1}, openai.BadRequestError, "integer_below_min_value"),
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": "x" * 2000}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_official_client_understands_our_errors(
    client: openai.OpenAI, options: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    """A bad request becomes the client's own exception, with our code in it."""
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "hello", **options})

    assert caught.value.code == code


def test_admin_needs_the_token(server: LocalServer) -> None:
    """Without the token nothing is told, and nothing can be ordered."""
    response = httpx.get(f"{server.url}/admin/v1/status", trust_env=False)

    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_admin_token")


def test_rollout_sends_candidates_to_sparse_and_audits_them(
    operator: AdminClient, client: openai.OpenAI
) -> None:
    """A started rollout is taken up, its share obeyed, and audited answers get their scores."""
    started = operator.start_rollout(POLICY)
    wait_for(lambda: who_answers(client) == "sparse", "sparse answers its share")

    control = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=4, extra_headers={"x-session-id": session(candidate=False)}
    )

    assert control.headers["x-sentei-variant"] == "dense"
    for candidate in candidates(3):
        headers = {"x-session-id": candidate}
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, extra_headers=headers)

    def units() -> int:
        return sum(v["units"] for v in operator.rollout(started["rollout_id"])["verdicts"])

    wait_for(lambda: units() >= 2, "two sessions that sparse served reach the evidence")
    assert operator.rollouts()[0]["rollout_id"] == started["rollout_id"]


def test_metrics_tell_of_the_rollout_through_rays_proxy(server: LocalServer) -> None:
    """The page comes through proxy and real workers: who was answered how, what was audited, who is up."""

    def page() -> dict[str, float]:
        response = httpx.get(
            f"{server.url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False
        )
        assert response.status_code == 200, response.text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    wait_for(lambda: page().get("sentei_audits_total", 0) >= 3, "three audits are counted")
    wait_for(lambda: page().get("sentei_requests_total", 0) >= 5, "ingresses have shared their counts")
    found = page()

    assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 401
    assert found["sentei_requests_total"] >= 5
    assert found["sentei_ttft_seconds_count"] >= 5
    assert found["sentei_worker_up"] == 2
    assert found["sentei_rollout_phase"] == found["sentei_lease_is_fresh"] == found["sentei_store_up"] == 1
    assert found["sentei_ticks_total"] > found["sentei_tick_errors_total"] == 0
    assert found["sentei_records_dropped_total"] == 0


def newest_dropped_mass(folder: Path, operator: AdminClient, client: openai.OpenAI, session_id: str) -> float:
    """The mean dropped mass in the store of a new session's audit."""
    rollout_id = operator.rollouts()[0]["rollout_id"]
    with Store.open(store_url(folder)) as store:
        before = len(store.read_audits(rollout_id))
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=4, extra_headers={"x-session-id": session_id}
        )
        wait_for(lambda: len(store.read_audits(rollout_id)) > before, "the audit's score")
        audit = store.read_audits(rollout_id)[-1]
    assert audit["status"] == "scored"
    assert 0.0 <= audit["dropped_mass_mean"] <= audit["dropped_mass_p99"] <= 1.0
    return float(audit["dropped_mass_mean"])


def test_planted_fault_shows_in_the_dropped_mass_and_can_be_taken_out(
    server: LocalServer, operator: AdminClient, client: openai.OpenAI, folder: Path
) -> None:
    """The operations API plants a silent fault in the live sparse variant, and refuses what is none."""
    healthy = newest_dropped_mass(folder, operator, client, "healthy")
    operator.plant_fault({"kind": "pooled_keys_lost", "past_tokens": 64})
    faulty = newest_dropped_mass(folder, operator, client, "faulty")
    planted = admin(server, "status")["workers"]["sparse"]["fault"]
    with pytest.raises(AdminError, match="'pooled_keys_gone'"):
        operator.plant_fault({"kind": "pooled_keys_gone"})
    operator.plant_fault(None)

    assert (healthy < 0.1, faulty > 0.5) == (True, True)
    assert planted == {"kind": "pooled_keys_lost", "past_tokens": 64}
    assert admin(server, "status")["workers"]["sparse"]["fault"] is None


def test_killed_sparse_replica_loses_no_token(server: LocalServer, client: openai.OpenAI) -> None:
    """Killing the sparse replica inside a stream: the client gets every token, the rest from dense."""
    wait_for(lambda: who_answers(client) == "sparse", "sparse answers")
    pid = admin(server, "status")["workers"]["sparse"]["pid"]
    stream = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=300,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=0,
        extra_headers={"x-session-id": session(candidate=True)},
    )
    tokens, makers, usage = 0, list[str](), None
    for chunk in stream:
        usage = chunk.usage or usage
        if not chunk.choices:
            continue
        logprobs = chunk.choices[0].logprobs
        tokens += len(logprobs.tokens or []) if logprobs is not None else 0
        makers.append(str(chunk.system_fingerprint))
        if tokens == 10:
            os.kill(pid, signal.SIGKILL)

    assert tokens == 300
    assert usage is not None
    assert usage.completion_tokens == 300
    assert (makers[0], makers[-1]) == ("sparse/mild", "dense/dense")


def test_killed_controller_means_dense_until_it_is_back(
    server: LocalServer, operator: AdminClient, client: openai.OpenAI
) -> None:
    """Without a controller traffic is dense when the lease ends; after its restart the rollout goes on."""
    wait_for(lambda: who_answers(client) == "sparse", "the sparse replica is back")
    before = operator.rollouts()[0]
    os.kill(admin(server, "status")["workers"]["controller"]["pid"], signal.SIGKILL)

    wait_for(lambda: who_answers(client) == "dense", "dense after the lease", timeout_s=8)
    wait_for(lambda: who_answers(client) == "sparse", "sparse after the restart")

    after = operator.rollouts()[0]
    assert (after["rollout_id"], after["stage_id"], after["outcome"]) == (
        before["rollout_id"],
        before["stage_id"],
        None,
    )


@pytest.mark.parametrize("controller", ["alive", "stopped", "dead"])
def test_abort_is_obeyed_when_it_is_answered(
    server: LocalServer, operator: AdminClient, client: openai.OpenAI, folder: Path, controller: str
) -> None:
    """Within a second of the order this ingress and every other one serve dense, whoever holds the lease."""
    for running in [r for r in operator.rollouts() if r["outcome"] is None]:
        operator.command(running["rollout_id"], "abort")
    wait_for(lambda: all(r["outcome"] for r in operator.rollouts()), "what ran before ends")
    long_lease = POLICY.replace("monitor_lease: 3s", "monitor_lease: 15s")
    time.sleep(1.0)  # a rollout is named by the second in which it starts
    rollout_id = operator.start_rollout(long_lease, release_quarantine=True)["rollout_id"]
    wait_for(lambda: who_answers(client) == "sparse", "sparse answers")
    pid = admin(server, "status")["workers"]["controller"]["pid"]
    if controller != "alive":
        os.kill(pid, signal.SIGSTOP if controller == "stopped" else signal.SIGKILL)

    try:
        began_s = time.monotonic()
        answer = operator.command(rollout_id, "abort", reason="drill")
        took_s = time.monotonic() - began_s
        here = who_answers(client)
        with Store.open(store_url(folder)) as store:
            elsewhere = store.read_routing()
    finally:
        if controller == "stopped":
            os.kill(pid, signal.SIGCONT)

    assert (here, took_s < 1.0) == ("dense", True), took_s
    assert elsewhere is not None
    assert {route.rung_id for route in elsewhere[0].routes} == {"dense"}
    assert answer["acts"] == "at once: every ingress serves dense within 0.25 s"
    wait_for(lambda: operator.rollouts()[0]["outcome"] == "rolled_back", "the log says so, too")
