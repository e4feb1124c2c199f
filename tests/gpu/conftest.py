"""Where the kernels' tests run: on a GPU, else in Triton's interpreter (TRITON_INTERPRET=1), else nowhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sentei.kernels.ops.registry import why_no_triton


@pytest.fixture(scope="session")
def device() -> str:
    """The device whose tensors the kernels take here."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_no_triton(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def nan_scratch() -> Iterator[None]:
    """Fill every fresh tensor with NaN, so that an unwritten place shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
