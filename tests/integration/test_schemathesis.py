"""The API over a real socket: generated bodies against its own document, and what the guide shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.settings import Limits
from tests.fakes_serving import MODEL, FakeStore, FakeTokenizer, FakeVariant, make_table

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# A body that is too long is refused before anybody reads it; the library does not take 413 for a refusal.
TOO_LONG_CHECKS = [check for check in CHECKS if check is not negative_data_rejection]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE  # bodies that fit the document, or do not
NUM_CASES = {
    ("POST /v1/chat/completions", RIGHT): 500,
    ("POST /v1/chat/completions", WRONG): 500,
    ("POST /v1/completions", RIGHT): 300,
    ("POST /v1/completions", WRONG): 300,
    ("POST /tokenize", RIGHT): 150,
    ("POST /tokenize", WRONG): 150,
    ("GET /v1/models/{name}", RIGHT): 100,
}

# The library's own call of an old name; its newest version still has it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The API over fakes on a free port of loopback."""
    variants = {name: FakeVariant(name, context_tokens=512) for name in ("dense", "sparse")}
    store = FakeStore(routing=(make_table(lease_s=1e9), 1))
    limits = Limits(poll_every_s=0.05, max_body_bytes=1 << 16)
    gateway = Gateway(variants, store, tokenizer=FakeTokenizer(), model_name=MODEL, limits=limits)
    server = uvicorn.Server(uvicorn.Config(build_api(gateway), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and gateway.cards):
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def with_real_model(case: Case) -> Case:
    """Let most bodies name the model that is there, or nothing but 404 would be seen."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and case.body["model"] < "x":
        case.body["model"] = MODEL
    return case


@pytest.mark.parametrize(("name", "mode"), NUM_CASES)
def test_answers_stay_inside_the_document(url: str, name: str, mode: GenerationMode) -> None:
    """Whatever is sent, nothing ends in a 5xx, and status, type and body are as `/openapi.json` says."""
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    method, path = name.split()
    strategy = schema[path][method].as_strategy(generation_mode=mode)
    statuses: Counter[int] = Counter()

    @settings(max_examples=NUM_CASES[name, mode], suppress_health_check=list(HealthCheck), database=None)
    @given(case=strategy)
    def send(case: Case) -> None:
        response = with_real_model(case).call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=TOO_LONG_CHECKS if response.status_code == 413 else CHECKS)

    send()

    print(name, mode.value, dict(statuses))
    assert statuses.total() >= NUM_CASES[name, mode]
    assert statuses[200 if mode is RIGHT else 400] or method == "GET"


GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("language", ["sh", "python"])
def test_request_of_the_guide_is_answered(url: str, language: str) -> None:
    """What the guide shows, by curl and by the official client, works as it stands."""
    (block,) = re.findall(rf"```{language}\n((?:curl|from openai).*?)```", GUIDE, flags=re.DOTALL)
    block = block.replace("http://127.0.0.1:8000", url).replace("pocket", MODEL)
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("no curl on this machine: apt-get install curl")
    command = [sys.executable, "-c", block] if language == "python" else ["sh", "-c", block]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert language == "python" or '"finish_reason"' in done.stdout
