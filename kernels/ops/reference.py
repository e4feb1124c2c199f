"""The definition: plain fp32 attention over the selected blocks, with LSE. Every backend answers to it."""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.rules import Softmax


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, how: Softmax) -> tuple[Tensor, Tensor]:
    """Attention in fp32: (out [B, Hq, Tq, D] in q's dtype, lse [B, Hq, Tq] fp32), which counts a sink too.

    A row with nothing to read gives zeros, and an LSE of -inf.
    """
    batch, q_heads, q_len, _ = q.shape
    out = torch.zeros(batch, q_heads, q_len, v.shape[-1], device=q.device)
    lse = torch.full((batch, q_heads, q_len), -torch.inf, device=q.device)
    selected = mask.to_dense()
    for b in range(batch):
        for h in range(q_heads):
            h_kv = h * k.shape[1] // q_heads
            h_mask = h * selected.shape[1] // q_heads
            blocks = selected[b if selected.shape[0] > 1 else 0, h_mask]
            allowed = token_mask(blocks, mask, how.window)
            scores = (q[b, h].float() @ k[b, h_kv].float().T) * how.scale
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            scores = scores.masked_fill(~allowed, -torch.inf)
            lse[b, h] = scores.logsumexp(-1)
            if how.sinks is not None:
                lse[b, h] = torch.logaddexp(lse[b, h], how.sinks[h].float())
            weights = torch.exp(scores - lse[b, h].clamp(min=torch.finfo(torch.float32).min)[:, None])
            out[b, h] = weights @ v[b, h_kv].float()
    return out.to(q.dtype), lse


def token_mask(blocks: Tensor, mask: BlockMask, window: int | None) -> Tensor:
    """Which tokens rows may read: bool [..., Tq, Tk] from their selected blocks, bool [..., Q, Kb]."""
    device = blocks.device
    rows = torch.arange(mask.q_len, device=device)
    keys = torch.arange(mask.kv_len, device=device)
    position = (mask.q_offset + rows)[:, None]
    chosen = blocks[..., (rows // mask.block_q)[:, None], keys // mask.block_k]
    allowed = chosen & (keys <= position)
    if window is not None:
        allowed &= keys > position - window
    return allowed
