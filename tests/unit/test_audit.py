"""Scores of an audit: exact where they can be, lenient where they must be, loud about broken numbers."""

from __future__ import annotations

import numpy as np
import pytest

from sentei.monitors.audit import KL_CAP_NATS, TokenScores, capped_kl, score_audit
from sentei.monitors.errors import AuditError

RNG = np.random.default_rng(7)


def scores(logits: np.ndarray, k: int) -> TokenScores:
    """The best K of full logits [T, V]."""
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return TokenScores.of(ids, np.take_along_axis(logprobs, ids, axis=1))


def true_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL over the whole vocabulary."""
    p = a - np.log(np.exp(a).sum(axis=1, keepdims=True))
    q = b - np.log(np.exp(b).sum(axis=1, keepdims=True))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def test_equal_replays_score_zero() -> None:
    """A candidate that computes what dense computes differs in nothing."""
    dense = scores(RNG.normal(size=(9, 50)), 8)

    numbers = score_audit(range(9), dense, dense_again=dense, sparse=dense)

    assert (numbers.kl, numbers.token_disagreement, numbers.first_divergence) == (0.0, 0.0, None)
    assert (numbers.kl_floor, numbers.token_disagreement_floor, numbers.tokens) == (0.0, 0.0, 9)


def test_whole_vocabulary_gives_the_true_divergence() -> None:
    """With every token listed the value is the true KL."""
    a, b = RNG.normal(size=(20, 30)), RNG.normal(size=(20, 30)) * 0.3

    kl = capped_kl(scores(a, 30), scores(b, 30), cap_nats=100.0)

    np.testing.assert_allclose(kl, true_kl(a, b), rtol=1e-6)


def test_few_listed_tokens_come_close_to_the_true_divergence() -> None:
    """With 20 of 200 peaked logits listed the mean is a little below the true KL: the reading is lenient."""
    a = RNG.normal(size=(400, 200)) * 3
    b = a + RNG.normal(size=a.shape) * 0.5

    kl = capped_kl(scores(a, 20), scores(b, 20), cap_nats=100.0)

    assert 0.8 * true_kl(a, b).mean() < kl.mean() <= true_kl(a, b).mean()


def test_likely_token_that_went_missing_shows() -> None:
    """Two replays that are sure of different tokens reach the cap, although they list none in common."""
    dense = TokenScores.of([[1, 2]], np.log([[0.98, 0.01]]))
    sparse = TokenScores.of([[3, 4]], np.log([[0.98, 0.01]]))

    assert capped_kl(dense, sparse, KL_CAP_NATS).tolist() == [KL_CAP_NATS]


def test_disagreement_and_first_divergence_compare_with_dense() -> None:
    """Only tokens whose likeliest choice differs from dense count; the floor counts dense against itself."""
    dense = TokenScores.of([[1], [1], [1], [1]], [[-0.1]] * 4)
    sparse = TokenScores.of([[1], [1], [2], [2]], [[-0.1]] * 4)
    again = TokenScores.of([[1], [1], [1], [5]], [[-0.1]] * 4)

    numbers = score_audit([9, 9, 9, 9], dense, dense_again=again, sparse=sparse)

    assert (numbers.token_disagreement, numbers.token_disagreement_floor) == (0.5, 0.25)
    assert numbers.first_divergence == 2


def test_order_of_listed_tokens_does_not_matter() -> None:
    """Rows are put in order, best first."""
    mixed = TokenScores.of([[7, 8, 9]], [[-3.0, -0.1, -2.0]])

    assert mixed.top_ids.tolist() == [[8, 9, 7]]


def test_dropped_mass_is_passed_through() -> None:
    """The probe's rows become mean and 99th percentile; no probe, no number."""
    dense = TokenScores.of([[1]], [[-0.1]])

    numbers = score_audit([1], dense, dense_again=dense, sparse=dense, dropped_mass=[0.0, 0.1, 0.2])

    assert numbers.dropped_mass_mean == pytest.approx(0.1)
    assert numbers.dropped_mass_p99 == pytest.approx(0.198)
    assert score_audit([1], dense, dense_again=dense, sparse=dense).dropped_mass_mean is None


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1, 2]], [[-1.0, float("nan")]], "logits are broken"),
        ([[1, 2]], [[-1.0, 0.5]], "above 0"),
        ([[1, 2]], [[-1.0]], "both must be"),
        ([], [], "both must be"),
        ([[1, 2], [1]], [[-1.0, -1.0], [-1.0]], "no table"),
    ],
)
def test_broken_replays_are_refused(ids: list[list[int]], logprobs: list[list[float]], message: str) -> None:
    """Numbers that cannot be scored are an error of their own, never a good score."""
    with pytest.raises(AuditError, match=message):
        TokenScores.of(ids, logprobs)


def test_replay_of_another_length_is_refused() -> None:
    """Every served token must have been replayed."""
    dense = TokenScores.of([[1]], [[-0.1]])

    with pytest.raises(AuditError, match="scored 1 tokens, but 2 were served"):
        score_audit([1, 2], dense, dense_again=dense, sparse=dense)
