"""What query blocks need, by the scorer and in truth: how much is missed or dropped at a threshold.

A needle is a block that holds more than 30% of some row's attention (docs/adr/0003).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.scorer.network import BlockScorer
from sentei.kernels.scorer.selection import (
    QueryBlocks,
    choose_rows,
    forced_lse,
    log_shares,
    per_head_thresholds,
)
from sentei.pipeline.measure.capture import Sampling, capture
from sentei.pipeline.measure.records import LayerRecord
from sentei.pipeline.measure.texts import Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress

NEEDLE_SHARE = 0.3
SCORES_AT_ONCE = 1 << 26  # of single tokens: 256 MiB in fp32, and on the way some three times as much
MIN_SHARE, MAX_SHARE = 1e-6, 0.999  # thresholds on a share of the attention


def row_shares(scorer: BlockScorer, record: LayerRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scorer's log shares [1, Hq, n, rows, blocks] and those of the forced blocks.

    Rows that are scored as one have the same, and those that another row stands for have that one's.
    """
    shares, forced = pooled_shares(scorer, record)
    size = scorer.shape.row_tokens
    if size == 1:
        return shares, forced
    return shares.repeat_interleave(size, dim=3), forced.repeat_interleave(size, dim=3)


def pooled_shares(scorer: BlockScorer, record: LayerRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what row_shares does, once for all rows that are scored by their mean."""
    shape = scorer.shape
    keys = scorer.encode_keys(*record.pool_keys(shape.pool_tokens))
    blocks, lse = record.query_blocks(shape.row_tokens), record.lse
    if shape.row_tokens > 1:
        lse = forced_lse(
            blocks,
            record.keys.float(),
            scale=scorer.scale,
            block_tokens=shape.block_tokens,
            q_len_end=record.keys.shape[2],
            lead=0,
        )
    places = None
    if shape.chooses_rows:
        blocks, lse, places = choose_rows(blocks, lse, shape.query_pool, record.keys.shape[2])
    shares, forced = _shares_in_parts(scorer, blocks, keys, lse)
    if places is not None:
        shares = shares.gather(3, places[..., None].expand(*places.shape, shares.shape[-1]))
        forced = forced.gather(3, places)
    missing = record.mass.shape[-1] - shares.shape[-1]
    return torch.nn.functional.pad(shares, (0, missing), value=float("-inf")), forced


def _shares_in_parts(
    scorer: BlockScorer, blocks: QueryBlocks, keys: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what log_shares does; of long texts few query blocks at a time, whose scores nobody keeps.

    Where gradients flow they are computed once more on the way back.
    """
    per_block = blocks.q.shape[1] * blocks.q.shape[3] * keys.shape[2]
    size = max(1, SCORES_AT_ONCE // per_block)
    num = blocks.q.shape[2]
    if size >= num:
        return log_shares(scorer, blocks, keys, lse)
    run = log_shares
    if torch.is_grad_enabled():
        run = partial(checkpoint, log_shares, use_reentrant=False)
    places = [slice(first, first + size) for first in range(0, num, size)]
    parts = [run(scorer, _part(blocks, inside), keys, lse[:, :, inside]) for inside in places]
    shares, forced = zip(*parts, strict=True)
    return torch.cat(shares, dim=2), torch.cat(forced, dim=2)


def _part(blocks: QueryBlocks, inside: slice) -> QueryBlocks:
    q, plain = blocks.q[:, :, inside], blocks.q_plain[:, :, inside]
    return replace(blocks, q=q, q_plain=plain, starts=blocks.starts[inside])


def scorers_beside_records(scorers: Mapping[int, BlockScorer]) -> Mapping[int, BlockScorer]:
    """Return the scorers on the CPU, where records are: themselves, or copies of those on a GPU."""
    return {
        index: scorer if scorer.query_map.device.type == "cpu" else _on_cpu(scorer)
        for index, scorer in scorers.items()
    }


def _on_cpu(scorer: BlockScorer) -> BlockScorer:
    copied = BlockScorer(scorer.shape, scorer.scale)
    copied.load_state_dict({name: weight.cpu() for name, weight in scorer.state_dict().items()})
    return copied.train(scorer.training)


def query_block_needs(
    scorer: BlockScorer, record: LayerRecord, block_q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what query blocks of `block_q` rows need, by the scorer and in truth.

    The log share of the neediest row [Hq, N, blocks], -inf where a block is closed, and the true mass
    [Hq, N, block_q, blocks], 0 there.
    """
    shares, _ = row_shares(scorer, record)
    mass = record.mass[0].float() * record.is_open[None, :, None, :]
    return _by_query_block(shares[0], block_q).amax(dim=2), _by_query_block(mass, block_q)


def _by_query_block(x: torch.Tensor, block_q: int) -> torch.Tensor:
    """Cut the rows of x [H, n, rows, ...] into query blocks: [H, n * rows / block_q, block_q, ...]."""
    H, n, rows = x.shape[:3]
    return x.reshape(H, n * (rows // block_q), block_q, *x.shape[3:])


@dataclass(frozen=True, slots=True)
class Scored:
    """One layer's scores and truth for the query blocks of one length bin, over all records."""

    needs: list[torch.Tensor]  # per record [Hq, n, blocks]: neediest row's log share, -inf where closed
    mass: list[torch.Tensor]  # per record [Hq, n, rows, blocks]: true share, 0 where closed

    def dropped(self, heads: slice, share: float) -> torch.Tensor:
        """Return the true mass that each row of some heads would lose under a share threshold."""
        log_share = torch.tensor(share).log()
        pairs = zip(self.needs, self.mass, strict=True)
        return torch.cat([dropped_rows(mass[heads], needs[heads] <= log_share) for needs, mass in pairs])


@dataclass(frozen=True, slots=True)
class AtDensity:
    """What a form finds at a given density: shares of the attention that rows truly pay."""

    mass_recall_mean: float
    mass_recall_p5: float  # 5th percentile over rows
    mass_recall_worst_head: float
    needles_missed: float
    need_found: float  # of what blocks hold of their neediest row, summed: an oracle's own measure


@torch.no_grad()
def score_records(
    scorer: BlockScorer,
    records: Sequence[LayerRecord],
    edges: Sequence[int],
    block_q: int,
    *,
    score: Callable[[BlockScorer, LayerRecord, int], tuple[torch.Tensor, torch.Tensor]] = query_block_needs,
) -> tuple[list[Scored], Scored]:
    """Score query blocks of `block_q` rows: sorted into length bins, and those apart that ask for notes.

    `score` gives what `query_block_needs` does.
    """
    bins, asking = [Scored([], []) for _ in range(len(edges) + 1)], Scored([], [])
    for record in records:
        which = torch.bucketize(record.starts, torch.tensor(edges), right=True)
        needs, mass = score(scorer, record, block_q)
        parts = [*((scored, which == b) for b, scored in enumerate(bins)), (asking, record.is_asking)]
        for scored, inside in parts:
            if bool(inside.any()):
                chosen = inside.repeat_interleave(needs.shape[1] // len(inside))
                scored.needs.append(needs[:, chosen])
                scored.mass.append(mass[:, chosen])
    return bins, asking


def needle_threshold(scored: Scored, heads: slice, missed: float) -> float:
    """Return the threshold below which a share `missed` of the needles' mass lies."""
    needs = torch.cat([needs[heads].flatten() for needs in scored.needs])
    weights = torch.cat(
        [(mass[heads] * (mass[heads] > NEEDLE_SHARE)).sum(dim=2).flatten() for mass in scored.mass]
    )
    is_needle = weights > 0
    if not bool(is_needle.any()):
        return MAX_SHARE
    order = needs[is_needle].argsort()
    lost = weights[is_needle][order].cumsum(0) / weights.sum()
    first_kept = int((lost <= missed).sum())
    ranked = needs[is_needle][order]
    # A block passes if its share exceeds the threshold, so the threshold lies just below the first one kept.
    return float(ranked[min(first_kept, len(ranked) - 1)].exp()) * (1 - 1e-4)


def max_head_density(scored: Scored, heads: slice, share: float) -> float:
    """Return the largest share of its open blocks that any of the heads keeps at a threshold."""
    log_share = torch.tensor(share).log()
    kept = torch.stack([(needs[heads] > log_share).sum(dim=(1, 2)) for needs in scored.needs]).sum(dim=0)
    num_open = sum(int(torch.isfinite(needs[heads.start]).sum()) for needs in scored.needs)
    return float(kept.max()) / max(1, num_open)


def at_density(scored: Scored, density: float) -> AtDensity:
    """Keep a layer's best-scored blocks up to a density, one threshold for all heads; see what they hold."""
    ranked = torch.cat([needs[torch.isfinite(needs)] for needs in scored.needs]).sort(descending=True).values
    share = float(ranked[min(round(density * len(ranked)), len(ranked) - 1)].exp())
    heads = range(scored.needs[0].shape[0])
    found = torch.stack([1 - scored.dropped(slice(head, head + 1), share) for head in heads])
    needles = [(mass * (mass > NEEDLE_SHARE)).sum(dim=2) for mass in scored.mass]
    missed = sum(
        float(weight[needs <= math.log(share)].sum())
        for weight, needs in zip(needles, scored.needs, strict=True)
    )
    rank = max(1, round(0.05 * found.numel()))
    wanted = [mass.amax(dim=2) for mass in scored.mass]
    kept = sum(
        float(need[needs > math.log(share)].sum()) for need, needs in zip(wanted, scored.needs, strict=True)
    )
    return AtDensity(
        mass_recall_mean=float(found.mean()),
        mass_recall_p5=float(found.flatten().kthvalue(rank).values),
        mass_recall_worst_head=float(found.mean(dim=1).min()),
        needles_missed=missed / max(1e-9, sum(float(weight.sum()) for weight in needles)),
        need_found=kept / max(1e-9, sum(float(need.sum()) for need in wanted)),
    )


def dropped_rows(mass: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
    """Return the true mass that each row loses, all heads in one vector.

    mass [Hq, N, rows, blocks] is 0 on blocks that nobody may drop; is_dropped [Hq, N, blocks].
    """
    return (mass * is_dropped[:, :, None, :]).sum(dim=-1).flatten()


@torch.no_grad()
def dropped_by_rung(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    sampling: Sampling,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Return each rung's dropped mass over sampled rows of all layers and heads: (mean, 99th percentile)."""
    records = capture(
        loaded,
        [Text(text) for text in texts],
        adapter.manifest.shapes,
        sampling,
        label="measure dropped mass",
        progress=progress,
    )
    ladder = adapter.ladder
    rungs = [rung for rung in ladder.rungs if not rung.is_dense]
    rows: dict[str, list[torch.Tensor]] = {rung.id: [] for rung in rungs}
    for index, scorer in scorers_beside_records(adapter.scorers).items():
        for record in records[index]:
            needs, mass = query_block_needs(scorer, record, ladder.query_block_tokens)
            starts = record.starts.repeat_interleave(needs.shape[1] // len(record.starts))
            for rung in rungs:
                limits = per_head_thresholds(ladder.thresholds(rung, index), starts, needs.shape[0])
                is_thinned = (starts >= rung.break_even_tokens)[:, None]
                rows[rung.id].append(dropped_rows(mass, (needs <= limits) & is_thinned))
    return {rung_id: _mean_and_p99(torch.cat(found)) for rung_id, found in rows.items()}


def _mean_and_p99(rows: torch.Tensor) -> tuple[float, float]:
    # kthvalue, because quantile refuses more than 2^24 values.
    rank = max(1, math.ceil(0.99 * rows.numel()))
    return float(rows.mean()), float(rows.kthvalue(rank).values)
