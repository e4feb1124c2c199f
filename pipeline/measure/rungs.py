"""The one loop of every measurement: each variant of a model over the same items, taking turns on each."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.retrofit import Selector, retrofit
from sentei.pipeline.measure.scores import token_losses
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Densities = Mapping[int, tuple[float, ...]]  # by layer, one per KV group


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the model; `chooser` makes another choice of blocks from the densities of its rung.

    They are those of the variant that is named like the rung, on the same item; it has to come first.
    """

    name: str
    rung: str
    has_low_rank: bool = False
    chooser: Callable[[Densities], Selector] | None = None


@dataclass(frozen=True, slots=True)
class Ran(Generic[Result]):
    """What the work gave under one variant on one item, and what attention kept meanwhile."""

    result: Result
    density: float  # 1 where every call ran dense
    prompt_density: float  # the same without decode steps
    density_by_group: Densities
    has_run_sparse: bool


def run_each(
    loaded: LoadedModel,
    adapter: Adapter,
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    variants: Sequence[Variant] | None = None,
    label: str,
    progress: Progress,
) -> Generator[tuple[Item, dict[str, Ran[Result]]], None, None]:
    """Yield each item with what the work gave under each variant, or each rung where none are given.

    The model is itself again at the end, or once the generator is closed.
    """
    variants = variants if variants is not None else rung_variants(adapter)
    total = len(items) * len(variants)
    with retrofit(loaded.model, adapter, DENSE, base="best") as handle:
        for i, item in enumerate(items):
            found: dict[str, Ran[Result]] = {}
            for j, variant in enumerate(variants):
                progress(label, i * len(variants) + j, total)
                handle.set_rung(variant.rung)
                handle.set_low_rank(variant.has_low_rank)
                rule = variant.chooser
                handle.set_selector(None if rule is None else rule(found[variant.rung].density_by_group))
                handle.reset_stats()
                result, stats = work(item), handle.stats()
                density = stats.density()
                found[variant.name] = Ran(
                    result,
                    density=1.0 if density is None else density,
                    prompt_density=stats.density(least_tokens=2) or 1.0,
                    density_by_group=stats.density_by_group(),
                    has_run_sparse=stats.has_run_sparse,
                )
            yield item, found
    progress(label, total, total)


def by_variant(turns: Iterable[tuple[Any, Mapping[str, Ran[Result]]]]) -> dict[str, list[Ran[Result]]]:
    """Run through all items and return what the work gave on each, by variant."""
    runs: dict[str, list[Ran[Result]]] = {}
    for _, found in turns:
        for name, ran in found.items():
            runs.setdefault(name, []).append(ran)
    return runs


def rung_variants(adapter: Adapter) -> list[Variant]:
    """Return each rung of the adapter's ladder as it is, dense first."""
    return [Variant(rung.id, rung.id) for rung in adapter.ladder.rungs]


@dataclass(frozen=True, slots=True)
class Losses:
    """A variant's losses over all judged tokens, in nats, and what its attention kept."""

    loss: torch.Tensor
    density: float
    has_always_run_sparse: bool


def losses_by_variant(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[torch.Tensor],
    positions: torch.Tensor,
    *,
    variants: Sequence[Variant] | None = None,
    label: str,
    progress: Progress,
) -> dict[str, Losses]:
    """Return the losses of the tokens after the positions of each text, by variant."""
    work = partial(token_losses, loaded, positions=positions)
    turns = run_each(loaded, adapter, texts, work, variants=variants, label=label, progress=progress)
    return {
        name: Losses(
            torch.cat([run.result for run in runs]),
            fmean(run.density for run in runs),
            all(run.has_run_sparse for run in runs),
        )
        for name, runs in by_variant(turns).items()
    }
