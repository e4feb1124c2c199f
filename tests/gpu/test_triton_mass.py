"""Triton's block mass is the softmax summed by block, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.kernels.ops.block_mass import block_mass
from sentei.kernels.ops.tolerances import ERROR_FLOOR, MASS_SUM_ATOL
from tests.strategies_attention import make_qkv

pytestmark = pytest.mark.gpu


def compare(q: torch.Tensor, k: torch.Tensor, **options: object) -> None:
    """LSE and mass are those of the plain fp32 computation, and a row's masses sum to 1."""
    scale = q.shape[-1] ** -0.5
    lse, mass = block_mass(q, k, scale=scale, backend="triton", **options)  # type: ignore[arg-type]
    exact_lse, exact = block_mass(q.float(), k.float(), scale=scale, backend="torch", **options)  # type: ignore[arg-type]

    assert torch.allclose(lse, exact_lse, rtol=0, atol=2 * ERROR_FLOOR[torch.float32])
    assert torch.allclose(mass, exact, rtol=0, atol=MASS_SUM_ATOL)
    assert torch.allclose(mass.sum(-1), torch.ones_like(lse), atol=MASS_SUM_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("q_len", "past", "dim", "heads", "block", "window"),
    [
        (1, 0, 60, (2, 1), 64, None),
        (65, 0, 32, (6, 2), 64, None),
        (111, 90, 128, (2, 2), 16, None),
        (111, 0, 64, (4, 1), 48, 30),
        (200, 55, 256, (1, 1), 128, None),
    ],
)
def test_mass_equals_softmax_summed_by_block(
    q_len: int,
    past: int,
    dim: int,
    heads: tuple[int, int],
    block: int,
    window: int | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Awkward lengths, head sizes, groups and windows agree; bf16 inputs lose nothing more."""
    q, k, _ = make_qkv(q_len, past, heads=heads, dim=dim, device=device, dtype=dtype)

    compare(q, k, block_k=block, q_offset=past, window=window)


@settings(max_examples=5)
@given(
    rows=st.lists(st.integers(0, 149), min_size=1, max_size=40),
    window=st.none() | st.integers(1, 200),
    block=st.sampled_from([16, 32, 64, 128]),
)
def test_sampled_rows_in_any_order_agree(
    device: str, rows: list[int], window: int | None, block: int
) -> None:
    """Rows may be sampled in any order, and twice."""
    q, k, _ = make_qkv(150, 33, heads=(4, 2), device=device)

    compare(q, k, block_k=block, q_offset=33, window=window, rows=torch.tensor(rows, device=device))


def test_keys_ahead_of_every_row_are_never_touched(device: str) -> None:
    """NaN past the sampled rows' positions does not reach the result."""
    q, k, _ = make_qkv(200, device=device)
    k[:, :, 128:] = torch.nan

    rows = torch.tensor([127, 0, 64], device=device)
    lse, mass = block_mass(q, k, scale=0.3, block_k=64, rows=rows, backend="triton")

    assert bool(lse.isfinite().all())
    assert bool(mass.isfinite().all())
