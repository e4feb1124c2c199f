"""Weights on their way to a GPU that is none: each once, and none through a whole model on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sentei.kernels.hf.adapter import load_adapter, save_adapter
from sentei.kernels.placement import Hardware
from sentei.pipeline import models
from sentei.pipeline.models import resolve_model
from tests.card.models import MAKERS, make_adapter
from tests.card.pretend import CARD, PretendCard
from tests.fakes_models import save_byte_tokenizer

GPU = Hardware("2.13.0", "CUDA", ("pretended",), has_gpu_bf16=True)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
@pytest.mark.parametrize("family", MAKERS)
def test_weights_go_straight_to_the_card(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, asked: str
) -> None:
    """As many uploads as weights, each as it is read from the file; scorers follow the model."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the card is there in this thread alone
    monkeypatch.setattr(models, "read_hardware", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    model = MAKERS[family]()
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    save_adapter(make_adapter(model), tmp_path / "adapter")

    with card.counting() as waits:
        loaded = resolve_model(str(tmp_path / "model"), device=asked, dtype=torch.float32)

    uploads = Counter(waits.places("upload"))
    num_weights = len(list(loaded.model.parameters()))
    assert uploads.pop("transformers/core_model_loading.py:_materialize_copy") == num_weights
    assert set(uploads) <= {"transformers/initialization.py:copy_"}  # rotary frequencies are in no file
    assert set(waits.places("read")) == {"kernels/hf/models.py:fingerprint"}
    assert {part.device for part in (*loaded.model.parameters(), *loaded.model.buffers())} == {CARD}
    adapter = load_adapter(tmp_path / "adapter", loaded.model)
    assert {scorer.query_map.device for scorer in adapter.scorers.values()} == {CARD}
