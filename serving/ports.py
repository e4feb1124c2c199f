"""What the ingress and the auditor need of the world, as small protocols: here tests put their fakes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sentei.monitors.records import Arrival, AuditScore, AuditStatus, Missing, RequestRecord
from sentei.policies.signals import RoutingTable
from sentei.serving.engine.request import (
    NEUTRAL,
    EngineRequest,
    Sampling,
    ScoreRequest,
    ScoreResult,
    TokenChunk,
)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a running variant says of itself."""

    variant: str
    model_name: str
    fingerprint: str
    max_context_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    rung_ids: tuple[str, ...]
    pid: int
    artifact: str = ""  # digest of model, adapter, ladder and engine; "" of dense
    fault: dict[str, Any] | None = None
    sampling: Sampling = NEUTRAL  # of a request that says nothing: the model's generation_config


@dataclass(frozen=True, slots=True)
class AuditLoad:
    """How busy the auditor is."""

    waiting: int  # jobs that it took and has not done
    jobs_per_s: float  # that it does, by what its newest ones took


@dataclass(frozen=True, slots=True)
class AuditJob:
    """A span of an answer to be replayed: what was asked, what was served, and how it was assigned."""

    request_id: str
    session_id: str
    rollout_id: str
    slice_id: str
    rung_id: str
    variant_served: str
    prompt_ids: tuple[int, ...]
    served_ids: tuple[int, ...]  # of the span alone
    earlier_ids: tuple[int, ...] = ()  # served before the span
    share: float = 0.0
    probability: float = 0.0  # with which the request was drawn
    artifact: str = ""  # digest of what the sparse replica must run; "": any
    traceparent: str = ""  # W3C's, of the answer; "": nobody traces it

    def score(self, status: AuditStatus, at_s: float, **numbers: Any) -> AuditScore:
        """Return this answer's score; without numbers where it could not be scored."""
        return AuditScore(
            request_id=self.request_id,
            session_id=self.session_id,
            rollout_id=self.rollout_id,
            at_s=at_s,
            slice_id=self.slice_id,
            rung_id=self.rung_id,
            variant_served=self.variant_served,
            status=status,
            prompt_tokens=len(self.prompt_ids),
            share=self.share,
            audit_probability=self.probability,
            span_start=len(self.earlier_ids),
            **numbers,
        )


class Variant(Protocol):
    """One way to run the model; failures come as VariantError, refusals as EngineError."""

    name: str

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield tokens; closing the iterator cancels the request."""

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay served tokens."""

    async def describe(self) -> ModelCard:
        """Say what runs."""

    async def plant(self, fault: dict[str, Any] | None) -> None:
        """Plant or remove a fault, for drills."""


class AuditDesk(Protocol):
    """Takes audit jobs."""

    async def submit(self, job: AuditJob) -> Missing | None:
        """Queue a job; why not, if it was not taken."""

    async def load(self) -> AuditLoad | None:
        """Say how busy the auditor is; None if it did not answer."""


class RecordStore(Protocol):
    """What serving itself reads and writes in `sentei.monitors.store.Store`."""

    def add_request(self, record: RequestRecord) -> bool:
        """Write one request."""

    def add_arrival(self, arrival: Arrival) -> bool:
        """Write a session's arrival in a slice."""

    def add_audit(self, score: AuditScore) -> bool:
        """Write one audit score."""

    def read_routing(self) -> tuple[RoutingTable, int] | None:
        """Read the routing table and its renewals."""

    def save_value(self, name: str, value: str) -> None:
        """Set a named value."""

    def read_values(self, prefix: str) -> dict[str, str]:
        """Read all named values whose names begin so."""

    def delete_value(self, name: str) -> None:
        """Forget a named value."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that serving uses."""

    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation as the model was trained on it."""
