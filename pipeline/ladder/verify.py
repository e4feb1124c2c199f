"""What a rung costs in quality, measured against dense on the same text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Verified
from sentei.pipeline.measure.capture import Sampling
from sentei.pipeline.measure.dropped import dropped_by_rung
from sentei.pipeline.measure.rungs import by_variant, mean_density, run_each
from sentei.pipeline.measure.scores import paired_delta, pick_positions, token_losses
from sentei.pipeline.measure.texts import make_windows
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
) -> Ladder:
    """Return the ladder with what held-out text says of each rung: losses of live passes, dropped mass."""
    window = min(options.window_tokens, loaded.max_tokens)
    windows = make_windows(
        loaded, documents, window_tokens=window, num=options.num_windows, seed=options.seed
    )
    positions = pick_positions(window, first=options.first_position, most=options.max_positions)
    losses = partial(token_losses, loaded, positions=positions)
    turns = run_each(loaded, adapter, windows, losses, label="verify rungs", progress=progress)
    runs = by_variant(turns)
    sampling = Sampling(options.blocks_per_window, options.seed)
    dropped = dropped_by_rung(loaded, adapter, windows, sampling, progress)
    dense = torch.cat([run.result for run in runs[DENSE]])
    rungs = []
    for rung in adapter.ladder.rungs:
        own = runs[rung.id]
        if not rung.is_dense:
            if not all(run.has_run_sparse for run in own):
                raise ValueError(
                    f"rung {rung.id!r} ran dense on this text: it is shorter than break_even_tokens "
                    f"{rung.break_even_tokens}; verify on longer windows"
                )
            delta = paired_delta(torch.cat([run.result for run in own]), dense)
            verified = Verified(*dropped[rung.id], delta.mean, delta.ci, mean_density(own))
            rung = replace(rung, verified=verified)
        rungs.append(rung)
    return replace(adapter.ladder, rungs=tuple(rungs))
