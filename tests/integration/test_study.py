"""The study of scorer forms, small, on the shipped pocket model."""

from dataclasses import replace

import pytest

from sentei.pipeline.experiments.study import StudyOptions, StudyRow, study, summarise_forms
from sentei.pipeline.models import resolve_model
from sentei.pipeline.text.corpus import load_corpus

SMALL = StudyOptions(
    window_tokens=1024,
    num_windows=3,
    blocks_per_window=8,
    untrained_pools=(2,),
    pools=(4,),
    two_stages=((16, 3),),
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
    """Untrained, residual, exact, low rank, a window and two stages stand side by side in each layer."""
    forms = [
        "exact",
        "local window",
        "low rank 32, mean of 16 picks 3 blocks, then single queries",
        "low rank 32, start",
        "low rank 32, trained",
        "residual, means of 4",
        "untrained antidiagonal_8",
        "untrained means_2",
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


def test_the_first_of_two_stages_costs_little_and_may_lose_what_the_second_would_find(
    rows: dict[tuple[int, str], StudyRow],
) -> None:
    """Never better than its own second stage over all blocks, at fewer multiply-adds."""
    for layer in range(4):
        alone = rows[layer, "low rank 32, trained"]
        two = rows[layer, "low rank 32, mean of 16 picks 3 blocks, then single queries"]

        assert two.dims_per_token < alone.dims_per_token
        assert two.kl is None
        assert two.at_density["0.1"].need_found <= alone.at_density["0.1"].need_found + 1e-3


def test_a_summary_is_the_mean_over_layers(every_row: list[StudyRow]) -> None:
    """For each form and size of query blocks, in the order in which they were studied."""
    forms = summarise_forms(every_row)

    assert len(forms) == len(every_row) / 4
    exact = next(form for form in forms if (form.form, form.query_block) == ("exact", 16))
    mine = [
        row.at_density["0.1"].need_found for row in every_row if (row.form, row.query_block) == ("exact", 16)
    ]
    assert exact.need_found["0.1"] == pytest.approx(sum(mine) / 4)
    assert next(form for form in forms if form.form == "local window").kl is None


def test_rows_that_differ_find_more_than_their_means_where_tokens_are_recalled() -> None:
    """The pocket model's second layer looks for single tokens; both forms cost half of single queries."""
    options = replace(SMALL, layers=(1,), query_pools=(1, 2), two_stages=(), max_epochs=0, query_blocks=(16,))

    rows = {row.form: row for row in study(resolve_model("pocket"), load_corpus(), options)}

    mean, some = (rows[f"low rank 32, trained, {how}"] for how in ("2 queries as one", "one of 2 queries"))
    assert mean.dims_per_token == some.dims_per_token == 16
    assert some.at_density["0.1"].need_found > 1.05 * mean.at_density["0.1"].need_found
    assert some.kl is not None
    assert mean.kl is not None
    assert some.kl < mean.kl


def test_layers_are_chosen_by_number() -> None:
    """One that has no full attention is refused with those that have."""
    with pytest.raises(ValueError, match="layer 9 of pocket has no full attention; choose from 0, 1, 2, 3"):
        study(resolve_model("pocket"), load_corpus(), replace(SMALL, layers=(9,)))
