"""The lists that FlexAttention reads, and what is compiled in; tests/integration/test_flex.py compiles."""

from __future__ import annotations

import torch

from sentei.kernels.ops import flex
from sentei.kernels.ops.block_mask import BlockMask
from tests.strategies_masks import random_mask


def test_only_the_diagonal_is_partial() -> None:
    """Blocks below the diagonal need no token mask."""
    lists = flex.to_flex_lists(BlockMask.causal(256))

    assert lists.full_counts.tolist() == [[[0, 1, 2, 3]]]
    assert lists.partial_counts.tolist() == [[[1, 1, 1, 1]]]
    assert lists.partial_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]


def test_a_window_makes_its_edge_partial() -> None:
    """With a window of 100 keys the oldest blocks leave, and those across the edge need the token mask."""
    lists = flex.to_flex_lists(BlockMask.causal(256), window=100)

    assert lists.full_counts.tolist() == [[[0, 0, 0, 0]]]
    assert lists.partial_counts.tolist() == [[[1, 2, 3, 3]]]
    assert lists.partial_indices[0, 0, 3, :3].tolist() == [1, 2, 3]


def test_no_list_has_a_size_of_one() -> None:
    """One token still gives lists of 2 x 2, as torch compiles sizes of 1 in."""
    lists = flex.to_flex_lists(BlockMask.causal(1))

    assert lists.full_indices.shape == (1, 1, 2, 2)
    assert lists.partial_counts.tolist() == [[[1, 0]]]


def test_the_example_has_no_two_sizes_alike() -> None:
    """Sizes that are equal by chance in the example would be compiled in as always equal."""
    q, k = torch.zeros(1, 4, 300, 32), torch.zeros(1, 2, 300, 32)

    example = flex._example(flex._signature(q, k, k, random_mask(2, 300), 1.0))

    sizes = [example[0].shape[2], example[1].shape[2], *example[4].shape[2:]]
    assert len({*sizes, 1, 2, 4, 32, 64}) == len(sizes) + 5


def test_what_is_compiled_in_does_not_depend_on_lengths() -> None:
    """Another length, offset or list width asks for the same program."""
    q, k = torch.zeros(1, 4, 300, 32), torch.zeros(1, 2, 300, 32)
    first = flex._signature(q, k, k, random_mask(2, 300), 1.0)

    second = flex._signature(q[:, :, :65].clone(), k, k, random_mask(2, 65, q_offset=235), 1.0)

    assert first == second
