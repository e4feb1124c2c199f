"""Sparse attention with a gradient: SDPA under the block mask spelled out token by token.

The fast backends are for inference and let no gradient through. Training runs the same selection through a
dense bool mask [B, Hq, Tq, Tk] per layer instead: its memory grows with the square of the length, so it is
for training windows of a few thousand tokens, not for serving.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.reference import token_mask


def attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, *, scale: float
) -> torch.Tensor:
    """Return the same as `attend` (up to rounding), with gradients to q, k and v; none to the mask.

    q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D]; out as q. Every row needs a key: sink and diagonal see to it.
    """
    allowed = token_mask(mask.to_dense(), mask, None)
    if allowed.shape[1] not in (1, q.shape[1]):
        allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], dim=1)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
