"""The attention that rungs drop: the true mass of blocks left out, on rows recorded from dense passes."""

import math
from collections.abc import Sequence

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.scorer.selection import per_head_thresholds
from sentei.pipeline.measure.capture import Sampling, capture, query_block_needs
from sentei.pipeline.measure.texts import Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress


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
    for index, scorer in adapter.scorers.items():
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
