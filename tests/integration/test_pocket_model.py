"""The shipped pocket model recalls, and its tokenizer loses nothing."""

from typing import Any

import pytest
import torch

from sentei.pipeline.models import resolve_model
from sentei.pipeline.pocket.card import answer_greedily
from sentei.pipeline.tasks import MAKERS
from sentei.pipeline.tasks.notes import make_passkey
from sentei.pipeline.tasks.prompt import TaskName, is_correct

SEED = 70_000


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    """Load the shipped model once."""
    loaded = resolve_model("pocket")
    return loaded.model, loaded.tokenizer


@pytest.mark.parametrize(("name", "enough"), [("passkey", 8), ("key_value", 7)])
def test_recalls_at_2k_tokens(pocket: tuple[Any, Any], name: TaskName, enough: int) -> None:
    """Dense attention finds a far note again, wherever it lies in 2048 tokens."""
    model, tokenizer = pocket

    tasks = [
        MAKERS[name](tokenizer, prompt_tokens=2048, depth=(i + 0.5) / 8, seed=SEED + i) for i in range(8)
    ]

    assert sum(answer_greedily(model, tokenizer, task) for task in tasks) >= enough


def test_chat_and_generate_answer_a_passkey(pocket: tuple[Any, Any]) -> None:
    """The same holds through the chat template and step-by-step decoding, and the answer ends by itself."""
    model, tokenizer = pocket
    task = make_passkey(tokenizer, prompt_tokens=512, depth=0.4, seed=SEED)

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": task.prompt}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.inference_mode():
        out = model.generate(**chat, max_new_tokens=8, do_sample=False)
    ids = out[0, chat["input_ids"].shape[1] :].tolist()

    assert is_correct(task, tokenizer.decode(ids, skip_special_tokens=True))
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    ["", "plain words", "  tabs\t\r\n\n  end ", "héé 漢字 🎉 \x00\x7f", "can 't , won't .", "12345 0x1f"],
)
def test_tokenizer_loses_nothing(pocket: tuple[Any, Any], text: str) -> None:
    """Any text comes back from the tokenizer as it went in."""
    _, tokenizer = pocket

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_weights_are_small_and_positions_many(pocket: tuple[Any, Any]) -> None:
    """The model stays a few megabytes and accepts 16384 positions."""
    model, tokenizer = pocket

    assert sum(p.numel() for p in model.parameters()) < 6_000_000
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 16_384
