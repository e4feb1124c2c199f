"""What a variant and the ingress load: the precision asked for, and a tokenizer without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.pipeline import models
from sentei.pipeline.models import load_tokenizer
from sentei.serving.errors import ConfigError
from sentei.serving.loading import load_served_model, make_fault
from sentei.serving.settings import VariantOptions
from tests.fakes_models import make_llama, save_byte_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Any]:
    """A tiny model in fp32, whose weights bf16 cannot hold."""
    model = make_llama()
    model.save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_precision_is_asked_for_and_not_cast_to(
    checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """Where bf16 is the machine's own choice, fp32 weights that were asked for are still the checkpoint's."""
    folder, model = checkpoint
    monkeypatch.setattr(models, "pick_dtype", lambda: torch.bfloat16)

    served = load_served_model(VariantOptions(model=str(folder), variant="dense", dtype=dtype))

    found, saved = served.model.state_dict(), model.state_dict()
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    assert all(torch.equal(found[name], value.to(expected)) for name, value in saved.items())
    assert {value.dtype for value in found.values()} == {expected}


def test_tokenizer_comes_without_the_weights(checkpoint: tuple[Path, Any]) -> None:
    """The ingress holds no model: weights that cannot be read do not matter to it."""
    folder, _ = checkpoint
    (folder / "model.safetensors").write_bytes(b"not weights")

    tokenizer = load_tokenizer(str(folder))

    assert tokenizer.decode(tokenizer.encode("any text")) == "any text"


@pytest.mark.parametrize("fault", [{"kind": "pooled_keys_gone"}, {"past_tokens": -1}, {"knid": "x"}])
def test_fault_that_is_none_is_refused(fault: dict[str, Any]) -> None:
    """Unknown kinds, impossible values and unknown fields are errors of the one who asked."""
    with pytest.raises(ConfigError, match="fault is"):
        make_fault(fault)
