"""Which queries of a layer are scored as one: measured, not assumed."""

import pytest
import torch

from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.pipeline.ladder.distill import DistillOptions, choose_scorer
from sentei.pipeline.measure.records import LayerRecord

BLOCK, BLOCKS, D = 16, 24, 8
SCALE = D**-0.5


def make_record(seed: int, same: int, key_run: int = 1) -> LayerRecord:
    """Sharp attention of one head over random keys; neighbouring rows and keys are alike in runs."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 1, BLOCK * BLOCKS // key_run, D, generator=generator)
    keys = keys.repeat_interleave(key_run, dim=2)
    asked = torch.randint(BLOCK, BLOCK * (BLOCKS - 8), (BLOCK * BLOCKS // same,), generator=generator)
    q = 6 * keys[:, :, asked].repeat_interleave(same, dim=2)
    starts = torch.arange(BLOCKS - 6, BLOCKS) * BLOCK
    rows = (starts[:, None] + torch.arange(BLOCK)).flatten()
    lse, mass = block_mass(q, keys, scale=SCALE, block_k=BLOCK, rows=rows)
    mass = mass.view(1, 1, len(starts), BLOCK, BLOCKS)
    index, own = torch.arange(BLOCKS), (starts // BLOCK)[:, None]
    is_forced = (index == 0) | (index >= own)
    forced = (mass * is_forced[None, None, :, None]).sum(dim=-1).clamp_min(1e-9)
    return LayerRecord(
        q=q[:, :, rows].view(1, 1, len(starts), BLOCK, D).bfloat16(),
        starts=starts,
        keys=keys,
        lse=lse.view(forced.shape) + forced.log(),
        mass=mass.half(),
        is_asking=torch.zeros(len(starts), dtype=torch.bool),
        table=RotaryTable(torch.ones(BLOCK * BLOCKS, D), torch.zeros(BLOCK * BLOCKS, D)),
    )


@pytest.mark.parametrize("same", [4, 1])
def test_as_many_queries_are_scored_as_one_as_ask_alike(same: int) -> None:
    """Where neighbours ask for other blocks, their mean finds none, and rows are scored as they are."""
    shape = ScorerShape(1, 1, D, D, 1, BLOCK, "low_rank", 4)
    records = [make_record(seed, same) for seed in range(3)]

    chosen = choose_scorer(BlockScorer(shape, SCALE), records[:2], records[2:], DistillOptions(max_epochs=0))

    if same == 1:
        assert chosen.scorer.shape.row_tokens == 1
    else:
        assert chosen.scorer.shape.query_pool == same
    assert not chosen.is_untrained
    assert chosen.figures()["query_pool"] == chosen.scorer.shape.query_pool
    assert chosen.found.need_found >= chosen.found_untrained.need_found


def test_rows_are_chosen_where_their_mean_asks_for_nothing() -> None:
    """Neighbours that take turns with the same few questions: some of the rows ask for all, no mean does."""
    shape = ScorerShape(1, 1, D, D, 1, BLOCK, "low_rank", 4)
    records = [make_record(seed, same=BLOCK // 4) for seed in range(3)]
    turns = torch.arange(BLOCK).view(4, -1).T.flatten()  # 0, 4, 8, 12, 1, 5, ...
    for record in records:
        for part in (record.q, record.lse, record.mass):
            part.copy_(part[:, :, :, turns])

    chosen = choose_scorer(BlockScorer(shape, SCALE), records[:2], records[2:], DistillOptions(max_epochs=0))

    assert chosen.scorer.shape.query_reduce == "k_center"
    assert chosen.scorer.shape.query_pool == 4
    assert chosen.figures()["chooses_rows"] == 1


def test_steps_of_bytes_are_those_of_the_training_texts() -> None:
    """127 of them reach to 4 standard deviations beyond the mean of the texts' own features."""
    shape = ScorerShape(1, 1, D, D, 1, BLOCK, "low_rank", 1)
    records = [make_record(seed, 1) for seed in range(3)]

    scorer = choose_scorer(
        BlockScorer(shape, SCALE), records[:2], records[2:], DistillOptions(max_epochs=0, query_pool=1)
    ).scorer

    with torch.no_grad():
        parts = [scorer.encode_keys(*record.pool_keys(1))[0, 0, BLOCK:] for record in records[:2]]
    features = torch.cat(parts)
    expected = features.mean(dim=0).abs() + 4 * features.std(dim=0, correction=0)
    assert scorer.key_steps is not None
    torch.testing.assert_close(127 * scorer.key_steps[0], expected)


def test_a_score_that_finds_less_than_the_untrained_one_is_not_used() -> None:
    """Where 4 keys are alike their means lose nothing, and one dimension of eight does; the layer says so."""
    shape = ScorerShape(1, 1, D, 1, 1, BLOCK, "low_rank", 4)
    records = [make_record(seed, 16, key_run=4) for seed in range(3)]

    chosen = choose_scorer(BlockScorer(shape, SCALE), records[:2], records[2:], DistillOptions(max_epochs=0))

    assert chosen.is_untrained
    assert chosen.scorer.shape.pool_tokens == 4
    assert chosen.kl_held_out == chosen.kl_untrained
