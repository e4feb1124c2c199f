"""Look at a frozen model's attention inputs while it runs densely, and stop once the last layer was seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from sentei.kernels.hf.models import LayerInfo, text_decoder, thinnable_layers
from sentei.kernels.ops.attention import dense_attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.block_mass import dropped_mass

Observer = Callable[[LayerInfo, torch.Tensor, torch.Tensor], None]
NAME = "sentei_observe"


class _SeenError(Exception):
    """The last layer of interest was seen; the rest of the pass would be wasted."""


@torch.no_grad()
def observe_attention(model: nn.Module, input_ids: torch.Tensor, observer: Observer) -> None:
    """Run the decoder on input_ids [1, T] and call observer(layer, q, k) at each thinnable layer."""
    layers = {layer.module: layer for layer in thinnable_layers(model)}
    last = max(layer.index for layer in layers.values())

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layer = layers.get(module)
        if layer is not None:
            observer(layer, query, key)
            if layer.index == last:
                raise _SeenError
        out = dense_attend(
            query, key, value, scale=kwargs.get("scaling"), window=kwargs.get("sliding_window")
        )
        return out.transpose(1, 2).contiguous(), None

    previous = model.config._attn_implementation  # type: ignore[union-attr]
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        text_decoder(model)(input_ids=input_ids, use_cache=False)
    except _SeenError:
        pass
    finally:
        model.set_attn_implementation(previous)  # type: ignore[operator]
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The scorer's choice in one attention call of one layer, by query block (mask.block_q rows)."""

    layer: LayerInfo
    query: torch.Tensor  # [B, Hq, Tq, D]
    key: torch.Tensor  # [B, Hkv, Tk, D]
    log_shares: torch.Tensor  # [B, Hq, Q, Kb], of the neediest row; -inf: forced, ahead, or no share at all
    log_thresholds: torch.Tensor  # [Hq, Q]: blocks above it are kept
    mask: BlockMask


SelectionObserver = Callable[[Selection], None]


@dataclass(frozen=True, slots=True, eq=False)
class AttendedRows:
    """The rows of one attention call of one layer, and the LSE of what each truly read; None: all of it."""

    layer: LayerInfo
    query: torch.Tensor  # [B, Hq, Tq, D], the newest positions of those that `key` holds
    key: torch.Tensor  # [B, Hkv, Tk, D]
    lse: torch.Tensor | None  # [B, Hq, Tq]

    def dropped(self) -> torch.Tensor:
        """Return the share of dense attention that each row went without: [B, Hq, Tq], in [0, 1].

        Made for few rows: every score of a row is held in fp32 at once.
        """
        shape, ahead = self.query.shape[:3], self.key.shape[2] - self.query.shape[2] + 1
        if self.lse is None:
            return torch.zeros(shape, device=self.query.device)
        batch, kv_heads, _, dim = self.key.shape
        rows = self.query.float().reshape(batch, kv_heads, -1, dim)
        scores = (rows @ self.key.float().transpose(2, 3) * self.layer.scale).view(*shape, -1)
        if shape[2] > 1:
            is_ahead = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(ahead)
            scores.masked_fill_(is_ahead, -torch.inf)
        return dropped_mass(self.lse, scores.logsumexp(-1))
