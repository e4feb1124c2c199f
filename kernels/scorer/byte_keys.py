"""Single keys in bytes, as the native program scores them: a key's bytes depend on that key alone."""

from __future__ import annotations

from typing import TypeAlias

import torch

from sentei.kernels.ops.native.calls import BytePanels
from sentei.kernels.ops.registry import is_native_usable
from sentei.kernels.scorer.network import BlockScorer

# Pooled keys [B, Hkv, P, features], or those of the single keys of full blocks in bytes.
EncodedKeys: TypeAlias = torch.Tensor | BytePanels


def takes_bytes(scorer: BlockScorer, device: torch.device) -> bool:
    """Whether this scorer's keys are scored in bytes here."""
    shape = scorer.shape
    if not (
        shape.is_single and scorer.has_native_program and is_native_usable(device.type, shape.block_tokens)
    ):
        return False
    from sentei.kernels.ops.native.calls import has_byte_scores

    return has_byte_scores(shape.rank)


def add_blocks(
    scorer: BlockScorer, features: torch.Tensor, dtype: torch.dtype, before: BytePanels | None = None
) -> BytePanels:
    """Pack the full blocks of features [B, Hkv, T, rank], rounded to `dtype`, behind those of `before`.

    Where `before` has room it is written to: what it held stays as it is, and nobody may add to it again.
    """
    from sentei.kernels.ops.native.calls import pack_bytes_native

    return pack_bytes_native(features, dtype, inverse_steps(scorer), scorer.shape.block_tokens, before)


def byte_maps(scorer: BlockScorer) -> torch.Tensor:
    """Return the query maps times the steps of the bytes of single keys, as the native program packs them."""
    from sentei.kernels.ops.native.calls import pack_byte_maps_native

    assert scorer.key_steps is not None
    steps = scorer.key_steps
    return scorer.frozen(
        "byte maps",
        lambda: pack_byte_maps_native(
            scorer.scaled_query_map().float().contiguous(), steps.float().contiguous()
        ),
    )


def inverse_steps(scorer: BlockScorer) -> torch.Tensor:
    """Return how many bytes a feature of 1 is: [Hkv, rank]."""
    assert scorer.key_steps is not None
    steps = scorer.key_steps
    return scorer.frozen("inverse steps", lambda: (1.0 / steps.float()).contiguous())
