"""What a request gets that names nothing: the model's generation_config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from sentei.serving.engine.request import NEUTRAL, Sampling
from sentei.serving.replica.loading import default_sampling


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, NEUTRAL),
        (GenerationConfig(), NEUTRAL),
        (GenerationConfig(do_sample=True), Sampling(temperature=1.0)),
        (
            GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
            Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
        ),
        (GenerationConfig(repetition_penalty=1.1), Sampling(repetition_penalty=1.1)),
    ],
)
def test_defaults_are_those_of_generate(config: Any, expected: Sampling) -> None:
    """Greedy unless the config says do_sample, and then what it names; what it does not name is neutral."""
    assert default_sampling(config) == expected
