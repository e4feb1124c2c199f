"""The engine's nouns: what is asked for, what comes back, and the limits. Plain Python, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sentei.serving.engine.attention_use import AttentionUse

DENSE_RUNG = "dense"
# Rows of one replay that its dropped mass is measured in: so many spread evenly over the answer, and the last
# of the prompt. Where decode steps run dense the answer's alone would tell of nothing that the rung does.
MEASURED_ROWS = 16
GREEDY_BELOW = 1e-5  # temperature: the second token is 100,000 nats apart for each nat of the logits


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where it has any."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # said by the ingress of a finished answer that holds calls, by no engine


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the same for every engine, and neutral unless it says otherwise.

    What depends on the past (penalties, grammar) is counted by the engine from prompt and answer, `sent_ids`
    included: an answer that goes on elsewhere goes on as if nothing had happened. The order is: grammar and
    bias, penalties, temperature, top_k, top_p, min_p. Token i of an answer is drawn by (seed, i) only.
    Log-probabilities are the model's own, before any of this.
    """

    temperature: float = 0.0  # below GREEDY_BELOW: the most likely token
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0  # of the most likely token's probability
    repetition_penalty: float = 1.0  # of every token in prompt or answer: positive logits are divided by it
    presence_penalty: float = 0.0  # subtracted from the logit of every token of the answer, once
    frequency_penalty: float = 0.0  # and once for each time that it came
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None  # a JSON Schema that the whole answer must follow
    seed: int = 0
    num_top_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token only

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken without a draw."""
        return self.temperature < GREEDY_BELOW


NEUTRAL = Sampling()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation; `sent_ids` were already sent to the client by another variant and are continued.

    `stop_ids` are the only tokens that end an answer: an engine with rules of its own ignores those. They are
    empty where the caller wants `max_tokens` whatever the model says (`ignore_eos`).
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int  # of the whole answer, `sent_ids` included
    rung_id: str = DENSE_RUNG
    sampling: Sampling = NEUTRAL
    sent_ids: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    artifact: str = ""  # digest of what must answer; "": whatever runs
    traceparent: str = ""  # W3C's; "": nobody traces it


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token's log-probability and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one request; `compute_s` is the model time that the request has used so far.

    The first and the last chunk of a thinned request say what its attention kept so far.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    compute_s: float = 0.0
    attention: AttentionUse | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A replay for the audit: teacher-force `ids` and report each served position.

    Chunk size None: the prompt as it is served, the answer in one piece. A served chunk of 1 replays the
    decode steps as they were served.
    """

    request_id: str
    ids: tuple[int, ...]
    num_prompt: int
    rung_id: str = DENSE_RUNG
    num_top: int = 20
    prompt_chunk_tokens: int | None = None
    served_chunk_tokens: int | None = None
    artifact: str = ""  # digest of what must answer; "": whatever runs
    traceparent: str = ""  # W3C's; "": nobody traces it
    num_earlier: int = 0  # of num_prompt, answered before the scored span, behind the user's prompt

    @property
    def prompt_end(self) -> int:
        """Where the user's prompt ends, by which a rung decides as it did when the answer was served."""
        return self.num_prompt - self.num_earlier


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What a variant thinks of served tokens, one entry per served position, best first."""

    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]
    compute_s: float
    dropped_mass: tuple[float, ...] = ()  # one share per sampled row, head and layer
    artifact: str = ""  # digest of what scored


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine accepts; everything beyond is refused with a typed error, never queued without end."""

    max_running: int = 4
    max_queued: int = 32
    max_scores: int = 64
    max_context_tokens: int = 8192
    score_patience_steps: int = 5  # after so many steps a waiting replay goes before user work
