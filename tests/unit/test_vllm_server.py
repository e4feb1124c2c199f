"""What the vLLM engine does not take, said before anything is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sentei.serving.errors import ConfigError
from sentei.serving.vllm.server import refuse_windows


def test_a_model_with_sliding_windows_is_refused_by_name() -> None:
    """Its tokens differ from the built-in engine's, so nobody is served by it; other models pass."""
    windows = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])

    with pytest.raises(ConfigError, match=r"'gemma'.*engine: builtin"):
        refuse_windows(windows, "gemma")
    refuse_windows(SimpleNamespace(layer_types=["full_attention"]), "llama")
    refuse_windows(SimpleNamespace(), "older")
