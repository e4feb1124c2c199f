"""Where the attention goes: the exact mass of each key block, row by row, and the mass a selection drops."""

from __future__ import annotations

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.errors import BackendError, ShapeError
from sentei.kernels.ops.registry import is_native_usable, why_no_triton

# Scores held at once per KV head: 64 MiB in fp32.
_SCORES_MAX = 16 * 2**20


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    block_k: int,
    rows: Tensor | None = None,
    q_offset: int = 0,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact causal attention mass per key block in fp32: (lse [B, Hq, R], mass [B, Hq, R, Kb]).

    q [B, Hq, Tq, D], k [B, Hkv, Tk, D]. `rows` [R] int64 samples query rows, in any order; None takes all.
    A row's mass sums to 1. Memory beyond the result stays below about 200 MiB, whatever the length; Triton
    needs none. `backend` is auto, triton or torch; auto takes triton on a GPU.
    """
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if q_heads % kv_heads or q_offset + q_len > kv_len:
        raise ShapeError(f"q {tuple(q.shape)} at offset {q_offset} does not fit k {tuple(k.shape)}")
    if backend not in ("auto", "triton", "torch"):
        raise BackendError(f"backend {backend!r} is unknown; choose auto, triton, torch")
    rows = torch.arange(q_len, device=q.device) if rows is None else rows
    refusal = why_no_triton(q.device.type)
    if backend == "triton" and refusal is not None:
        raise BackendError(f"backend 'triton' refuses: {refusal}; backend='auto' picks another")
    if backend == "triton" or (backend == "auto" and q.is_cuda and refusal is None):
        from sentei.kernels.ops.triton.mass import block_mass_triton

        with torch.no_grad():
            return block_mass_triton(
                q, k, rows, scale=scale, block_k=block_k, q_offset=q_offset, window=window
            )
    if backend == "auto" and is_native_usable(q.device.type, block_k):
        return _block_mass_native(q, k, rows, scale, block_k, q_offset, window)
    group = q_heads // kv_heads
    lse = torch.empty(batch, q_heads, rows.numel(), device=q.device)
    mass = torch.zeros(batch, q_heads, rows.numel(), num_blocks(kv_len, block_k), device=q.device)
    step = max(1, _SCORES_MAX // (group * kv_len))
    with torch.no_grad():
        for b in range(batch):
            for h_kv in range(kv_heads):
                heads = slice(h_kv * group, (h_kv + 1) * group)
                keys = k[b, h_kv].float()
                for start in range(0, rows.numel(), step):
                    part = slice(start, start + step)
                    queries = q[b, heads].index_select(1, rows[part]).float() * scale
                    position = q_offset + rows[part]
                    row_lse, row_mass = _mass_of_rows(queries, keys, position, block_k, window)
                    lse[b, heads, part] = row_lse
                    mass[b, heads, part, : row_mass.shape[-1]] = row_mass
    return lse, mass


def _block_mass_native(
    q: Tensor, k: Tensor, rows: Tensor, scale: float, block_k: int, q_offset: int, window: int | None
) -> tuple[Tensor, Tensor]:
    from sentei.kernels.ops.native.calls import block_mass_native

    parts = [
        block_mass_native(
            q[b].index_select(1, rows), k[b], q_offset + rows, scale=scale, block_k=block_k, window=window
        )
        for b in range(q.shape[0])
    ]
    return torch.stack([lse for lse, _ in parts]), torch.stack([mass for _, mass in parts])


def dropped_mass(lse_sparse: Tensor, lse_dense: Tensor) -> Tensor:
    """The share of a row's attention that a selection drops, in [0, 1]: 1 - exp(lse_sparse - lse_dense)."""
    return (-torch.expm1((lse_sparse - lse_dense).clamp(max=0.0))).clamp(0.0, 1.0)


def _mass_of_rows(
    queries: Tensor, keys: Tensor, position: Tensor, block_k: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Scaled queries [G, R, D] against one head's keys: (lse [G, R], mass [G, R, blocks so far])."""
    end = min(num_blocks(int(position.max()) + 1, block_k) * block_k, keys.shape[0])
    scores = queries @ keys[:end].T
    index = torch.arange(end, device=keys.device)
    hidden = index > position[:, None]
    if window is not None:
        hidden |= index <= position[:, None] - window
    scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    overhang = -end % block_k
    if overhang:
        weights = torch.nn.functional.pad(weights, (0, overhang))
    return lse, weights.view(*weights.shape[:-1], -1, block_k).sum(-1)
