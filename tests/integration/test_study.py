"""The study of scorer forms, small, on the shipped pocket model."""

import pytest

from sentei.pipeline.corpus import load_corpus
from sentei.pipeline.models import resolve_model
from sentei.pipeline.study import StudyOptions, StudyRow, study

SMALL = StudyOptions(
    window_tokens=1024, num_windows=3, blocks_per_window=8, pools=(4,), ranks=(32,), max_epochs=2
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[int, str], StudyRow]:
    """Run the study once."""
    return {(row.layer, row.form): row for row in study(resolve_model("pocket"), load_corpus(), SMALL)}


def test_every_layer_has_every_form(rows: dict[tuple[int, str], StudyRow]) -> None:
    """Untrained, residual, exact and low rank stand side by side in each layer."""
    forms = [
        "exact",
        "low rank 32, start",
        "low rank 32, trained",
        "residual, means of 4",
        "untrained antidiagonal_8",
        "untrained means_4",
        "untrained min_max_16",
    ]

    assert sorted(rows) == [(layer, form) for layer in range(4) for form in forms]


def test_exact_scores_are_the_floor(rows: dict[tuple[int, str], StudyRow]) -> None:
    """The true logit of every token estimates the mass itself, but for the rounding of what was recorded."""
    assert all(row.kl < 0.01 for (_, form), row in rows.items() if form == "exact")


def test_single_tokens_in_32_dimensions_beat_means_of_four(rows: dict[tuple[int, str], StudyRow]) -> None:
    """At the same cost a token, the low-rank form is nearer to the truth where tokens are recalled."""
    low, mean = rows[1, "low rank 32, trained"], rows[1, "residual, means of 4"]

    assert low.dims_per_token == mean.dims_per_token == 32
    assert low.kl < mean.kl
    assert rows[1, "low rank 32, trained"].kl <= rows[1, "low rank 32, start"].kl
