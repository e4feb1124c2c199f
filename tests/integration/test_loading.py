"""What a variant and the ingress load: the precision asked for, and a tokenizer without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import new_adapter, save_adapter
from sentei.kernels.placement import Hardware
from sentei.pipeline import models
from sentei.pipeline.models import load_tokenizer
from sentei.serving.engine.request import EngineRequest, ScoreRequest
from sentei.serving.errors import ConfigError, WrongArtifactError
from sentei.serving.replica.loading import artifact_digest, load_served_model, make_fault
from sentei.serving.replica.variant import ModelServer
from sentei.serving.settings import VariantOptions
from tests.fakes_models import make_llama, save_byte_tokenizer
from tests.trial_ladders import uncalibrated_ladder


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
    monkeypatch.setattr(models, "read_hardware", lambda: Hardware("2.13.0", None, has_cpu_bf16=True))

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


def test_artifact_is_all_that_can_change_what_is_computed() -> None:
    """Adapter, engine's numerics and precision each make another digest; without an adapter there is none."""
    model = make_llama()
    found = {
        artifact_digest(adapter, numerics, kept)
        for adapter, numerics, kept in (
            ("a", "builtin/1", model),
            ("b", "builtin/1", model),
            ("a", "builtin/2", model),
            ("a", "builtin/1", make_llama().to(torch.bfloat16)),
        )
    }

    assert len(found) == 4
    assert artifact_digest("", "builtin/1", model) == ""


async def test_replica_serves_and_scores_only_as_the_artifact_that_is_wanted(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """A request bound to another artifact is refused by the replica itself."""
    folder, model = checkpoint
    adapter = new_adapter(model, "tiny", rank=4)
    save_adapter(adapter.with_ladder(uncalibrated_ladder(adapter, {"mild": 1e-3})), tmp_path / "adapter")
    options = VariantOptions(model=str(folder), variant="sparse", adapter=str(tmp_path / "adapter"))
    server = ModelServer(options)
    wanted = (await server.describe()).artifact
    replay = ScoreRequest("a", (1, 2, 3, 4), 2, "mild", artifact=wanted)

    scored = await server.score(replay)
    with pytest.raises(WrongArtifactError, match="another is wanted"):
        await server.score(replace(replay, artifact="another"))
    with pytest.raises(WrongArtifactError):
        await anext(server.generate(EngineRequest("b", (1, 2), 2, "mild", artifact="another")))
    server._engine.stop()

    assert (len(wanted), scored.artifact) == (64, wanted)
