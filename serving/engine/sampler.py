"""From logits to one token: grammar, bias, penalties, then greedy or a draw.

A draw depends on the seed and the token's index only, and what depends on the past is counted from the prompt
and the tokens already sent. So an answer that moves to another variant in the middle goes on as if nothing
had happened.
"""

from __future__ import annotations

from collections import Counter

import torch

from sentei.serving.engine.grammar import Follower, Grammars
from sentei.serving.engine.request import EngineRequest, Sampling, TokenLogprob
from sentei.serving.errors import BadLogitsError, GrammarError

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd constant (golden ratio): neighbouring positions get unrelated seeds
_SEED_BITS = (1 << 63) - 1


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, request: EngineRequest, grammars: Grammars | None = None) -> None:
        self.num_tokens = len(request.sent_ids)
        self._sampling = request.sampling
        self._prompt_ids = frozenset(request.prompt_ids) if self._sampling.repetition_penalty != 1.0 else ()
        self._counts = Counter(request.sent_ids)
        self._follower = _follow(request, grammars)

    def choose(self, logits: torch.Tensor) -> TokenLogprob:
        """Choose the next token from logits [V]; raises BadLogitsError on NaN or infinity, GrammarError."""
        raw = read_logits(logits)
        _check_finite(raw, self.num_tokens)
        values = self._adjust(raw)
        token_id = (
            int(values.argmax())
            if self._sampling.is_greedy
            else _draw(values, self._sampling, self.num_tokens)
        )
        self.num_tokens += 1
        self._counts[token_id] += 1
        if self._follower is not None:
            self._follower.take(token_id)
        return _with_logprobs(raw, token_id, self._sampling.num_top_logprobs)

    def _adjust(self, raw: torch.Tensor) -> torch.Tensor:
        """Return logits [V] under grammar, bias and penalties; the model's own are left as they are."""
        sampling, values = self._sampling, raw.clone()
        for token_id, bias in sampling.logit_bias:
            values[token_id] += bias
        if sampling.repetition_penalty != 1.0:
            ids = _ids({*self._prompt_ids, *self._counts})
            found = values[ids]
            worse = torch.where(
                found > 0, found / sampling.repetition_penalty, found * sampling.repetition_penalty
            )
            values[ids] = worse
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = torch.tensor(list(self._counts.values()), dtype=values.dtype)
            values[_ids(self._counts)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self._follower is not None:
            allowed = torch.from_numpy(self._follower.allowed()[: values.numel()])
            values[~allowed] = -torch.inf
        return values


def read_logits(logits: torch.Tensor) -> torch.Tensor:
    """Bring a step's logits [V] to the CPU, in fp32: the one thing that a decode step reads off a GPU.

    Grammar, penalties, the draw and what is said of it follow on the CPU, the same for every device.
    """
    return logits.float().cpu()


def _follow(request: EngineRequest, grammars: Grammars | None) -> Follower | None:
    if request.sampling.json_schema is None:
        return None
    if grammars is None:
        raise GrammarError("this engine has no grammar; leave response_format out")
    return grammars.follow(request.sampling.json_schema, request.sent_ids)


def _ids(token_ids: set[int] | Counter[int]) -> torch.Tensor:
    return torch.tensor(list(token_ids), dtype=torch.long)


def _check_finite(values: torch.Tensor, i_token: int) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise BadLogitsError(
            f"{bad} of {values.numel()} logits are NaN or infinite at token {i_token}; see the variant's log"
        )


def _with_logprobs(raw: torch.Tensor, token_id: int, num_top: int | None) -> TokenLogprob:
    if num_top is None:
        return TokenLogprob(token_id, 0.0)
    logprobs = raw.log_softmax(-1)
    top = logprobs.topk(min(num_top, logprobs.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple((int(i), float(p)) for i, p in pairs))


def _draw(values: torch.Tensor, sampling: Sampling, i_token: int) -> int:
    # The best logit becomes 0 first: a small temperature then sends the others to -inf, and none to +inf.
    probabilities = ((values - values.max()) / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        # A token stays while the mass before it is below top_p; the first one always stays.
        kept = ordered / ordered.sum()
        is_cut = (kept.cumsum(-1) - kept) >= sampling.top_p
        is_cut[0] = False
        ordered[is_cut] = 0.0
    ordered[1:][ordered[1:] < sampling.min_p * ordered[0]] = 0.0
    generator = torch.Generator().manual_seed((sampling.seed + i_token * _SEED_STRIDE) & _SEED_BITS)
    return int(order[int(torch.multinomial(ordered, 1, generator=generator))])
