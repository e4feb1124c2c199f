"""Frozen activations as training and calibration records: sampled query blocks and each row's true mass.

On a GPU the exact mass is computed there; each record moves to the CPU as it is made. There it waits, and
there scorers learn from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.hf.models import LayerInfo, rotary_table
from sentei.kernels.hf.observe import observe_attention
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import ScorerShape
from sentei.kernels.scorer.selection import QueryBlocks, forced_lse
from sentei.pipeline.measure.records import LayerRecord, Records
from sentei.pipeline.measure.texts import RECALL_BLOCKS, Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many query blocks of each text are recorded, and the seed that chooses them."""

    blocks_per_text: int
    seed: int


def capture(
    loaded: LoadedModel,
    texts: Sequence[Text],
    shapes: Mapping[int, ScorerShape],
    sampling: Sampling,
    *,
    label: str,
    progress: Progress,
) -> Records:
    """Run the frozen model over the texts; keep records of some query blocks of each layer with a shape."""
    generator = torch.Generator().manual_seed(sampling.seed)
    table = rotary_table(loaded.model, max(len(text.ids) for text in texts))
    records = Records(shapes, table)
    size = next(iter(shapes.values())).block_tokens
    for text in counted(texts, label, progress):
        num_last = RECALL_BLOCKS if text.is_recall else 1
        chosen = sample_blocks(len(text.ids) // size, sampling.blocks_per_text, generator, num_last=num_last)
        is_asking = (chosen >= len(text.ids) // size - num_last) & text.is_recall
        sampled = Sampled(chosen, is_asking, table)

        def keep(layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, sampled: Sampled = sampled) -> None:
            if layer.index in shapes:
                records.add(layer.index, record_layer(layer, q, k, shapes[layer.index], sampled))

        observe_attention(loaded.model, text.ids[None].to(loaded.device), keep)
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
    """Which query blocks of a text are recorded, which of them ask, and the rotary table, all on the CPU."""

    chosen: torch.Tensor
    is_asking: torch.Tensor
    table: RotaryTable


def record_layer(
    layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, shape: ScorerShape, sampled: Sampled
) -> LayerRecord:
    """Reduce one layer's attention inputs, on any device, to what training and calibration need."""
    chosen = sampled.chosen.to(q.device)
    size = shape.block_tokens
    rows = (chosen[:, None] * size + torch.arange(size, device=q.device)).flatten()
    H, D, n = layer.query_heads, layer.head_dim, len(chosen)
    _, mass = block_mass(q, k, scale=layer.scale, block_k=size, rows=rows)
    own = q[:, :, rows].float().view(1, H, n, size, D)
    keys = k.float()
    blocks = QueryBlocks(own, own, chosen * size)
    lse = forced_lse(blocks, keys, scale=layer.scale, block_tokens=size, q_len_end=keys.shape[2], lead=0)
    return LayerRecord(
        q=own.bfloat16().cpu(),
        starts=sampled.chosen * size,
        keys=k.contiguous().cpu(),
        lse=lse.cpu(),
        mass=mass.view(1, H, n, size, -1).half().cpu(),
        is_asking=sampled.is_asking,
        table=sampled.table,
    )
