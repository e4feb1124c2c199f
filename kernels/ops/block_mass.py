"""Where the attention goes: the exact mass of each key block, row by row, and the mass a selection drops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.errors import ShapeError
from sentei.kernels.ops.registry import is_native_usable, takes_triton

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
    q_len = q.shape[2]
    if q.shape[1] % k.shape[1] or q_offset + q_len > k.shape[2]:
        raise ShapeError(f"q {tuple(q.shape)} at offset {q_offset} does not fit k {tuple(k.shape)}")
    rows = torch.arange(q_len, device=q.device) if rows is None else rows
    if takes_triton(backend, q.device):
        from sentei.kernels.ops.triton.mass import block_mass_triton

        with torch.no_grad():
            return block_mass_triton(
                q, k, rows, scale=scale, block_k=block_k, q_offset=q_offset, window=window
            )
    if backend == "auto" and is_native_usable(q.device.type, block_k):
        return _mass_native(q, k, rows, scale=scale, block_k=block_k, q_offset=q_offset, window=window)
    return _mass_torch(q, k, rows, scale=scale, block_k=block_k, q_offset=q_offset, window=window)


def _mass_native(
    q: Tensor, k: Tensor, rows: Tensor, *, scale: float, block_k: int, q_offset: int, window: int | None
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


@torch.no_grad()
def _mass_torch(
    q: Tensor, k: Tensor, rows: Tensor, *, scale: float, block_k: int, q_offset: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """The definition, a few rows of one KV head's queries at a time."""
    group = q.shape[1] // k.shape[1]
    lse = torch.empty(*q.shape[:2], rows.numel(), device=q.device)
    mass = torch.zeros(*lse.shape, num_blocks(k.shape[2], block_k), device=q.device)
    step = max(1, _SCORES_MAX // (group * k.shape[2]))
    for b, h_kv in itertools.product(range(k.shape[0]), range(k.shape[1])):
        heads = slice(h_kv * group, (h_kv + 1) * group)
        keys = k[b, h_kv].float()
        for start in range(0, rows.numel(), step):
            part = slice(start, start + step)
            queries = q[b, heads].index_select(1, rows[part]).float() * scale
            row_lse, row_mass = _mass_of_rows(queries, keys, q_offset + rows[part], block_k, window)
            lse[b, heads, part] = row_lse
            mass[b, heads, part, : row_mass.shape[-1]] = row_mass
    return lse, mass


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
