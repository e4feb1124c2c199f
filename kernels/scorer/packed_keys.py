"""Encoded keys as the native program scores them in bytes, kept from one decode step to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sentei.kernels.ops.native.calls import BytePanels


class PackedKeys:
    """The packed full blocks of one growing KV cache: only full blocks can be chosen, so a step adds nothing.

    When another block is full all are packed anew: in decode once in 64 steps. Whoever starts the keys anew
    starts a new one of these, too.
    """

    def __init__(self) -> None:
        self._panels: BytePanels | None = None
        self._dtype: torch.dtype | None = None

    def panels(
        self, keys: torch.Tensor, dtype: torch.dtype, inverse_steps: torch.Tensor, block: int
    ) -> BytePanels:
        """Return the full blocks of encoded keys [B, Hkv, T, rank], rounded to `dtype`, packed."""
        from sentei.kernels.ops.native.calls import pack_bytes_native

        if self._panels is None or self._panels.blocks != keys.shape[2] // block or self._dtype != dtype:
            self._panels, self._dtype = pack_bytes_native(keys, dtype, inverse_steps, block), dtype
        return self._panels
