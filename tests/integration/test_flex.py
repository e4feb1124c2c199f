"""With the real C++ compiler: flex answers to the definition, and one program serves every length.

Not among the unit tests, as compiling waits for other processes; tests/unit/test_flex.py has what needs none.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from sentei.kernels.ops import flex
from sentei.kernels.ops.attention import attend, dense_attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.reference import attend_reference, token_mask
from sentei.kernels.ops.registry import why_no_compiler
from sentei.kernels.ops.rules import Softmax
from sentei.kernels.ops.tolerances import ERROR_FLOOR, allowed_error
from tests.strategies_masks import random_mask

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.timeout(600),  # the first compile on a cold, busy machine
    # torch 2.13 imports modules of its own that it has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def make_qkv(q_len: int, past: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random q with 4 heads, k and v with 2, of one head size, so that few programs are compiled."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((4, q_len), (2, past + q_len), (2, past + q_len))
    return [torch.randn(1, heads, length, 32, generator=generator).to(dtype) for heads, length in sizes]


@pytest.mark.parametrize(
    ("q_len", "past"), [(63, 0), (65, 0), (111, 0), (1000, 0), (64, 0), (17, 300), (100, 311)]
)
@pytest.mark.parametrize("window", [None, 50, 512])
def test_output_equals_the_definition(q_len: int, past: int, window: int | None) -> None:
    """Awkward lengths, chunks with a past, and windows agree with the reference."""
    q, k, v = make_qkv(q_len, past)
    mask = random_mask(2, q_len, q_offset=past)

    out, lse = attend(q, k, v, mask, window=window, backend="flex")

    exact, _ = attend_reference(q, k, v, mask, Softmax(32**-0.5, window))
    assert lse is None
    assert float((out - exact).abs().max()) < ERROR_FLOOR[torch.float32]


def test_lengths_do_not_recompile() -> None:
    """After the first call of a signature no length, offset or window compiles anything."""
    attend(*make_qkv(100), random_mask(2, 100), backend="flex")
    programs, graphs = flex.num_programs(), counters["stats"]["unique_graphs"]

    for q_len, past in (
        (2, 0),
        (63, 0),
        (64, 0),
        (128, 0),
        (129, 0),
        (300, 0),
        (64, 64),
        (200, 1),
        (640, 640),
    ):
        attend(
            *make_qkv(q_len, past), random_mask(2, q_len, q_offset=past), window=past or None, backend="flex"
        )

    assert flex.num_programs() == programs
    assert counters["stats"]["unique_graphs"] == graphs


def test_nothing_selected_gives_zeros() -> None:
    """Rows without a block give zeros, never NaN."""
    mask = BlockMask.from_dense(torch.zeros(1, 2, 2, 2, dtype=torch.bool), q_len=100, kv_len=100)

    out, _ = attend(*make_qkv(100), mask, backend="flex")

    assert not out.any()


def test_low_precision_error_is_at_most_twice_torchs_own() -> None:
    """bf16 inputs may lose at most twice what torch's own operator loses against fp32."""
    q, k, v = make_qkv(111, dtype=torch.bfloat16)
    mask = random_mask(2, 111, share=1.0)
    allowed = token_mask(mask.to_dense()[0, 0], mask, None)

    out, _ = attend(q, k, v, mask, backend="flex")

    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    exact, _ = attend_reference(q.float(), k.float(), v.float(), mask, Softmax(32**-0.5))
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).abs().max()) <= allowed_error(plain, exact)


def test_a_worker_thread_compiles_and_keeps_gradients_out() -> None:
    """A thread beside the main one, tensors that want gradients, heads in another memory order."""
    q, k, v = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in make_qkv(150)
    )
    results: list[torch.Tensor] = []

    thread = threading.Thread(target=lambda: results.append(dense_attend(q, k, v, window=60, backend="flex")))
    thread.start()
    thread.join()

    exact, _ = attend_reference(q, k, v, BlockMask.causal(150), Softmax(32**-0.5, 60))
    assert not results[0].requires_grad
    assert float((results[0] - exact.detach()).abs().max()) < ERROR_FLOOR[torch.float32]
