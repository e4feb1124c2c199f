"""Which query rows are scored for their neighbours."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sentei.kernels.scorer.network import ScorerError, ScorerShape
from sentei.kernels.scorer.rows import RUN_ROWS, rows_that_differ


def test_a_row_of_each_kind_is_chosen() -> None:
    """Rows of a few kinds, in any order: one of each is scored, and it stands for all of its kind."""
    generator = torch.Generator().manual_seed(1)
    kinds = 5 * torch.randn(4, 8, generator=generator)
    which = torch.cat([torch.arange(4).repeat(4)[torch.randperm(16, generator=generator)] for _ in range(3)])
    q = kinds[which] + 0.01 * torch.randn(48, 8, generator=generator)

    chosen, places = rows_that_differ(q, 4)

    assert chosen.shape == (12,)
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen // RUN_ROWS, torch.arange(12) // 4)
    assert torch.equal(which[chosen][places], which)
    assert torch.equal(places[chosen], torch.arange(12))  # a chosen row stands for itself


class Counted(TorchDispatchMode):
    """Counts the operations of torch."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one and count it."""
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_a_long_prompt_takes_no_more_operations_than_a_short_one() -> None:
    """On a GPU each is a launch."""
    counts = []
    for rows in (36, 1028):
        with Counted() as counted:
            rows_that_differ(torch.randn(2, rows, 4), 4)
        counts.append(counted.num)

    assert counts[0] == counts[1]
    assert counts[0] <= 160


def test_every_head_chooses_its_own() -> None:
    """Leading axes are independent of each other."""
    q = torch.randn(2, 3, 32, 8, generator=torch.Generator().manual_seed(2))

    chosen, places = rows_that_differ(q, 2)

    assert (chosen.shape, places.shape) == ((2, 3, 16), (2, 3, 32))
    alone = [rows_that_differ(q[b, h], 2)[0] for b in range(2) for h in range(3)]
    assert torch.equal(chosen.flatten(0, 1), torch.stack(alone))
    assert len({tuple(row.tolist()) for row in alone}) > 1


@pytest.mark.parametrize(
    ("rows", "one_in", "left"), [(16, 2, 8), (5, 2, 5), (9, 2, 8), (20, 4, 8), (3, 8, 2)]
)
def test_a_short_run_leaves_as_many_as_a_long_one(rows: int, one_in: int, left: int) -> None:
    """So a prompt's last rows are scored alike, in whatever pieces it comes."""
    q = torch.randn(rows, 4, generator=torch.Generator().manual_seed(3))

    chosen, _ = rows_that_differ(q, one_in)

    assert len(chosen) == left
    assert len(set(chosen.tolist())) == left


@pytest.mark.parametrize("row", [0, 7, 15])
def test_what_is_no_number_is_chosen(row: int) -> None:
    """A row with NaN is not hidden behind one that stands for it; no row is chosen twice."""
    q = torch.randn(16, 4, generator=torch.Generator().manual_seed(4))
    q[row, 2] = torch.nan

    chosen, _ = rows_that_differ(q, 4)

    assert row in chosen.tolist()
    assert len(set(chosen.tolist())) == 4


def test_a_scorer_says_how_rows_are_reduced() -> None:
    """Rows are chosen only over single keys, in whole parts of a run; the message names the value."""
    with pytest.raises(ScorerError, match="query_reduce is 'median'; it must be one of mean, k_center"):
        ScorerShape(2, 1, 8, 4, 1, 16, "low_rank", 2, "median")  # type: ignore[arg-type]
    for size in (3, 16):
        with pytest.raises(ScorerError, match=f"query_pool is {size} with query_reduce k_center; .* 2, 4, 8"):
            ScorerShape(2, 1, 8, 4, 1, 16, "low_rank", size, "k_center")
    with pytest.raises(ScorerError, match="queries are pooled only where keys are single tokens"):
        ScorerShape(2, 1, 8, 4, 4, 16, "low_rank", 2, "k_center")
