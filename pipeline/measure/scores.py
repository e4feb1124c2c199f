"""Variants teacher-forced over one text: loss, divergence from dense, agreement on the likeliest token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import stats
from torch.nn import functional as F

from sentei.pipeline.models import LoadedModel

CHUNK = 128  # positions whose logits over the whole vocabulary are held at once


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per judged position [P]: loss and KL(dense || variant) in nats, whether the top token is dense's."""

    loss: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor

    def cpu(self) -> "TokenScores":
        """Return them on the CPU."""
        return TokenScores(self.loss.cpu(), self.kl.cpu(), self.agrees.cpu())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a variant's next-token distribution stays to dense's on the same text."""

    kl_mean: float
    kl_p99: float
    top1_agreement: float


@torch.no_grad()
def hidden_at(loaded: LoadedModel, text: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run a text and return the last hidden states [P, D] at some positions, on the model's device."""
    return loaded.last_states(text)[positions.to(loaded.device)]


@torch.no_grad()
def score_variants(
    loaded: LoadedModel,
    text: torch.Tensor,
    positions: torch.Tensor,
    hidden: Mapping[str, torch.Tensor],
    reference: str,
) -> dict[str, TokenScores]:
    """Turn hidden states per variant into scores against the variant named `reference`, chunk by chunk.

    The scores are on the CPU, whatever the device.
    """
    found: dict[str, list[TokenScores]] = {name: [] for name in hidden}
    targets = text[positions + 1].to(loaded.device)
    for start in range(0, len(positions), CHUNK):
        part = slice(start, start + CHUNK)
        target = targets[part]
        dense = _log_probs(loaded, hidden[reference][part])
        for name, states in hidden.items():
            own = dense if name == reference else _log_probs(loaded, states[part])
            kl = F.kl_div(own, dense, log_target=True, reduction="none").sum(dim=-1).clamp_min(0.0)
            found[name].append(TokenScores(_nll(own, target), kl, own.argmax(-1) == dense.argmax(-1)))
    scores = {name: join_scores(parts).cpu() for name, parts in found.items()}
    for name, joined in scores.items():
        _check(loaded, joined.loss, f"on variant {name!r}")
    return scores


def join_scores(parts: list[TokenScores]) -> TokenScores:
    """Put scores of several stretches of text together."""
    return TokenScores(
        torch.cat([part.loss for part in parts]),
        torch.cat([part.kl for part in parts]),
        torch.cat([part.agrees for part in parts]),
    )


def agreement(scores: TokenScores) -> Agreement:
    """Sum up a variant's scores."""
    rank = max(1, math.ceil(0.99 * scores.kl.numel()))
    return Agreement(
        kl_mean=float(scores.kl.mean()),
        kl_p99=float(scores.kl.kthvalue(rank).values),
        top1_agreement=float(scores.agrees.float().mean()),
    )


def _log_probs(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(loaded.model.lm_head(hidden).float(), dim=-1)


def _nll(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(log_probs, target, reduction="none")


def _check(loaded: LoadedModel, loss: torch.Tensor, where: str) -> None:
    if not torch.isfinite(loss).all():
        raise FloatingPointError(
            f"model {loaded.name!r} gave a loss that is not finite {where}; "
            "check its weights and its precision"
        )


SEGMENT_TOKENS = 32  # neighbouring tokens share their fate; segments are treated as independent


@dataclass(frozen=True, slots=True)
class PairedDelta:
    """A mean difference with its 95% confidence interval."""

    mean: float
    ci: tuple[float, float]


def pick_positions(length: int, *, first: int, most: int) -> torch.Tensor:
    """Choose at most `most` positions whose next token is judged, from `first` (or the middle) on, evenly."""
    first = min(first, length // 2)
    step = max(1, math.ceil((length - 1 - first) / most))
    return torch.arange(first, length - 1, step)


@torch.no_grad()
def token_losses(loaded: LoadedModel, text: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the negative log likelihood, in nats, of the token after each position, on the CPU."""
    hidden, targets = hidden_at(loaded, text, positions), text[positions + 1].to(loaded.device)
    losses = [
        _nll(_log_probs(loaded, states), target)
        for states, target in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    found = torch.cat(losses).cpu()
    _check(loaded, found, "on held-out text")
    return found


def paired_delta(sparse: torch.Tensor, dense: torch.Tensor) -> PairedDelta:
    """Compare losses of the same tokens, in segments; Student's t over the segments' means."""
    difference = (sparse - dense).double()
    num = max(2, difference.numel() // SEGMENT_TOKENS)
    means = torch.stack([part.mean() for part in difference.chunk(num)])
    error = float(means.std()) / len(means) ** 0.5
    reach = float(stats.t.ppf(0.975, len(means) - 1)) * error
    mean = float(difference.mean())
    return PairedDelta(mean, (mean - reach, mean + reach))
