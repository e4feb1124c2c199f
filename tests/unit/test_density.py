"""Densities as targets: the share of the blocks that a threshold keeps, and what it drops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.pipeline.ladder.calibrate import CalibrateOptions, fit_reachable
from sentei.pipeline.ladder.density import DensityError, DensityFit, fit_densities
from sentei.pipeline.ladder.targets import CANDIDATES, density_targets, nll_targets
from sentei.pipeline.measure.needs import row_shares
from sentei.pipeline.measure.records import LayerRecord

BLOCK, BLOCKS = 16, 12
SHAPE = ScorerShape(2, 1, 8, rank=2, pool_tokens=4, block_tokens=BLOCK)


def make_table() -> RotaryTable:
    """Angles of a small rotary embedding."""
    angles = torch.arange(BLOCK * BLOCKS)[:, None] * (0.1 ** (torch.arange(4) / 4))
    full = torch.cat([angles, angles], dim=-1)
    return RotaryTable(full.cos(), full.sin())


def make_record(seed: int = 0) -> LayerRecord:
    """Random queries and keys of the query blocks 2 to 11, and some true mass."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(2, BLOCKS) * BLOCK
    n = len(starts)
    keys = torch.randn(1, 1, BLOCKS * BLOCK, 8, generator=generator)
    mass = torch.rand(1, 2, n, BLOCK, BLOCKS, generator=generator)
    seen = torch.arange(BLOCKS) <= (starts // BLOCK)[:, None]
    mass = mass * seen[None, None, :, None, :]
    return LayerRecord(
        q=(2 * torch.randn(1, 2, n, BLOCK, 8, generator=generator)).bfloat16(),
        starts=starts,
        keys=keys,
        lse=torch.zeros(1, 2, n, BLOCK),
        mass=(mass / mass.sum(-1, keepdim=True)).half(),
        is_asking=torch.zeros(n, dtype=torch.bool),
        table=make_table(),
    )


def kept_share(
    record: LayerRecord, scorer: BlockScorer, fit: DensityFit, block_q: int = BLOCK
) -> tuple[float, float]:
    """Count the causal blocks that a threshold keeps, one query block at a time, and the mass it drops."""
    shares = row_shares(scorer, record)[0][0]
    kept = causal = 0
    dropped = 0.0
    for i_q, start in enumerate(record.starts.tolist()):
        own = start // BLOCK
        causal += 2 * (own + 1)
        for head in range(2):
            for first in range(0, BLOCK, block_q):
                rows = slice(first, first + block_q)
                passes = shares[head, i_q, rows, 1:own].amax(dim=0).exp() > fit.shares[0]
                kept += 2 + int(passes.sum())
                dropped += float((record.mass[0, head, i_q, rows, 1:own].float() * ~passes).sum())
    causal *= BLOCK // block_q
    return kept / causal, dropped / (2 * len(record.starts) * BLOCK)


@pytest.mark.parametrize("block_q", [BLOCK, BLOCK // 4])
@pytest.mark.parametrize("density", [0.4, 0.6, 0.9])
def test_the_threshold_keeps_the_density(density: float, block_q: int) -> None:
    """Sink and diagonal included, the kept blocks are the wanted share; the dropped mass is the rest's."""
    record, scorer = make_record(), BlockScorer(SHAPE, 8**-0.5)

    (fit,) = fit_densities({0: scorer}, {0: [record]}, [density], block_q=block_q)

    with torch.no_grad():
        kept, dropped = kept_share(record, scorer, fit, block_q)
    assert kept == pytest.approx(density, abs=0.01)
    assert fit.dropped_mass == pytest.approx(dropped, rel=1e-2)


def test_blocks_flow_to_the_layer_that_needs_them() -> None:
    """One threshold serves all layers: the one with sharper rows keeps more than its even part."""
    spread, sharp = make_record(), make_record(1)
    sharp = LayerRecord(**{name: getattr(sharp, name) for name in LayerRecord.__slots__} | {"q": 4 * sharp.q})
    scorers = {0: BlockScorer(SHAPE, 8**-0.5), 1: BlockScorer(SHAPE, 8**-0.5)}

    (fit,) = fit_densities(scorers, {0: [spread], 1: [sharp]}, [0.5], block_q=BLOCK)

    with torch.no_grad():
        own, other = kept_share(spread, scorers[0], fit)[0], kept_share(sharp, scorers[1], fit)[0]
    assert other > own
    assert (own + other) / 2 == pytest.approx(0.5, abs=0.01)


def test_fewer_rows_that_choose_together_drop_less_at_the_same_density() -> None:
    """Rows of a query block share their blocks: a quarter of them finds more of its own mass in as many."""
    record, scorer = make_record(), BlockScorer(SHAPE, 8**-0.5)
    shares = row_shares(scorer, record)[0].exp().nan_to_num()
    guessed = LayerRecord(
        **{name: getattr(record, name) for name in LayerRecord.__slots__} | {"mass": shares.half()}
    )

    together, apart = (
        fit_densities({0: scorer}, {0: [guessed]}, [0.5], block_q=rows)[0] for rows in (BLOCK, BLOCK // 4)
    )

    assert apart.dropped_mass < 0.95 * together.dropped_mass


def test_a_group_that_must_not_miss_keeps_its_own_threshold_and_the_rest_pays() -> None:
    """A limit on one layer's threshold keeps its blocks; the other's rises, and the density stays."""
    records = {0: [make_record()], 1: [make_record(1)]}
    scorers = {0: BlockScorer(SHAPE, 8**-0.5), 1: BlockScorer(SHAPE, 8**-0.5)}
    (free,) = fit_densities(scorers, records, [0.5], block_q=BLOCK)
    limits = {0: torch.tensor([0.7 * float(free.shares[0])]), 1: torch.tensor([0.999])}
    (held,) = fit_densities(scorers, records, [0.5], block_q=BLOCK, most=limits)

    assert limits[0] < free.shares[0] < held.shares[0]
    with torch.no_grad():
        kept = [
            kept_share(records[i][0], scorers[i], DensityFit(held.shares.clamp_max(float(limits[i])), 0.0))[0]
            for i in (0, 1)
        ]
    assert sum(kept) / 2 == pytest.approx(0.5, abs=0.01)


def test_a_density_below_what_questions_need_is_refused_with_both_numbers() -> None:
    """The message names the density, what the questions take, and the option that gives way."""
    limits = {0: torch.tensor([1e-4])}

    with pytest.raises(DensityError, match=r"density 0.2 .* takes [0-9.]+% .*--missed-needles"):
        fit_densities(
            {0: BlockScorer(SHAPE, 8**-0.5)},
            {0: [make_record()]},
            [0.9, 0.2],
            block_q=BLOCK,
            most=limits,
        )


def test_candidates_that_questions_leave_no_room_for_are_left_out() -> None:
    """A rung of a loss is looked for among the densities that can be had; its own target stays refused."""
    record, scorer = make_record(), BlockScorer(SHAPE, 8**-0.5)
    mass = row_shares(scorer, record)[0].exp().nan_to_num()  # needles where it looks for them
    sharp = mass**4 / (mass**4).sum(-1, keepdim=True).clamp_min(1e-9)
    changes = {"is_asking": torch.ones(len(record.starts), dtype=torch.bool), "mass": sharp.half()}
    asking = LayerRecord(**{name: getattr(record, name) for name in LayerRecord.__slots__} | changes)
    targets = nll_targets([0.01], 0.6)
    options = CalibrateOptions(targets=targets, query_block_tokens=4)

    ladder = fit_reachable({0: scorer}, {0: [asking]}, options, "cpu")

    found = [rung.target_density for rung in ladder.rungs[1:]]
    assert found == list(CANDIDATES[: len(found)])
    assert 0 < len(found) < len(CANDIDATES)
    held = replace(options, targets=(*density_targets([0.05], 0.6), *targets))
    with pytest.raises(DensityError, match=r"density 0\.05 is out of reach"):
        fit_reachable({0: scorer}, {0: [asking]}, held, "cpu")


def test_what_is_forced_is_kept_at_any_density() -> None:
    """A density below sink and diagonal keeps these alone; a density of 1 keeps everything."""
    scorer = BlockScorer(SHAPE, 8**-0.5)

    least, all_of_them = fit_densities({0: scorer}, {0: [make_record()]}, [0.01, 1.0], block_q=BLOCK)

    assert float(least.shares[0]) == pytest.approx(0.999)
    assert float(all_of_them.shares[0]) == pytest.approx(1e-6)
    assert all_of_them.dropped_mass == 0.0


def test_rungs_are_named_after_their_density_and_ordered() -> None:
    """The densest rung comes first, whatever the order of the options."""
    targets = density_targets([0.1, 0.5, 0.125])

    assert [(target.id, target.density) for target in targets] == [
        ("d50", 0.5),
        ("d12.5", 0.125),
        ("d10", 0.1),
    ]
    assert CalibrateOptions(targets=targets).targets == targets


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_an_impossible_density_is_refused_by_value(density: float) -> None:
    """A density is a share of the blocks."""
    with pytest.raises(ValueError, match=f"density {density:g} is no share"):
        density_targets([density])


def test_every_bin_of_positions_keeps_the_density() -> None:
    """One share for all positions would keep more of short contexts than of long ones."""
    record, scorer = make_record(), BlockScorer(SHAPE, 8**-0.5)
    edges = (6 * BLOCK,)

    (fit,) = fit_densities({0: scorer}, {0: [record]}, [0.6], block_q=BLOCK, edges=edges)

    shares = row_shares(scorer, record)[0][0].amax(dim=2)
    for b, inside in enumerate((record.starts < edges[0], record.starts >= edges[0])):
        kept = int((shares[:, inside].exp() > fit.shares[b]).sum()) + 2 * 2 * int(inside.sum())
        causal = 2 * int((record.starts[inside] // BLOCK + 1).sum())
        assert kept / causal == pytest.approx(0.6, abs=0.03)


def test_a_bin_without_text_has_no_share() -> None:
    """Nothing is known of positions that no record has."""
    record, scorer = make_record(), BlockScorer(SHAPE, 8**-0.5)

    (fit,) = fit_densities({0: scorer}, {0: [record]}, [0.5], block_q=BLOCK, edges=(BLOCK * BLOCKS,))

    assert torch.isnan(fit.shares).tolist() == [False, True]
