"""What must hold for every block mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.flex import to_flex_lists
from sentei.kernels.ops.reference import token_mask
from tests.strategies_masks import block_masks


@given(block_masks())
@settings(deadline=None, max_examples=60)
def test_a_mask_never_looks_ahead(mask: BlockMask) -> None:
    """No listed block starts after the last row of its query block."""
    starts = mask.indices.long() * mask.block_k
    last = mask.q_offset + ((torch.arange(mask.num_q_blocks) + 1) * mask.block_q).clamp(max=mask.q_len) - 1

    assert mask.validate() is mask
    assert bool((starts <= last[:, None]).all())


@given(block_masks())
@settings(deadline=None, max_examples=60)
def test_compact_and_dense_forms_round_trip(mask: BlockMask) -> None:
    """Going to the dense form and back changes nothing."""
    sizes = {"block_q": mask.block_q, "block_k": mask.block_k, "q_offset": mask.q_offset}

    again = BlockMask.from_dense(mask.to_dense(), q_len=mask.q_len, kv_len=mask.kv_len, **sizes)

    assert torch.equal(again.counts, mask.counts)
    assert torch.equal(again.indices, mask.indices)


@given(block_masks())
@settings(deadline=None, max_examples=60)
def test_density_is_a_share_of_the_causal_blocks(mask: BlockMask) -> None:
    """A mask with sink and diagonal keeps more than nothing and at most all."""
    assert 0.0 < mask.density() <= 1.0


@given(block_masks(), st.none() | st.integers(1, 400))
@settings(deadline=None, max_examples=60)
def test_flex_lists_hold_each_visible_block_once(mask: BlockMask, window: int | None) -> None:
    """Full blocks are visible in every token, partial ones are the rest, none is listed twice or lost."""
    lists = to_flex_lists(mask, window)
    full = _unpack(lists.full_counts, lists.full_indices, mask)
    partial = _unpack(lists.partial_counts, lists.partial_indices, mask)
    batch, heads = mask.counts.shape[:2]

    for b in range(batch):
        for h in range(heads):
            tokens = token_mask(mask.to_dense()[b, h], mask, window)
            every, some = _by_block(tokens, mask, every=True), _by_block(tokens, mask, every=False)
            assert not bool((full[b, h] & partial[b, h]).any())
            assert bool((every | ~full[b, h]).all())
            assert bool(((full[b, h] | partial[b, h]) | ~some).all())
            assert bool((mask.to_dense()[b, h] | ~(full[b, h] | partial[b, h])).all())


def _unpack(counts: torch.Tensor, indices: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    counts, indices = counts[:, :, : mask.num_q_blocks], indices[:, :, : mask.num_q_blocks]
    listed = torch.arange(indices.shape[3]) < counts[..., None]
    times = torch.zeros(*mask.counts.shape, max(2, mask.num_k_blocks), dtype=torch.int32)
    times.scatter_add_(-1, indices.long(), listed.to(torch.int32))
    assert int(times.max()) <= 1
    return times[..., : mask.num_k_blocks].bool()


def _by_block(tokens: torch.Tensor, mask: BlockMask, *, every: bool) -> torch.Tensor:
    rows, keys = mask.num_q_blocks * mask.block_q, mask.num_k_blocks * mask.block_k
    padded = torch.full((rows, keys), every)
    padded[: mask.q_len, : mask.kv_len] = tokens
    blocks = padded.view(mask.num_q_blocks, mask.block_q, mask.num_k_blocks, mask.block_k)
    return blocks.all(3).all(1) if every else blocks.any(3).any(1)
