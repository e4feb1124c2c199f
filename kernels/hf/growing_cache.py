"""A KV cache with room to grow: a decode step writes its own keys and copies nobody else's.

Transformers' DynamicCache joins old and new keys at each step and so copies the whole context. What that
costs is the same at every rung: of a step of four sequences at 32,768 tokens it was 20 of 33 ms
(docs/measured/2026-11-28.md).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 256  # tokens
_SHARE = 16  # more room for each so many tokens: each is copied so many times at most, whatever the length


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [B, Hkv, T, D] as views of tensors that are longer than they are.

    Its keys are the same as a DynamicLayer's at every moment. Whatever else replaces them (a crop, a
    reordering, another device) gets room of its own at the next step.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, tokens: int = 0) -> None:
        """Make room for `tokens` when the first come, if so many are known to come."""
        super().__init__()
        self._keys = _Room(tokens)
        self._values = _Room(tokens)

    @classmethod
    def over(cls, layer: DynamicLayer, tokens: int = 0) -> GrowingLayer:
        """Return a layer that goes on from what another one holds."""
        grown = cls(tokens)
        grown.__dict__.update(layer.__dict__)
        return grown

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [B, Hkv, n, D]; return all of them."""
        if torch.is_grad_enabled():  # a backward pass needs what each step saw, unwritten
            joined: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return joined
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.extend(self.keys, key_states)
        self.values = self._values.extend(self.values, value_states)
        return self.keys, self.values


class _Room:
    """A tensor of which only the first tokens are taken."""

    def __init__(self, tokens: int) -> None:
        self._least = tokens
        self._all: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None  # the view that `extend` returned last

    def extend(self, held: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Return `held`, which may be empty, with `fresh` behind it; copies `held` where it is not ours."""
        past = held.shape[-2] if held.numel() else 0
        if past and not _fit(held, fresh):
            return torch.cat([held, fresh], dim=-2)  # it promotes, or says what is wrong
        total = past + fresh.shape[-2]
        if held is not self._taken or not self._takes(total):
            room = max(total, self._least)
            size = (*fresh.shape[:-2], room + max(_LEAST_ROOM, room // _SHARE), fresh.shape[-1])
            self._all = fresh.new_empty(size)
            if past:
                self._all[..., :past, :] = held
        assert self._all is not None
        self._all[..., past:total, :] = fresh
        self._taken = self._all[..., :total, :]
        return self._taken

    def _takes(self, total: int) -> bool:
        room = self._all
        if room is None or total > room.shape[-2]:
            return False
        # What inference mode made may not be written to outside it.
        return not room.is_inference() or torch.is_inference_mode_enabled()


def _fit(held: torch.Tensor, fresh: torch.Tensor) -> bool:
    """Whether two tensors [..., T, D] differ in T alone."""
    same_shape = held.shape[:-2] == fresh.shape[:-2] and held.shape[-1] == fresh.shape[-1]
    return same_shape and held.dtype == fresh.dtype and held.device == fresh.device


def give_room(cache: Any, index: int, tokens: int = 0) -> None:
    """Let a layer of a plain DynamicCache grow in place from now on; leave every other cache as it is.

    `tokens` says how long the prompt is that it will hold, where that is known.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or index >= len(cache.layers):
        return
    if type(cache.layers[index]) is DynamicLayer:
        cache.layers[index] = GrowingLayer.over(cache.layers[index], tokens)
