"""What a retrofit read, counted by call."""

import pytest

from sentei.kernels.hf.stats import LayerCall, RetrofitStats


def test_a_prompts_density_leaves_its_decode_steps_out() -> None:
    """Steps that run dense would hide how little of the prompt was read."""
    stats = RetrofitStats()
    assert stats.density() is None
    stats.add(LayerCall(0, 64, 30, "sparse", (0.1, 0.3)))
    stats.add(LayerCall(0, 1, 10, "dense", (1.0, 1.0)))

    assert stats.density() == pytest.approx((0.2 * 30 + 10) / 40)
    assert stats.density(least_tokens=2) == pytest.approx(0.2)
    assert stats.density(least_tokens=65) is None
