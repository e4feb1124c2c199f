"""The study of scorer forms, small, on the shipped pocket model."""

import pytest

from sentei.pipeline.experiments.study import StudyOptions, StudyRow, study
from sentei.pipeline.models import resolve_model
from sentei.pipeline.text.corpus import load_corpus

SMALL = StudyOptions(
    window_tokens=1024,
    num_windows=3,
    blocks_per_window=8,
    pools=(4,),
    ranks=(32,),
    query_pools=(1,),
    max_epochs=2,
    query_blocks=(64, 16),
)


@pytest.fixture(scope="module")
def every_row() -> list[StudyRow]:
    """Run the study once."""
    return study(resolve_model("pocket"), load_corpus(), SMALL)


@pytest.fixture
def rows(every_row: list[StudyRow]) -> dict[tuple[int, str], StudyRow]:
    """Return the rows of query blocks as long as key blocks."""
    return {(row.layer, row.form): row for row in every_row if row.query_block == 64}


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


def test_fewer_rows_that_choose_together_need_fewer_blocks(every_row: list[StudyRow]) -> None:
    """With exact scores, query blocks of 16 keep a smaller share in every layer to miss as few needles."""
    exact = {(row.layer, row.query_block): row.density["0.03"] for row in every_row if row.form == "exact"}

    assert all(exact[layer, 16] <= exact[layer, 64] for layer in range(4))
    assert any(exact[layer, 16] < 0.9 * exact[layer, 64] for layer in range(4))
