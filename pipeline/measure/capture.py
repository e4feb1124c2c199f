"""Frozen activations as training and calibration records: sampled query blocks and each row's true mass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.hf.models import LayerInfo
from sentei.kernels.hf.observe import observe_attention
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.selection import QueryBlocks, forced_lse, log_shares
from sentei.pipeline.measure.records import LayerRecord, Records
from sentei.pipeline.measure.texts import RECALL_BLOCKS, Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress


def capture(
    loaded: LoadedModel,
    texts: Sequence[Text],
    shapes: dict[int, ScorerShape],
    *,
    blocks_per_text: int,
    seed: int,
    progress: Progress,
    label: str,
) -> Records:
    """Run the frozen model over the texts; keep records of sampled query blocks of each thinnable layer."""
    generator = torch.Generator().manual_seed(seed)
    records = Records(shapes)
    for i, text in enumerate(texts):
        progress(label, i, len(texts))
        size = next(iter(shapes.values())).block_tokens
        num_last = RECALL_BLOCKS if text.is_recall else 1
        chosen = sample_blocks(len(text.ids) // size, blocks_per_text, generator, num_last=num_last)
        is_asking = (chosen >= len(text.ids) // size - num_last) & text.is_recall
        sampled = Sampled(chosen, is_asking)

        def keep(layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, sampled: Sampled = sampled) -> None:
            records.add(layer.index, record_layer(layer, q, k, shapes[layer.index], sampled))

        observe_attention(loaded.model, text.ids[None], keep)
    progress(label, len(texts), len(texts))
    return records


def sample_blocks(
    num_blocks: int, wanted: int, generator: torch.Generator, *, num_last: int = 1
) -> torch.Tensor:
    """Choose query blocks that have something to choose from; the last ones are always among them."""
    first = 2
    if num_blocks < first + num_last:
        raise ValueError(f"the text has {num_blocks} blocks; at least {first + num_last} are needed")
    order = torch.randperm(num_blocks - first - num_last, generator=generator) + first
    last = torch.arange(num_blocks - num_last, num_blocks)
    return torch.cat([order[: max(0, wanted - num_last)], last]).sort().values


@dataclass(frozen=True, slots=True)
class Sampled:
    """Which query blocks of a text are recorded, and which of them ask."""

    chosen: torch.Tensor
    is_asking: torch.Tensor


def record_layer(
    layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, shape: ScorerShape, sampled: Sampled
) -> LayerRecord:
    """Reduce one layer's attention inputs to what training and calibration need."""
    chosen, size = sampled.chosen, shape.block_tokens
    rows = (chosen[:, None] * size + torch.arange(size)).flatten()
    H, D, n = layer.query_heads, layer.head_dim, len(chosen)
    _, mass = block_mass(q, k, scale=layer.scale, block_k=size, rows=rows)
    own = q[:, :, rows].float().view(1, H, n, size, D)
    keys = k.float()
    blocks = QueryBlocks(own, own, chosen * size)
    return LayerRecord(
        q=own.bfloat16(),
        starts=chosen * size,
        keys=k.contiguous(),
        lse=forced_lse(blocks, keys, scale=layer.scale, block_tokens=size, q_len_end=keys.shape[2]),
        mass=mass.view(1, H, n, size, -1).half(),
        is_asking=sampled.is_asking,
    )


def by_query_block(x: torch.Tensor, block_q: int) -> torch.Tensor:
    """Cut the rows of x [H, n, rows, ...] into query blocks: [H, n * rows / block_q, block_q, ...]."""
    H, n, rows = x.shape[:3]
    return x.reshape(H, n * (rows // block_q), block_q, *x.shape[3:])


def row_shares(
    scorer: BlockScorer, record: LayerRecord, table: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scorer's log shares [1, Hq, n, rows, blocks] and those of the forced blocks.

    Rows that are scored as one have the same.
    """
    shares, forced = pooled_shares(scorer, record, table)
    size = scorer.shape.query_pool
    if size == 1:
        return shares, forced
    return shares.repeat_interleave(size, dim=3), forced.repeat_interleave(size, dim=3)


def pooled_shares(
    scorer: BlockScorer, record: LayerRecord, table: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what row_shares does, once for all rows that are scored as one."""
    shape = scorer.shape
    keys = scorer.encode_keys(*record.pool_keys(shape.pool_tokens, table))
    blocks, lse = record.query_blocks(table, shape.query_pool), record.lse
    if shape.query_pool > 1:
        lse = forced_lse(
            blocks,
            record.keys.float(),
            scale=scorer.scale,
            block_tokens=shape.block_tokens,
            q_len_end=record.keys.shape[2],
        )
    shares, forced = log_shares(scorer, blocks, keys, lse)
    missing = record.mass.shape[-1] - shares.shape[-1]
    return torch.nn.functional.pad(shares, (0, missing), value=float("-inf")), forced
