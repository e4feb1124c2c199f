"""The scorer, its selection and its side cache, on small random tensors."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer import selection
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerError, ScorerShape
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import (
    Thresholds,
    cut_queries,
    forced_lse,
    log_shares,
    score_blocks,
    select_blocks,
)

SHAPE = ScorerShape(query_heads=4, kv_heads=2, head_dim=8, rank=4, pool_tokens=4, block_tokens=16)
SCALE = 8**-0.5


def make_table(length: int) -> RotaryTable:
    """Angles of a small rotary embedding."""
    angles = torch.arange(length)[:, None] * (0.1 ** (torch.arange(4) / 4))
    full = torch.cat([angles, angles], dim=-1)
    return RotaryTable(full.cos(), full.sin())


def make_inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, RotaryTable]:
    """Queries, keys and angles, the same for a length each time."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, 4, length, 8, generator=generator)
    k = torch.randn(1, 2, length, 8, generator=generator)
    return q, k, make_table(length)


def find_shares(scorer: BlockScorer, q: torch.Tensor, k: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Shares of the blocks for queries at the end of the keys."""
    keys = PooledCache(scorer).update(k, k.shape[2], table)
    return score_blocks(scorer, q, k, keys, table=table)[0]


def train_a_little(scorer: BlockScorer) -> None:
    """Move a scorer away from its start, the same way each time."""
    with torch.no_grad():
        scorer.query_map.normal_(generator=torch.Generator().manual_seed(1))
        scorer.distance_bias.normal_(generator=torch.Generator().manual_seed(2))


def test_unrotating_undoes_the_rotary_embedding() -> None:
    """A rotated vector gets back to where it was, whatever its position."""
    x, table = torch.randn(1, 2, 20, 8), make_table(20)
    half = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)

    plain = unrotate(x * table.cos + half * table.sin, torch.arange(20), table)

    torch.testing.assert_close(plain, x)


def test_an_untrained_scorer_gives_the_untrained_score() -> None:
    """Before training a block's logit is the log of the summed weights of its mean keys, nothing else."""
    q, k, _ = make_inputs(64)
    scorer = BlockScorer(SHAPE, SCALE)
    pooled = pool_tokens(k, 4)

    logits = scorer.block_logits(scorer.encode_queries(q, q), scorer.encode_keys(pooled, pooled))

    plain = SCALE * q @ pooled.repeat_interleave(2, dim=1).transpose(-1, -2)
    expected = plain.view(1, 4, 64, 4, 4).exp().sum(dim=-1).log() + math.log(4)
    torch.testing.assert_close(logits, expected)


def test_the_estimate_is_exact_where_keys_of_a_pool_are_equal() -> None:
    """With equal keys in each pool nothing is lost by pooling, so estimated and true shares agree."""
    q, k, table = make_inputs(64)
    k = pool_tokens(k, 4).repeat_interleave(4, dim=2)
    scorer = BlockScorer(SHAPE, SCALE)
    blocks = cut_queries(q, table, block_q=16, q_offset=0)
    lse = forced_lse(blocks, k, scale=SCALE, block_tokens=16, q_len_end=64, lead=0)
    pooled = pool_tokens(k, 4)

    shares, forced = log_shares(scorer, blocks, scorer.encode_keys(pooled, pooled), lse)

    _, mass = block_mass(q, k, scale=SCALE, block_k=16)
    mass = mass.view(1, 4, 4, 16, 4)
    torch.testing.assert_close(shares[:, :, 3, :, 1:3].exp(), mass[:, :, 3, :, 1:3])
    torch.testing.assert_close(forced[:, :, 3].exp(), mass[:, :, 3, :, [0, 3]].sum(dim=-1))


@pytest.mark.parametrize("length", [17, 63, 111, 200])
def test_a_decode_step_scores_like_the_last_row_of_a_prefill(length: int) -> None:
    """One scorer serves both: the last row alone gives what it contributes inside a prefill."""
    q, k, table = make_inputs(length)
    scorer = BlockScorer(SHAPE, SCALE)
    train_a_little(scorer)

    alone = find_shares(scorer, q[:, :, -1:], k, table)

    blocks = cut_queries(q, table, block_q=16, q_offset=0)
    lse = forced_lse(blocks, k, scale=SCALE, block_tokens=16, q_len_end=length, lead=0)
    keys = PooledCache(scorer).update(k, length, table)
    rows, _ = log_shares(scorer, blocks, keys, lse)
    inside = rows.flatten(2, 3)[:, :, length - 1]
    expected = torch.full_like(alone[:, :, 0], float("-inf"))
    expected[..., : inside.shape[-1]] = inside
    torch.testing.assert_close(alone[:, :, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [64, 96])
def test_equal_queries_score_as_one_what_they_score_alone(length: int) -> None:
    """The mean of equal queries is each of them, so nothing is lost but what the last of them sees more."""
    q, k, table = make_inputs(length)
    # Without rotation the mean of the plain queries is the plain query, too.
    table = RotaryTable(torch.ones_like(table.cos), torch.zeros_like(table.sin))
    q = pool_tokens(q, 4).repeat_interleave(4, dim=2)
    shape = replace(SHAPE, form="low_rank", pool_tokens=1)
    alone, together = (BlockScorer(replace(shape, query_pool=size), SCALE) for size in (1, 4))
    train_a_little(alone)
    together.load_state_dict(alone.state_dict())
    keys = alone.encode_keys(k, k)

    parts = []
    for scorer, step in ((alone, 1), (together, 4)):
        blocks = cut_queries(q, table, block_q=16, q_offset=0, query_pool=step)
        lse = forced_lse(blocks, k, scale=SCALE, block_tokens=16, q_len_end=length, lead=0)
        parts.append(log_shares(scorer, blocks, keys, lse)[0])

    torch.testing.assert_close(parts[1], parts[0][:, :, :, 3::4])


def test_queries_are_pooled_only_over_single_keys() -> None:
    """Means against means would blur twice; the message names both sizes."""
    with pytest.raises(ScorerError, match="query_pool is 4 with pool_tokens 4"):
        replace(SHAPE, pool_tokens=4, query_pool=4)


def test_the_neediest_row_decides() -> None:
    """A block that one single row needs is kept for the whole query block."""
    q, k, table = make_inputs(96)
    q, k = q * 0.01, k * 0.01
    k[:, :, 32:36] = 0.0
    k[:, :, 32:36, 0] = 10.0
    q[:, :, 90, 0] = 10.0

    shares = find_shares(BlockScorer(SHAPE, SCALE), q, k, table)

    assert bool((shares[:, :, 5].exp()[..., 2] > 0.9).all())
    assert bool((shares[:, :, 4].exp()[..., 2] < 0.5).all())


def test_sink_and_diagonal_are_kept_at_any_threshold() -> None:
    """With a threshold that nothing passes, exactly sink and diagonal stay."""
    q, k, table = make_inputs(100)
    shares = find_shares(BlockScorer(SHAPE, SCALE), q, k, table)

    mask = select(shares, 1.0, 100)

    kept = mask.validate().to_dense()[0, 0]
    expected = torch.eye(7, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(kept, expected)


def test_a_lower_threshold_keeps_every_block_that_a_higher_one_keeps() -> None:
    """Selections of milder rungs contain those of bolder ones."""
    q, k, table = make_inputs(200)
    scorer = BlockScorer(SHAPE, SCALE)
    train_a_little(scorer)
    shares = find_shares(scorer, q, k, table)

    masks = [select(shares, share, 200).validate().to_dense() for share in (0.0, 0.01, 0.1, 0.5)]

    for milder, bolder in itertools.pairwise(masks):
        assert bool((milder | ~bolder).all())
    assert masks[0].sum() > masks[-1].sum()


def test_thresholds_follow_the_kv_group_and_the_length_bin() -> None:
    """Each KV group and each length bin obeys its own threshold."""
    q, k, table = make_inputs(128)
    shares = find_shares(BlockScorer(SHAPE, SCALE), q, k, table)
    limits = torch.tensor([[1.0, 1e-30], [1.0, 1.0]]).log()

    mask = select_blocks(
        shares,
        Thresholds(limits, (64,)),
        starts=torch.arange(8) * 16,
        q_len=128,
        kv_len=128,
        q_offset=0,
        block_q=16,
        block_k=16,
    )

    assert mask.counts[0, :2, 7].tolist() == [8, 8]
    assert mask.counts[0, :2, 3].tolist() == [2, 2]
    assert mask.counts[0, 2:, 7].tolist() == [2, 2]


def test_nan_in_the_weights_is_an_error_that_says_what_to_do() -> None:
    """A scorer that gives NaN never chooses silently."""
    q, k, table = make_inputs(64)
    scorer = BlockScorer(SHAPE, SCALE)
    with torch.no_grad():
        scorer.log_gain[0] = float("nan")

    with pytest.raises(ScorerError, match=r"NaN.*serve dense"):
        find_shares(scorer, q, k, table)


def test_lost_pooled_keys_leave_nothing_to_choose_past_the_length() -> None:
    """The other fault empties the choice past its length, leaves the rest alone, and makes no NaN."""
    shares = torch.randn(1, 2, 10, 10)

    faulty = Fault("pooled_keys_lost", past_tokens=80).shift(shares, torch.arange(10) * 16)

    torch.testing.assert_close(faulty[:, :, :5], shares[:, :, :5])
    assert bool(torch.isneginf(faulty[:, :, 5:]).all())


def test_the_planted_fault_moves_the_choice_only_past_its_length() -> None:
    """Before the length nothing changes; past it the same scores choose the block before."""
    q, k, table = make_inputs(160)
    shares = find_shares(BlockScorer(SHAPE, SCALE), q, k, table)

    faulty = Fault(past_tokens=80).shift(shares, torch.arange(10) * 16)

    torch.testing.assert_close(faulty[:, :, :5], shares[:, :, :5])
    torch.testing.assert_close(faulty[:, :, 5:, :-1], shares[:, :, 5:, 1:])
    assert not torch.isnan(faulty).any()


class CountingScorer(BlockScorer):
    """Counts the pools that it encodes."""

    num_encoded = 0

    def encode_keys(self, pooled: torch.Tensor, pooled_plain: torch.Tensor) -> torch.Tensor:
        """Encode and count."""
        self.num_encoded += pooled.shape[2]
        return super().encode_keys(pooled, pooled_plain)


def test_the_side_cache_grows_like_a_fresh_one() -> None:
    """Token by token or at once, the pooled keys are the same, and no pool is encoded twice."""
    _, k, table = make_inputs(50)
    scorer = CountingScorer(SHAPE, SCALE)
    grown = PooledCache(scorer)
    grown.update(k[:, :, :21], 21, table)

    for length in range(22, 51):
        keys = grown.update(k[:, :, :length], 1, table)

    assert scorer.num_encoded == keys.shape[2]
    torch.testing.assert_close(keys, PooledCache(scorer).update(k, 50, table))


def test_the_side_cache_notices_a_crop_a_swap_and_a_reordering() -> None:
    """A KV cache that was cut, replaced or put in another order under it makes it start anew."""
    k, other = torch.randn(2, 2, 2, 50, 8)
    table, scorer = make_table(50), BlockScorer(SHAPE, SCALE)
    cache = PooledCache(scorer)
    cache.update(k, 50, table)

    changed = {"crop": k[:, :, :31], "swap": other[:, :, :32], "reordering": other.flip(0)[:, :, :33]}
    found = {name: cache.update(keys, 1, table) for name, keys in changed.items()}

    for name, keys in changed.items():
        torch.testing.assert_close(found[name], PooledCache(scorer).update(keys, keys.shape[2], table))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores do not depend on how many rows are handled at once."""
    q, k, table = make_inputs(200)
    scorer = BlockScorer(SHAPE, SCALE)
    train_a_little(scorer)
    whole = find_shares(scorer, q, k, table)

    monkeypatch.setattr(selection, "MAX_SCORES_PER_CHUNK", 1)

    torch.testing.assert_close(find_shares(scorer, q, k, table), whole)


@pytest.mark.parametrize(
    ("change", "name"), [({"kv_heads": 3}, "query_heads"), ({"pool_tokens": 5}, "block")]
)
def test_shapes_that_do_not_divide_are_refused(change: dict[str, int], name: str) -> None:
    """Heads must divide into groups, and blocks into pools."""
    sizes = {"query_heads": 4, "kv_heads": 2, "head_dim": 8} | change

    with pytest.raises(ScorerError, match=name):
        ScorerShape(**sizes)


def test_a_decode_step_copies_only_its_own_pools() -> None:
    """Pools of one token grow in place most of the time, and hold what a cache made at once holds."""
    scorer = BlockScorer(ScorerShape(4, 2, 8, 4, 1, 16, "low_rank"), SCALE)
    train_a_little(scorer)
    _, k, table = make_inputs(80)
    cache = PooledCache(scorer, "torch")  # in floats, also where a processor scores bytes
    cache.update(k[:, :, :40], 40, table)

    places = {cache.update(k[:, :, :end], 1, table).data_ptr() for end in range(41, 81)}
    grown = cache.update(k[:, :, :80], 0, table)

    assert len(places) == 1
    torch.testing.assert_close(grown, PooledCache(scorer, "torch").update(k, 80, table))


@torch.no_grad()
def test_what_is_derived_from_weights_is_kept_until_they_change() -> None:
    """One computation per state of the weights: in place, by loading, or by a copy of the scorer."""
    scorer = BlockScorer(SHAPE, SCALE)
    made: list[float] = []

    def read(scorer: BlockScorer) -> float:
        def make() -> torch.Tensor:
            made.append(1.0)
            return scorer.log_gain.exp()

        return float(scorer.frozen("gain", make)[0])

    assert [read(scorer), read(scorer)] == [1.0, 1.0]
    scorer.log_gain.add_(1.0)
    assert read(scorer) == pytest.approx(2.71828, abs=1e-4)
    scorer.load_state_dict(BlockScorer(SHAPE, SCALE).state_dict())
    assert read(scorer) == 1.0
    assert len(made) == 3


def test_an_unknown_form_is_refused() -> None:
    """A manifest from elsewhere cannot name a form that nobody computes."""
    with pytest.raises(ScorerError, match="form is 'cubic'; it must be one of residual, low_rank"):
        ScorerShape(4, 2, 8, form="cubic")  # type: ignore[arg-type]


def test_low_rank_starts_as_the_best_approximation() -> None:
    """At full rank and single tokens the start is the attention score itself; a lower rank is further off."""
    q, k, table = make_inputs(64)
    plain_q, plain_k = (unrotate(x, torch.arange(64), table) for x in (q, k))
    exact = (q.reshape(1, 2, 128, 8) @ k.mT * SCALE).reshape(1, 4, 64, 64)

    def error(rank: int) -> float:
        scorer = BlockScorer(ScorerShape(4, 2, 8, rank, 1, 16, "low_rank"), SCALE)
        scorer.start_from(q[0], k[0])
        with torch.no_grad():
            queries, keys = scorer.encode_queries(q, plain_q), scorer.encode_keys(k, plain_k)
        got = (queries.reshape(1, 2, 128, rank) @ keys.mT).reshape(1, 4, 64, 64)
        return float((got - exact).square().mean())

    assert error(8) < 1e-9
    assert error(8) < error(6) < error(3) < float(exact.square().mean())


def select(shares: torch.Tensor, share: float, length: int) -> BlockMask:
    """Select with one share for everything."""
    limits = torch.full((2, 1), max(share, 1e-30)).log()
    return select_blocks(
        shares,
        Thresholds(limits, ()),
        starts=torch.arange(shares.shape[2]) * 16,
        q_len=length,
        kv_len=length,
        q_offset=0,
        block_q=16,
        block_k=16,
    )
