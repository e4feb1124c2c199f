"""Paired scores of one audited answer: sparse against dense, and dense against itself as the noise floor.

The served tokens are teacher-forced through dense twice and through the sparse rung once. Each replay gives,
per token, the ids and log-probabilities of its K likeliest next tokens. Numbers compare replay with replay,
so they mean the same whoever served: against the served tokens, sparse would always agree with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sentei.monitors.errors import AuditError

KL_CAP_NATS = (
    2.0  # per token: one hopeless token must not outweigh a whole answer, and the tests need a bound
)
_TINY = 1e-12

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """One replay: likeliest next tokens per served token, best first. Shapes [T, K] and [T, K]."""

    top_ids: Ints
    top_logprobs: Floats

    @classmethod
    def of(
        cls, top_ids: npt.ArrayLike | Sequence[object], top_logprobs: npt.ArrayLike | Sequence[object]
    ) -> TokenScores:
        """Check shapes and numbers; raises AuditError for NaN, for ragged or for empty rows."""
        try:
            ids = np.asarray(top_ids, dtype=np.int64)
            logprobs = np.asarray(top_logprobs, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise AuditError(f"replay is no table of K scores per token: {error}") from error
        if ids.ndim != 2 or ids.shape != logprobs.shape or 0 in ids.shape:
            raise AuditError(
                f"replay has ids of shape {ids.shape} and logprobs of {logprobs.shape}: both must be [T, K]."
            )
        if np.isnan(logprobs).any() or (logprobs > 1e-3).any():
            raise AuditError(
                "replay has log-probabilities that are NaN or above 0: the model's logits are broken."
            )
        best_first = np.argsort(-logprobs, axis=1, kind="stable")
        return cls(
            np.take_along_axis(ids, best_first, axis=1), np.take_along_axis(logprobs, best_first, axis=1)
        )


@dataclass(frozen=True, slots=True)
class AuditNumbers:
    """What one audit found, over all its tokens."""

    tokens: int
    token_disagreement: float  # share of tokens whose likeliest choice differs from dense
    token_disagreement_floor: float
    kl: float  # nats per token, capped per token
    kl_floor: float
    first_divergence: int | None
    dropped_mass_mean: float | None = None
    dropped_mass_p99: float | None = None


def score_audit(
    served_ids: Sequence[int],
    dense: TokenScores,
    *,
    dense_again: TokenScores,
    sparse: TokenScores,
    kl_cap_nats: float = KL_CAP_NATS,
    dropped_mass: Sequence[float] = (),
) -> AuditNumbers:
    """Score one answer; `dropped_mass` holds a share per sampled row, head and layer, or nothing."""
    for name, replay in (("dense", dense), ("dense_again", dense_again), ("sparse", sparse)):
        if len(replay.top_ids) != len(served_ids):
            raise AuditError(
                f"replay {name!r} scored {len(replay.top_ids)} tokens, but {len(served_ids)} were served."
            )
    differs = dense.top_ids[:, 0] != sparse.top_ids[:, 0]
    differs_floor = dense.top_ids[:, 0] != dense_again.top_ids[:, 0]
    mass = np.asarray(dropped_mass, dtype=np.float64)
    return AuditNumbers(
        tokens=len(served_ids),
        token_disagreement=float(differs.mean()),
        token_disagreement_floor=float(differs_floor.mean()),
        kl=float(capped_kl(dense, sparse, kl_cap_nats).mean()),
        kl_floor=float(capped_kl(dense, dense_again, kl_cap_nats).mean()),
        first_divergence=int(differs.argmax()) if differs.any() else None,
        dropped_mass_mean=float(mass.mean()) if mass.size else None,
        dropped_mass_p99=float(np.quantile(mass, 0.99)) if mass.size else None,
    )


def capped_kl(dense: TokenScores, other: TokenScores, cap_nats: float) -> Floats:
    """Return KL(dense || other) per token [T] over dense's top K and one bucket for the rest, capped.

    A token that `other` does not list gets the most it can have: no more than the last one listed, and an
    equal part of what is left. This is the lenient reading; a likely token that went missing still shows.
    """
    p = np.exp(dense.top_logprobs)
    q = _prob_of(dense.top_ids, other)
    p_rest = np.clip(1.0 - p.sum(axis=1), 0.0, 1.0)
    q_rest = np.clip(1.0 - q.sum(axis=1), 0.0, 1.0)
    inside = _relative_entropy(p, q).sum(axis=1)
    kl: Floats = np.clip(inside + _relative_entropy(p_rest, q_rest), 0.0, cap_nats)
    return kl


def _prob_of(ids: Ints, scores: TokenScores) -> Floats:
    """Probability under `scores` of each id [T, K], at most what the listed ones leave open."""
    same = ids[:, :, None] == scores.top_ids[:, None, :]  # [T, K, K']
    listed = np.exp(scores.top_logprobs)
    is_listed = same.any(axis=2)
    known = (same * listed[:, None, :]).sum(axis=2)
    left = np.clip(1.0 - listed.sum(axis=1), 0.0, 1.0)
    num_unlisted = np.maximum((~is_listed).sum(axis=1), 1)
    most = np.minimum(listed[:, -1], left / num_unlisted)
    probabilities: Floats = np.where(is_listed, known, most[:, None])
    return probabilities


def _relative_entropy(p: Floats, q: Floats) -> Floats:
    log_ratio: Floats = np.log(np.maximum(p, _TINY) / np.maximum(q, _TINY))
    return p * log_ratio
