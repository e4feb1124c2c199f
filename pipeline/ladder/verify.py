"""What a rung costs in quality, measured against dense on the same text, token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung, Verified
from sentei.kernels.hf.models import rotary_table
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.kernels.scorer.selection import per_head_thresholds
from sentei.pipeline.measure.capture import by_query_block, capture, row_shares
from sentei.pipeline.measure.records import LayerRecord
from sentei.pipeline.measure.scores import paired_delta, pick_positions, token_losses
from sentei.pipeline.measure.texts import Text, make_windows
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress
from sentei.pipeline.text.corpus import Document


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much held-out text to verify on; positions are spread evenly over the window's later part."""

    window_tokens: int = 4096
    num_windows: int = 3
    max_positions: int = 2048
    first_position: int = 1024
    blocks_per_window: int = 24
    seed: int = 2


def verify_ladder(
    loaded: LoadedModel,
    adapter: Adapter,
    documents: Sequence[Document],
    options: VerifyOptions,
    progress: Progress,
) -> dict[str, Verified]:
    """Measure every calibrated rung on held-out text: losses in live passes, dropped mass on dense rows."""
    window = min(options.window_tokens, loaded.max_tokens)
    windows = make_windows(
        loaded, documents, window_tokens=window, num=options.num_windows, seed=options.seed
    )
    positions = pick_positions(window, first=options.first_position, most=options.max_positions)
    sparse = [rung for rung in adapter.ladder.rungs if not rung.is_dense]
    losses: dict[str, list[torch.Tensor]] = {rung.id: [] for rung in adapter.ladder.rungs}
    densities: dict[str, list[float]] = {rung.id: [] for rung in sparse}
    with retrofit(loaded.model, adapter, DENSE, base="flex") as handle:
        for i, text in enumerate(windows):
            progress("verify rungs", i, len(windows))
            for rung in adapter.ladder.rungs:
                losses[rung.id].append(_run_rung(handle, rung, loaded, text, positions))
                if not rung.is_dense:
                    densities[rung.id].append(_require_density(handle, rung))
    progress("verify rungs", len(windows), len(windows))
    dropped = dropped_by_rung(loaded, adapter, windows, options, progress)
    dense = torch.cat(losses[DENSE])
    result = {}
    for rung in sparse:
        delta = paired_delta(torch.cat(losses[rung.id]), dense)
        mean, p99 = dropped[rung.id]
        density = sum(densities[rung.id]) / len(densities[rung.id])
        result[rung.id] = Verified(mean, p99, delta.mean, delta.ci, density)
    return result


def dropped_by_rung(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    options: VerifyOptions,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Return each rung's dropped mass over sampled rows of all layers and heads: (mean, 99th percentile)."""
    records = capture(
        loaded,
        [Text(text) for text in texts],
        dict(adapter.manifest.shapes),
        blocks_per_text=options.blocks_per_window,
        seed=options.seed,
        progress=progress,
        label="measure dropped mass",
    )
    longest = max(len(text) for text in texts)
    table = rotary_table(loaded.model, longest)
    rows: dict[str, list[torch.Tensor]] = {rung.id: [] for rung in adapter.ladder.rungs if not rung.is_dense}
    with torch.no_grad():
        for index, scorer in adapter.scorers.items():
            for record in records[index]:
                needs = row_shares(scorer, record, table)[0][0]
                for rung_id, found in rows.items():
                    rung = adapter.ladder.find(rung_id)
                    found.append(dropped_rows(adapter.ladder, rung, index, record, needs))
    return {rung_id: _mean_and_p99(torch.cat(found)) for rung_id, found in rows.items()}


def dropped_rows(
    ladder: Ladder, rung: Rung, layer: int, record: LayerRecord, needs: torch.Tensor
) -> torch.Tensor:
    """Return the true mass that a rung drops from each row of a record, all heads in one vector.

    `needs` are the rows' own log shares [Hq, n, rows, blocks].
    """
    limits = per_head_thresholds(ladder.thresholds(rung, layer), record.starts, needs.shape[0])
    together = by_query_block(needs, ladder.query_block_tokens).amax(dim=2, keepdim=True)
    best = together.expand(-1, -1, ladder.query_block_tokens, -1).reshape(needs.shape)
    is_open = record.is_open & (record.starts >= rung.break_even_tokens)[:, None]
    is_dropped = (best <= limits[:, :, None]) & is_open[:, None, :]
    return (record.mass[0].float() * is_dropped).sum(dim=-1).flatten()


def _run_rung(
    handle: Retrofit, rung: Rung, loaded: LoadedModel, text: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    handle.set_rung(rung.id)
    handle.reset_stats()
    return token_losses(loaded, text, positions)


def _require_density(handle: Retrofit, rung: Rung) -> float:
    density = handle.stats().density()
    if density is None:
        raise ValueError(
            f"rung {rung.id!r} ran dense on this text: it is shorter than break_even_tokens "
            f"{rung.break_even_tokens}; verify on longer windows"
        )
    return density


def _mean_and_p99(rows: torch.Tensor) -> tuple[float, float]:
    # kthvalue, because quantile refuses more than 2^24 values.
    rank = max(1, math.ceil(0.99 * rows.numel()))
    return float(rows.mean()), float(rows.kthvalue(rank).values)
