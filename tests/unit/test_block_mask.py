"""The block mask's contract and its error texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import MaskError
from tests.strategies_masks import random_mask


def test_causal_mask_keeps_every_causal_block() -> None:
    """The causal mask has density 1 and one more block per query block."""
    mask = BlockMask.causal(200)

    assert mask.counts.tolist() == [[[1, 2, 3, 4]]]
    assert mask.indices[0, 0, 1].tolist() == [0, 1, -1, -1]
    assert mask.density() == 1.0


def test_offset_moves_the_diagonal() -> None:
    """With 100 cached keys the first query block of 64 rows may read blocks 0 to 2."""
    assert BlockMask.causal(64, q_offset=100).counts.tolist() == [[[3]]]


def test_nothing_selected_is_legal() -> None:
    """A mask may be empty; its density is 0."""
    mask = BlockMask.from_dense(torch.zeros(1, 2, 2, 2, dtype=torch.bool), q_len=100, kv_len=100)

    assert mask.density() == 0.0
    assert mask.indices.shape == (1, 2, 2, 1)


def test_window_drops_blocks_that_no_row_reaches() -> None:
    """Blocks wholly before the oldest row's window leave the lists."""
    mask = BlockMask.causal(256).within(65)

    assert mask.validate().counts.tolist() == [[[1, 2, 2, 2]]]
    assert mask.indices[0, 0, 3].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_q": 8}, "block_q is 8; choose 16 to 128"),
        ({"q_offset": 1}, "must lie within kv_len"),
        ({"q_len": 500, "kv_len": 500}, "query blocks"),
        ({"counts": torch.ones(1, 1, 4)}, "both must be int32"),
        ({"counts": torch.ones(1, 1, 3, dtype=torch.int32)}, "do not match"),
        ({"counts": torch.full((1, 1, 4), 9, dtype=torch.int32)}, "counts must lie in 0..4"),
        ({"counts": torch.ones(1, 1, 4, dtype=torch.int32)}, "past their count must be -1"),
        ({"indices": torch.full((1, 1, 4, 4), -1, dtype=torch.int32)}, "is negative"),
    ],
)
def test_a_broken_mask_says_which_rule(change: dict[str, object], text: str) -> None:
    """Each broken rule has its own message, with the value found."""
    mask = replace(BlockMask.causal(200), **change)

    with pytest.raises(MaskError, match=text):
        mask.validate()


def test_looking_ahead_is_refused() -> None:
    """A block after the last row of its query block is an error, compact or dense."""
    indices = BlockMask.causal(200).indices.clone()
    indices[0, 0, 0, 0] = 1

    with pytest.raises(MaskError, match="looks ahead"):
        replace(BlockMask.causal(200), indices=indices).validate()
    with pytest.raises(MaskError, match="looks ahead"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), q_len=100, kv_len=100)


def test_unsorted_lists_are_refused() -> None:
    """Indices ascend without repeats."""
    indices = BlockMask.causal(200).indices.clone()
    indices[0, 0, 3, :2] = 1

    with pytest.raises(MaskError, match="ascend"):
        replace(BlockMask.causal(200), indices=indices).validate()


@pytest.mark.parametrize(
    ("dense", "text"),
    [
        (torch.zeros(1, 1, 2, 2), "pass a bool"),
        (torch.zeros(1, 1, 1, 2, dtype=torch.bool), "these lengths need"),
    ],
)
def test_from_dense_checks_its_input(dense: torch.Tensor, text: str) -> None:
    """Wrong type or block numbers are named."""
    with pytest.raises(MaskError, match=text):
        BlockMask.from_dense(dense, q_len=100, kv_len=100)


def test_density_counts_causal_blocks_only() -> None:
    """Sink and diagonal of 4 query blocks are 7 of 10 causal blocks."""
    assert random_mask(1, 256, share=0.0).density() == pytest.approx(0.7)
