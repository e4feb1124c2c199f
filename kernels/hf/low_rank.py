"""Low-rank weights beside a frozen decoder's attention projections: y = W x + up (down x).

They never touch the model's own weights: forward hooks add their term while it is asked for, so that taking
the hooks out gives the untouched model back, bit by bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from sentei.kernels.hf.models import AdapterError, ModelError, thinnable_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class LowRankInfo:
    """The manifest's entry: sizes, the rung that the weights were trained under, and held-out figures."""

    rank: int
    rung: str
    layers: tuple[int, ...]
    projections: tuple[str, ...] = PROJECTIONS
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the projections that have a term, as "layer.projection"."""
        return tuple(f"{layer}.{name}" for layer in self.layers for name in self.projections)


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """One projection's term: down [rank, in], up [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """All terms of one model, by "layer.projection"."""

    info: LowRankInfo
    pairs: Mapping[str, LowRankPair]

    def parameters(self) -> list[torch.Tensor]:
        """Return the tensors that training moves, in a fixed order."""
        return [tensor for key in self.info.keys for tensor in (self.pairs[key].down, self.pairs[key].up)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is written to disk, in fp32."""
        return {
            f"{key}.{name}": getattr(pair, name).detach().float().contiguous()
            for key, pair in self.pairs.items()
            for name in ("down", "up")
        }

    def with_figures(self, figures: Mapping[str, float]) -> "LowRank":
        """Return the same terms with other held-out figures."""
        return replace(self, info=replace(self.info, figures=dict(figures)))


def new_low_rank(model: nn.Module, *, rank: int, rung: str, seed: int = 0) -> LowRank:
    """Return terms that add nothing yet (up is zero), for every layer that a rung can thin."""
    if rank < 1:
        raise ModelError(f"rank is {rank}; it must be at least 1, for example 8")
    info = LowRankInfo(rank, rung, tuple(layer.index for layer in thinnable_layers(model)))
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for key, module in find_projections(model, info).items():
        out_features, in_features = module.weight.shape
        down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        up, device = torch.zeros(out_features, rank), module.weight.device
        pairs[key] = LowRankPair(down.to(device), up.to(device))
    return LowRank(info, pairs)


def find_projections(model: nn.Module, info: LowRankInfo) -> dict[str, Any]:
    """Return the linear modules that the terms stand beside, by "layer.projection"."""
    layers = {layer.index: layer.module for layer in thinnable_layers(model)}
    found = {}
    for layer in info.layers:
        for name in info.projections:
            module = getattr(layers.get(layer), name, None)
            if not isinstance(module, nn.Linear):
                raise AdapterError(
                    f"layer {layer} of this model has no linear projection {name} under full attention, "
                    "which the low-rank weights need; train them for this model: sentei distill --joint"
                )
            found[f"{layer}.{name}"] = module
    return found


def hook_low_rank(model: nn.Module, low_rank: LowRank) -> list[Any]:
    """Let the terms take part in every forward pass until the returned hooks are removed."""
    return [
        module.register_forward_hook(_adder(low_rank.pairs[key]))
        for key, module in find_projections(model, low_rank.info).items()
    ]


def low_rank_from_tensors(
    info: LowRankInfo, tensors: Mapping[str, torch.Tensor], model: nn.Module, place: str
) -> LowRank:
    """Read back what LowRank.tensors gave; AdapterError names the tensor that is missing or does not fit."""
    pairs = {}
    for key, module in find_projections(model, info).items():
        out_features, in_features = module.weight.shape
        shapes = {"down": (info.rank, in_features), "up": (out_features, info.rank)}
        pair = {name: tensors.get(f"{key}.{name}") for name in shapes}
        for name, tensor in pair.items():
            if tensor is None or tuple(tensor.shape) != shapes[name] or not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"{place}: {key}.{name} is missing, not {shapes[name]} or not finite; "
                    "train again: sentei distill --joint"
                )
        pairs[key] = LowRankPair(**{n: t.to(module.weight.device) for n, t in pair.items() if t is not None})
    return LowRank(info, pairs)


def info_from_dict(data: Mapping[str, Any]) -> LowRankInfo:
    """Read the manifest's entry."""
    lists = {name: tuple(data[name]) for name in ("layers", "projections")}
    return LowRankInfo(**{**data, **lists})


def _adder(pair: LowRankPair) -> Any:
    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        x = args[0]
        return out + linear(linear(x, pair.down.to(x.dtype)), pair.up.to(x.dtype))

    return add
