"""What query blocks need, of texts too long to be scored at once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.pipeline.ladder.distill import divergence
from sentei.pipeline.measure import needs
from sentei.pipeline.measure.records import LayerRecord

BLOCK, BLOCKS, DIM, HEADS = 16, 12, 8, 2
SCALE = DIM**-0.5
SHAPE = ScorerShape(HEADS, 1, DIM, rank=4, pool_tokens=1, block_tokens=BLOCK, form="low_rank", query_pool=2)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made inside has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.most = max(self.most, each.numel())
        return result


def make_record() -> LayerRecord:
    """Random queries and keys of the query blocks 2 to 11."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.arange(2, BLOCKS) * BLOCK
    mass = torch.rand(1, HEADS, len(starts), BLOCK, BLOCKS, generator=generator)
    mass = mass * (torch.arange(BLOCKS) <= (starts // BLOCK)[:, None])[None, None, :, None, :]
    return LayerRecord(
        q=torch.randn(1, HEADS, len(starts), BLOCK, DIM, generator=generator).bfloat16(),
        starts=starts,
        keys=torch.randn(1, 1, BLOCKS * BLOCK, DIM, generator=generator),
        lse=torch.zeros(1, HEADS, len(starts), BLOCK),
        mass=(mass / mass.sum(-1, keepdim=True)).half(),
        is_asking=torch.zeros(len(starts), dtype=torch.bool),
        table=RotaryTable(torch.ones(BLOCK * BLOCKS, DIM), torch.zeros(BLOCK * BLOCKS, DIM)),
    )


@pytest.fixture
def scorer() -> BlockScorer:
    """A low-rank scorer whose query map is no longer zero."""
    scorer = BlockScorer(SHAPE, SCALE)
    torch.nn.init.normal_(scorer.query_map, generator=torch.Generator().manual_seed(1))
    return scorer


def loss_and_gradients(scorer: BlockScorer, record: LayerRecord) -> tuple[float, list[torch.Tensor]]:
    """Return the divergence, and what it asks of each weight."""
    scorer.zero_grad()
    loss = divergence(scorer, record)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), [
        weight.grad.clone() for weight in scorer.parameters() if weight.grad is not None
    ]


@pytest.mark.parametrize("blocks_at_once", [1, 3, 10])
def test_a_text_scored_in_parts_gives_the_same_loss_and_gradients(
    scorer: BlockScorer, monkeypatch: pytest.MonkeyPatch, blocks_at_once: int
) -> None:
    """Query blocks know nothing of each other, so cutting between them changes nothing."""
    record = make_record()
    whole = loss_and_gradients(scorer, record)
    per_block = HEADS * BLOCK // SHAPE.query_pool * BLOCK * BLOCKS
    monkeypatch.setattr(needs, "SCORES_AT_ONCE", blocks_at_once * per_block)

    parts = loss_and_gradients(scorer, record)

    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert len(parts[1]) == len(whole[1]) == 4
    for one, other in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("learns", [False, True])
def test_no_more_scores_are_held_at_once_than_allowed(
    scorer: BlockScorer, monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    """A long text's scores would fill the memory, forwards and backwards; its query blocks come in turn."""
    record = make_record()
    allowed = 3 * HEADS * BLOCK // SHAPE.query_pool * BLOCK * BLOCKS
    monkeypatch.setattr(needs, "SCORES_AT_ONCE", allowed)

    with torch.set_grad_enabled(learns), Largest() as seen:
        loss = divergence(scorer, record)
        if learns:
            loss.backward()  # type: ignore[no-untyped-call]

    assert 0 < seen.most <= allowed
