"""Frozen activations as training and calibration records: sampled query blocks and each row's true mass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.hf.models import LayerInfo, rotary_table
from sentei.kernels.hf.observe import observe_attention
from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import ScorerShape
from sentei.kernels.scorer.selection import QueryBlocks, forced_lse
from sentei.pipeline.measure.texts import RECALL_BLOCKS, Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one layer saw in some query blocks of one text, and where its attention truly went."""

    q: torch.Tensor  # [1, Hq, n, rows, D], bf16
    starts: torch.Tensor  # [n]
    pooled: torch.Tensor  # [1, Hkv, P, D]
    pooled_plain: torch.Tensor  # [1, Hkv, P, D]
    lse: torch.Tensor  # [1, Hq, n, rows], exact log weight of the forced blocks
    mass: torch.Tensor  # [1, Hq, n, rows, blocks], true share of each key block, fp16
    is_asking: torch.Tensor  # [n], whether the block lies among a recall text's questions
    table: RotaryTable  # the model's, shared by all records

    @property
    def is_open(self) -> torch.Tensor:
        """[n, blocks]: blocks a scorer may choose, that is, neither sink nor diagonal nor ahead."""
        index = torch.arange(self.mass.shape[-1])
        own = self.starts // (self.mass.shape[3])
        return (index >= 1) & (index < own[:, None])

    def query_blocks(self) -> QueryBlocks:
        """Return the queries with and without rotation, in fp32."""
        q = self.q.float()
        positions = self.starts[:, None] + torch.arange(q.shape[3])
        return QueryBlocks(q, unrotate(q, positions, self.table), self.starts)


Records = dict[int, list[LayerRecord]]


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
    """Run the frozen model over the texts; keep records of sampled query blocks of each thinnable layer."""
    generator = torch.Generator().manual_seed(sampling.seed)
    table = rotary_table(loaded.model, max(len(text.ids) for text in texts))
    records: Records = {index: [] for index in shapes}
    size = next(iter(shapes.values())).block_tokens
    for text in counted(texts, label, progress):
        num_last = RECALL_BLOCKS if text.is_recall else 1
        chosen = sample_blocks(len(text.ids) // size, sampling.blocks_per_text, generator, num_last=num_last)
        is_asking = (chosen >= len(text.ids) // size - num_last) & text.is_recall
        sampled = Sampled(chosen, is_asking, table)

        def keep(layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, sampled: Sampled = sampled) -> None:
            records[layer.index].append(record_layer(layer, q, k, shapes[layer.index], sampled))

        observe_attention(loaded.model, text.ids[None], keep)
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
    """Which query blocks of a text are recorded, which of them ask, and the rotary table."""

    chosen: torch.Tensor
    is_asking: torch.Tensor
    table: RotaryTable


def record_layer(
    layer: LayerInfo, q: torch.Tensor, k: torch.Tensor, shape: ScorerShape, sampled: Sampled
) -> LayerRecord:
    """Reduce one layer's attention inputs to what training and calibration need."""
    chosen, table = sampled.chosen, sampled.table
    size = shape.block_tokens
    rows = (chosen[:, None] * size + torch.arange(size)).flatten()
    H, D, n = layer.query_heads, layer.head_dim, len(chosen)
    _, mass = block_mass(q, k, scale=layer.scale, block_k=size, rows=rows)
    own = q[:, :, rows].float().view(1, H, n, size, D)
    keys = k.float()
    blocks = QueryBlocks(own, own, chosen * size)
    plain = unrotate(keys, torch.arange(keys.shape[2]), table)
    return LayerRecord(
        q=own.bfloat16(),
        starts=chosen * size,
        pooled=pool_tokens(keys, shape.pool_tokens),
        pooled_plain=pool_tokens(plain, shape.pool_tokens),
        lse=forced_lse(blocks, keys, scale=layer.scale, block_tokens=size, q_len_end=keys.shape[2]),
        mass=mass.view(1, H, n, size, -1).half(),
        is_asking=sampled.is_asking,
        table=table,
    )
