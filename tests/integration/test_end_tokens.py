"""The tokens that end an answer: one definition for what is measured and what is served."""

from types import SimpleNamespace
from typing import Any

import pytest

from sentei.kernels.hf.models import end_tokens
from tests.fakes_models import make_llama


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([1, 106], 1, 1, {1, 106}),
        (None, [5, 6], None, {5, 6}),
        (None, None, 7, {7}),
        (0, None, None, {0}),
        (None, None, None, set()),
    ],
)
def test_every_source_may_name_tokens_that_end_an_answer(
    generation: Any, config: Any, tokenizer: Any, expected: set[int]
) -> None:
    """Both configs and the tokenizer count; none of them naming any is no error."""
    model = make_llama()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config

    found = end_tokens(model, SimpleNamespace(eos_token_id=tokenizer))

    assert found == expected
