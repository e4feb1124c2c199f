"""How weights learn: the best held-out weights stay, and learning ends when nothing is gained."""

import pytest
import torch

from sentei.pipeline.ladder.learn import Course, learn, mean_divergence

COURSE = Course(learning_rate=0.5, weight_decay=0.0, max_epochs=20, patience=2, seed=0)


def test_the_weights_of_the_best_held_out_epoch_stay() -> None:
    """Training walks past what is best for held-out lessons; the weights from there come back."""
    weight = torch.zeros(1, requires_grad=True)

    def gap(target: float) -> torch.Tensor:
        return (weight - target).square().sum()

    before, after = learn([weight], gap, [4.0], [1.0], COURSE)

    assert before == 1.0
    assert after < 0.5
    assert mean_divergence(gap, [1.0]) == pytest.approx(after)
    assert abs(float(weight.detach()) - 1.0) < 0.75


def test_learning_ends_after_patience_without_a_gain() -> None:
    """Two epochs that gain nothing are the last; each ran inside its context and told its steps."""
    weight = torch.zeros(1, requires_grad=True)
    steps: list[int] = []

    before, after = learn(
        [weight],
        lambda target: (weight - target).square().sum(),
        [-4.0, -4.0],
        [1.0],
        COURSE,
        on_step=lambda done, _total: steps.append(done),
    )

    assert (before, after) == (1.0, 1.0)
    assert float(weight.detach()) == 0.0
    assert steps == [0, 1, 2, 3, 40]
