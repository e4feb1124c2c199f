"""What a rung costs in quality, measured against dense on the same text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung, Verified
from sentei.pipeline.measure.capture import Sampling
from sentei.pipeline.measure.needs import dropped_by_rung
from sentei.pipeline.measure.rungs import losses_by_variant
from sentei.pipeline.measure.scores import paired_delta, pick_positions
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress


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
    windows: Sequence[torch.Tensor],
    options: VerifyOptions,
    progress: Progress,
) -> Ladder:
    """Return the ladder with what held-out text says of each rung: losses of live passes, dropped mass."""
    positions = pick_positions(len(windows[0]), first=options.first_position, most=options.max_positions)
    losses = losses_by_variant(loaded, adapter, windows, positions, label="verify rungs", progress=progress)
    sampling = Sampling(options.blocks_per_window, options.seed)
    dropped = dropped_by_rung(loaded, adapter, windows, sampling, progress)

    def verified(rung: Rung) -> Rung:
        own = losses[rung.id]
        if not own.has_always_run_sparse:
            raise ValueError(
                f"rung {rung.id!r} ran dense on this text: it is shorter than break_even_tokens "
                f"{rung.break_even_tokens}; verify on longer windows"
            )
        delta = paired_delta(own.loss, losses[DENSE].loss)
        return replace(rung, verified=Verified(*dropped[rung.id], delta.mean, delta.ci, own.density))

    dense, *rungs = adapter.ladder.rungs
    return replace(adapter.ladder, rungs=(dense, *(verified(rung) for rung in rungs)))
