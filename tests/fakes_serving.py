"""Fakes of serving's ports: variants, store, audit desk, tokenizer, runner. No Ray, no model, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sentei.monitors.errors import StoreError
from sentei.monitors.records import Arrival, AuditScore, Missing, RequestRecord
from sentei.policies.signals import RoutingTable, SliceRoute
from sentei.serving.engine.attention_use import AttentionUse
from sentei.serving.engine.request import (
    EngineRequest,
    FinishReason,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
    TokenLogprob,
)
from sentei.serving.errors import VariantError
from sentei.serving.metrics.sharing import PREFIX
from sentei.serving.ports import AuditJob, AuditLoad, ModelCard

EOS_ID = 0
MODEL = "tiny"


class FakeClock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeTokenizer:
    """One token per byte, shifted by one so that 0 stays free for the end."""

    chat_template: str | None = None
    num_encoded = 0  # characters, of all texts so far

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte + 1 for byte in range(128)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded += len(text)
        return [byte + 1 for byte in text.encode()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(i - 1 for i in token_ids if i != EOS_ID).decode(errors="replace")

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation)


@dataclass
class FakeVariant:
    """Says `text`, token by token; `fail_after` tokens it raises `failure`, or hangs where that is None."""

    name: str
    text: str = "hello"
    fail_after: int | None = None
    failure: Exception | None = None
    context_tokens: int = 64
    artifact: str = ""
    rung_ids: tuple[str, ...] = ("dense", "mild", "medium", "bold")
    requests: list[EngineRequest] = field(default_factory=list)
    scored: list[ScoreRequest] = field(default_factory=list)
    score_results: dict[str, ScoreResult] = field(default_factory=dict)
    closed: int = 0
    fault: dict[str, Any] | None = None
    attention: AttentionUse | None = None

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        ids = FakeTokenizer().encode(self.text)
        try:
            for i in range(len(request.sent_ids), min(len(ids), request.max_tokens)):
                if i == self.fail_after:
                    await self._fail()
                finish = FinishReason.LENGTH if i + 1 == request.max_tokens else None
                use = self.attention if i == len(request.sent_ids) else None
                yield TokenChunk((ids[i],), (TokenLogprob(ids[i], -0.5),), finish, 0.25, use)
                await asyncio.sleep(0)
                if finish:
                    return
            yield TokenChunk((), (), FinishReason.STOP, 0.25, self.attention)
        finally:
            self.closed += 1

    async def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure
        await asyncio.Event().wait()

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self.scored.append(request)
        if self.failure is not None:
            raise self.failure
        served = request.ids[request.num_prompt :]
        name = request.request_id.rpartition("/")[2]
        return self.score_results.get(name) or perfect_scores(served)

    async def describe(self) -> ModelCard:
        return ModelCard(
            variant=self.name,
            model_name=MODEL,
            fingerprint="f" * 8,
            max_context_tokens=self.context_tokens,
            vocab_size=257,
            eos_ids=(EOS_ID,),
            rung_ids=self.rung_ids,
            pid=1,
            artifact=self.artifact,
            fault=self.fault,
        )

    async def plant(self, fault: dict[str, Any] | None) -> None:
        self.fault = fault


def perfect_scores(served: Sequence[int], *, logprob: float = -0.1, second: int = 1) -> ScoreResult:
    """Scores of a model that would have said exactly what was served."""
    return ScoreResult(
        top_ids=tuple((token, second if token != second else second + 1) for token in served),
        top_logprobs=((logprob, -3.0),) * len(served),
        compute_s=1.0,
    )


def crash(variant: str) -> VariantError:
    """What the Ray adapter says of a replica that died."""
    return VariantError(variant, "crash", "ActorDiedError")


@dataclass
class FakeStore:
    """Keeps records in lists; fails on demand."""

    routing: tuple[RoutingTable, int] | None = None
    requests: list[RequestRecord] = field(default_factory=list)
    audits: list[AuditScore] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    failures_left: int = 0

    def _maybe_fail(self) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise StoreError("the fake store is away")

    def add_request(self, record: RequestRecord) -> bool:
        self._maybe_fail()
        self.requests.append(record)
        return True

    def add_audit(self, score: AuditScore) -> bool:
        self._maybe_fail()
        self.audits.append(score)
        return True

    def add_arrival(self, arrival: Arrival) -> bool:
        self._maybe_fail()
        self.arrivals.append(arrival)
        return True

    def save_value(self, name: str, value: str) -> None:
        if not name.startswith(PREFIX):  # counts are shared in the background: no failure is planted there
            self._maybe_fail()
        self.values[name] = value

    def read_values(self, prefix: str) -> dict[str, str]:
        return {name: value for name, value in self.values.items() if name.startswith(prefix)}

    def delete_value(self, name: str) -> None:
        self.values.pop(name, None)

    def read_routing(self) -> tuple[RoutingTable, int] | None:
        self._maybe_fail()
        return self.routing


@dataclass
class FakeDesk:
    """Takes audit jobs, or refuses them."""

    is_open: bool = True
    jobs: list[AuditJob] = field(default_factory=list)
    busy: AuditLoad | None = None

    async def submit(self, job: AuditJob) -> Missing | None:
        if self.is_open:
            self.jobs.append(job)
        return None if self.is_open else Missing.QUEUE_FULL

    async def load(self) -> AuditLoad | None:
        return self.busy


class FakeRunner:
    """Counts up from the last token it was given; no tensors."""

    def __init__(self, *, fail: Exception | None = None) -> None:
        self.fail = fail
        self.calls: list[str] = []
        self.live: dict[str, int] = {}
        self.dropped: list[str] = []

    def prefill(self, request: EngineRequest) -> tuple[TokenLogprob, float]:
        self.calls.append(f"prefill {request.request_id}")
        if self.fail is not None:
            raise self.fail
        self.live[request.request_id] = [*request.prompt_ids, *request.sent_ids][-1]
        return self.decode(request.request_id)

    def decode(self, request_id: str) -> tuple[TokenLogprob, float]:
        self.calls.append(f"decode {request_id}")
        self.live[request_id] += 1
        return TokenLogprob(self.live[request_id], -1.0), 0.5

    def attention(self, request_id: str) -> AttentionUse | None:
        return AttentionUse(self.calls.count(f"decode {request_id}"), 0, ())

    def drop(self, request_id: str) -> None:
        self.live.pop(request_id, None)
        self.dropped.append(request_id)

    def score(self, request: ScoreRequest) -> ScoreResult:
        self.calls.append(f"score {request.request_id}")
        return perfect_scores(request.ids[request.num_prompt :])


def make_table(
    *,
    share: float = 1.0,
    audit_share: float = 0.0,
    artifact: str = "",
    rung_id: str = "medium",
    lease_s: float = 5.0,
    version: int = 1,
) -> RoutingTable:
    """A table of two slices: short prompts (under 8 tokens) stay dense, long ones go by `share`."""
    routes = (
        SliceRoute("short", 0, 8, 0.0, "dense", 0.0),
        SliceRoute("long", 8, 1 << 20, share, rung_id, audit_share, audit_share),
    )
    return RoutingTable("r1", version, "salt", lease_s, routes, artifact)
