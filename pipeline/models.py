"""Models by name: the pocket model, one from a PyPI package, a local folder, or a hub id."""

import hashlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sentei.kernels.hf.models import Fingerprint, find_family, fingerprint, pick_dtype, text_decoder
from sentei.pipeline.packaged import PACKAGED, ModelSourceError, convert_packaged, quiet_loading

POCKET = "pocket"


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
    """Load `pocket`, a packaged model, a checkpoint folder or a hub id; fp32 where bf16 is slow.

    The pocket model runs in fp32 unless asked otherwise: its demo's figures are to be the same everywhere.
    """
    wanted, dtype = dtype, dtype if dtype is not None else pick_dtype()
    if name == POCKET:
        model, tokenizer = import_module("sentei.pipeline.pocket").load_pocket(dtype=wanted or torch.float32)
    elif name in PACKAGED:
        model, tokenizer = _load_folder(convert_packaged(name), dtype)
    elif Path(name).expanduser().is_dir():
        model, tokenizer = _load_folder(Path(name).expanduser(), dtype)
    else:
        model, tokenizer = _load_from_hub(name, dtype)
    find_family(model)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, tokenizer, fingerprint(model, name))


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"{folder} has no .safetensors file; other formats can run code when loaded and are not read"
        )
    return _load_pretrained(str(folder), dtype, is_local=True)


def _load_from_hub(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        return _load_pretrained(name, dtype, is_local=is_offline)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "HF_HUB_OFFLINE is set; " if is_offline else ""
        raise ModelSourceError(
            f"model {name!r} is none of {', '.join((POCKET, *PACKAGED))}, not a folder, and could not be "
            f"loaded as a hub id ({reason}); {hint}check the name, or download the checkpoint and give its "
            "folder"
        ) from error


def _load_pretrained(source: str, dtype: torch.dtype, *, is_local: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, local_files_only=is_local, use_safetensors=True, trust_remote_code=False
        )
    return model, tokenizer
