"""The definition in fp64, written apart from the package: nothing of its masks or lists is used here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR, ERROR_RATIO_MAX

from .plan import Line, WrongAnswerError


def allowed_keys(
    blocks: Tensor, positions: Tensor, kv_len: int, *, block_q: int, block_k: int, window: int | None
) -> Tensor:
    """Which keys each row may read, bool [B, H, Tq, Tk]: its blocks [B, H, Q, Kb], no later key, the window.

    `positions` [Tq] or [B, 1, Tq].
    """
    rows = positions.shape[-1]
    spread = blocks.repeat_interleave(block_q, 2)[:, :, :rows].repeat_interleave(block_k, 3)[..., :kv_len]
    key = torch.arange(kv_len, device=blocks.device)
    allowed = spread & (key <= positions[..., None])
    if window is not None:
        allowed = allowed & (key > positions[..., None] - window)
    return allowed


def attend_in(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, how: Softmax
) -> tuple[Tensor, Tensor]:
    """Plain attention in one precision: (out [B, Hq, Tq, Dv], lse [B, Hq, Tq]); rows without a key give 0."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
    scores = (q @ k.mT) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    wide = scores if dtype == torch.float64 else scores.float()
    wide = wide.masked_fill(~allowed, -torch.inf)
    lse = wide.logsumexp(-1)
    if how.sinks is not None:
        lse = torch.logaddexp(lse, how.sinks.to(lse.dtype)[:, None].expand_as(lse))
    weights = torch.exp(wide - lse.clamp(min=torch.finfo(torch.float32).min)[..., None])
    return weights.to(dtype) @ v, lse


def torchs_own(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, how: Softmax) -> Tensor:
    """What torch gives in the tensors' own precision: SDPA, or plain operations for what it has not."""
    if how.softcap is not None or how.sinks is not None or not bool(allowed.any(-1).all()):
        return attend_in(q.dtype, q, k, v, allowed, how)[0]
    mask = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)


def compare(what: str, got: Tensor, own: Tensor, exact: Tensor, floor: float | None = None) -> Line:
    """At most twice as far from fp64 as torch's own, plus a floor; NaN or a missing infinity is wrong."""
    if got.shape != exact.shape:
        raise WrongAnswerError(f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    is_odd = got.isnan() | (got.isinf() != exact.isinf())
    if bool(is_odd.any()):
        where = f"{int(is_odd.sum())} of {got.numel()} places"
        raise WrongAnswerError(f"{what}: {where} are NaN or wrongly infinite")
    finite = exact.isfinite()
    error, own_error = (_worst(part, exact, finite) for part in (got, own))
    allowed = ERROR_RATIO_MAX * own_error + (ERROR_FLOOR[got.dtype] if floor is None else floor)
    if not error <= allowed:
        bounds = f"allowed {allowed:.2e} (torch's own {own_error:.2e})"
        raise WrongAnswerError(f"{what}: error {error:.2e}, {bounds}")
    return Line(what, note=f"error {error:.1e} of {allowed:.1e}; torch's own {own_error:.1e}")


def compare_lse(got: Tensor, own: Tensor, exact: Tensor) -> Line:
    """The same for an LSE in fp32, whose roundings are as large as it is."""
    size = float(exact[exact.isfinite()].abs().max()) if bool(exact.isfinite().any()) else 1.0
    return compare("lse", got, own, exact, ERROR_FLOOR[torch.float32] * max(1.0, size))


def _worst(part: Tensor, exact: Tensor, finite: Tensor) -> float:
    gap = (part.double() - exact)[finite].abs()
    return float(gap.max()) if gap.numel() else 0.0
