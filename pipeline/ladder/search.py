"""Rungs that are made for what they cost or save: at which density is found by running candidates.

Losses are asked from mild to bold and the first rung that may cost too much ends it. In a fixed order no
correction for many questions is due: the rung that is kept passed at its interval's own level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sentei.errors import SenteiError
from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung
from sentei.pipeline.ladder.targets import RungTarget, candidates_for
from sentei.pipeline.measure.latency import BEST_DENSE, time_prefills
from sentei.pipeline.measure.rungs import Variant, losses_by_variant
from sentei.pipeline.measure.scores import PairedDelta, paired_delta
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress


class TargetError(SenteiError, ValueError):
    """A loss or a speed that no rung reaches; the message names the nearest one."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What candidates are run on: windows of held-out text, the judged positions, rounds of timing."""

    windows: Sequence[torch.Tensor]
    positions: torch.Tensor
    timed_runs: int


def pick_rungs(
    loaded: LoadedModel,
    adapter: Adapter,
    targets: Sequence[RungTarget],
    text: HeldOut,
    progress: Progress,
) -> Ladder:
    """Return the ladder with one rung for each target, the densest first where all are of a density.

    The adapter's ladder has the rungs of the targets that need no search, and the candidates of the others.
    """
    ladder = adapter.ladder
    cost, speed = _Costs(loaded, adapter, text, progress), _Speeds(loaded, adapter, text, progress)
    known = {rung.id: rung for rung in ladder.rungs}
    found: list[tuple[float, Rung]] = []
    for target in targets:
        candidates = [known[each.id] for each in candidates_for([target]) if each.id in known]
        if target.nll is not None:
            rung = boldest_within(candidates, target.nll, cost)
        elif target.speed is not None:
            rung = mildest_reaching(candidates, target.speed, speed)
        else:
            rung = ladder.find(target.id)
        density = rung.target_density or 0.0
        found.append((density, _for(rung, target) if target.is_searched else rung))
    if all(density for density, _ in found):
        found.sort(key=lambda pair: -pair[0])
    return replace(ladder, rungs=(ladder.find(DENSE), *(rung for _, rung in found)))


def _for(rung: Rung, target: RungTarget) -> Rung:
    return replace(rung, id=target.id, target_density=None, target_nll=target.nll, target_speed=target.speed)


def boldest_within(rungs: Sequence[Rung], nll: float, cost: Callable[[Rung], PairedDelta]) -> Rung:
    """Return the last rung, from mild to bold, before the first whose interval reaches above `nll`."""
    kept: Rung | None = None
    for rung in rungs:
        delta = cost(rung)
        if delta.ci[1] > nll:
            break
        kept = rung
    if kept is None:
        low, high = delta.ci
        raise TargetError(
            f"no rung costs at most {nll:g} nats per token: the mildest, {rungs[0].target_density:.0%} of "
            f"the blocks, costs {delta.mean:+.4f} ({low:+.4f} to {high:+.4f}) on held-out text; "
            "allow more (--nll), or measure on more of it"
        )
    return kept


def mildest_reaching(rungs: Sequence[Rung], speed: float, measured: Callable[[Rung], float]) -> Rung:
    """Return the first rung, from mild to bold, that is fast enough; by halving: bold is fast."""
    low, high = 0, len(rungs) - 1
    if (most := measured(rungs[high])) < speed:
        raise TargetError(
            f"no rung is {speed:g} times as fast as dense here: the boldest, "
            f"{rungs[high].target_density:.0%} of the blocks, is {most:.2f} times; ask for less, or for "
            "longer windows (--tokens)"
        )
    while low < high:
        middle = (low + high) // 2
        if measured(rungs[middle]) >= speed:
            high = middle
        else:
            low = middle + 1
    return rungs[high]


def prefill_speeds(
    loaded: LoadedModel, adapter: Adapter, text: HeldOut, progress: Progress
) -> dict[str, float]:
    """Return dense's median seconds over each rung's; all take turns on the first window."""
    timings = time_prefills(
        loaded, adapter, text.windows[0], runs=text.timed_runs, progress=progress, dense=(BEST_DENSE,)
    )
    dense = timings.pop(BEST_DENSE)
    return {rung_id: dense.median_s / timing.median_s for rung_id, timing in timings.items()}


class _Costs:
    """The loss of a rung over dense; each is run once."""

    def __init__(self, loaded: LoadedModel, adapter: Adapter, text: HeldOut, progress: Progress) -> None:
        self._loaded, self._adapter, self._text, self._progress = loaded, adapter, text, progress
        self._losses: dict[str, torch.Tensor] = {}

    def __call__(self, rung: Rung) -> PairedDelta:
        return paired_delta(self._loss(rung.id), self._loss(DENSE))

    def _loss(self, rung_id: str) -> torch.Tensor:
        if rung_id not in self._losses:
            ran = losses_by_variant(
                self._loaded,
                self._adapter,
                self._text.windows,
                self._text.positions,
                variants=[Variant(rung_id, rung_id)],
                label="losses of candidates",
                progress=self._progress,
            )
            self._losses[rung_id] = ran[rung_id].loss
        return self._losses[rung_id]


class _Speeds:
    """How many times as fast as dense a rung is; each is timed once."""

    def __init__(self, loaded: LoadedModel, adapter: Adapter, text: HeldOut, progress: Progress) -> None:
        self._loaded, self._adapter, self._text, self._progress = loaded, adapter, text, progress
        self._found: dict[str, float] = {}

    def __call__(self, rung: Rung) -> float:
        if rung.id not in self._found:
            ladder = self._adapter.ladder
            alone = self._adapter.with_ladder(replace(ladder, rungs=(ladder.find(DENSE), rung)))
            self._found |= prefill_speeds(self._loaded, alone, self._text, self._progress)
        return self._found[rung.id]
