"""What a rung costs in quality, measured against dense on the same text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, LengthCheck, Rung, Verified
from sentei.pipeline.measure.capture import Sampling
from sentei.pipeline.measure.needs import dropped_by_rung
from sentei.pipeline.measure.rungs import by_variant, losses_by_variant, run_each
from sentei.pipeline.measure.scores import paired_delta, pick_positions
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much held-out text to verify on; positions are spread evenly over the window's later part.

    Densities and dropped mass are also measured on the windows' beginnings of the shorter lengths.
    """

    window_tokens: int = 8192
    shorter_tokens: tuple[int, ...] = (2048, 4096)
    num_windows: int = 2
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
    checks = [
        _check_length(loaded, adapter, [window[:tokens] for window in windows], sampling, progress)
        for tokens in options.shorter_tokens
        if tokens < len(windows[0])
    ]
    dropped = dropped_by_rung(loaded, adapter, windows, sampling, progress)

    def verified(rung: Rung) -> Rung:
        own = losses[rung.id]
        if not own.has_always_run_sparse:
            raise ValueError(
                f"rung {rung.id!r} ran dense on this text: it is shorter than break_even_tokens "
                f"{rung.break_even_tokens}; verify on longer windows"
            )
        delta = paired_delta(own.loss, losses[DENSE].loss)
        whole = LengthCheck(len(windows[0]), own.density, dropped[rung.id][0])
        by_length = tuple(check[rung.id] for check in checks if rung.id in check)
        found = Verified(*dropped[rung.id], delta.mean, delta.ci, own.density, (*by_length, whole))
        return replace(rung, verified=found, verified_tokens=len(windows[0]))

    dense, *rungs = adapter.ladder.rungs
    return replace(adapter.ladder, rungs=(dense, *(verified(rung) for rung in rungs)))


def _check_length(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    sampling: Sampling,
    progress: Progress,
) -> dict[str, LengthCheck]:
    """Return what each rung keeps and drops in texts of one length, but for rungs that run dense there."""
    tokens = len(texts[0])
    kept = by_variant(
        run_each(
            loaded, adapter, texts, loaded.last_states, label=f"verify {tokens} tokens", progress=progress
        )
    )
    dropped = dropped_by_rung(loaded, adapter, texts, sampling, progress)
    return {
        rung.id: LengthCheck(tokens, fmean(run.density for run in kept[rung.id]), dropped[rung.id][0])
        for rung in adapter.ladder.rungs
        if rung.covers(tokens)
    }
