"""From logits to one token: greedy, temperature, top-p. Stateless: token i depends on the seed and i only.

So an answer that moves to another variant in the middle is sampled on as if nothing had happened.
"""

from __future__ import annotations

import torch

from sentei.serving.engine.request import Sampling, TokenLogprob
from sentei.serving.errors import BadLogitsError

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd constant (golden ratio): neighbouring positions get unrelated seeds
_SEED_BITS = (1 << 63) - 1


def sample_token(logits: torch.Tensor, sampling: Sampling, i_token: int) -> TokenLogprob:
    """Choose token `i_token` of an answer from logits [V]; raises BadLogitsError on NaN or infinity."""
    values = logits.float()
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise BadLogitsError(
            f"{bad} of {values.numel()} logits are NaN or infinite at token {i_token}; see the variant's log"
        )
    token_id = int(values.argmax()) if sampling.temperature == 0.0 else _draw(values, sampling, i_token)
    if sampling.num_top_logprobs is None:
        return TokenLogprob(token_id, 0.0)
    logprobs = values.log_softmax(-1)
    top = logprobs.topk(min(sampling.num_top_logprobs, logprobs.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple((int(i), float(p)) for i, p in pairs))


def _draw(values: torch.Tensor, sampling: Sampling, i_token: int) -> int:
    probabilities = (values / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    # A token stays while the mass before it is below top_p; so the first one always stays.
    ordered[(ordered.cumsum(-1) - ordered) >= sampling.top_p] = 0.0
    if sampling.top_p >= 1.0:
        ordered = probabilities[order]
    generator = torch.Generator().manual_seed((sampling.seed + i_token * _SEED_STRIDE) & _SEED_BITS)
    return int(order[int(torch.multinomial(ordered, 1, generator=generator))])
