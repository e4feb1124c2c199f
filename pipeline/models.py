"""Models by name: the pocket model, one from a PyPI package, a local folder, or a hub id."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sentei.kernels.hf.models import Fingerprint, find_family, fingerprint, text_decoder
from sentei.kernels.placement import Placement, place, read_hardware
from sentei.pipeline.packaged import PACKAGED, ModelSourceError, convert_packaged, quiet_loading

POCKET = "pocket"
POCKET_DIR = Path(__file__).resolve().parent / "pocket" / "model"


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

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where tokens must be to be run."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def last_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Run tokens [T] without a cache; the last layer's states [T, hidden], on the model's device."""
        output = text_decoder(self.model)(input_ids=ids[None].to(self.device), use_cache=False)
        states: torch.Tensor = output.last_hidden_state[0]
        return states


def place_model(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Placement:
    """Decide where a model goes and in which precision; DeviceError where the device is not there.

    The pocket model runs in fp32 unless asked otherwise: its demo's figures are to be the same everywhere.
    """
    return place(read_hardware(), device, dtype, usual=torch.float32 if name == POCKET else None)


def resolve_model(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """Load `pocket`, `gemma-3-270m`, a checkpoint folder or a hub id; fp32 where bf16 is slow.

    `device` is auto, cpu or cuda. Weights go from their file to the device, piece by piece.
    """
    placement = place_model(name, dtype=dtype, device=device)
    options: dict[str, Any] = {"dtype": placement.dtype, "use_safetensors": True}
    if placement.device.type != "cpu":
        options["device_map"] = {"": placement.device}  # accelerate puts each weight there as it is read
    model = _load_pretrained("AutoModelForCausalLM", name, **options)
    find_family(model)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, load_tokenizer(name), fingerprint(model, name))


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone; no weights are read."""
    return _load_pretrained("AutoTokenizer", name)


def checkpoint_source(name: str) -> str:
    """Return the folder of a model's checkpoint, for an engine that reads it itself; a hub id stays one."""
    folder = _find_folder(name)
    return name if folder is None else str(folder)


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
                f"model {name!r} is none of {', '.join((POCKET, *PACKAGED))}, not a folder "
                f"({Path(name).expanduser().absolute()}), and could not be loaded as a hub id ({reason}); "
                f"{hint}check the name, or download the checkpoint and give its folder"
            ) from error


def is_packaged(name: str) -> bool:
    """Whether a name means a model of ours or of a package, whatever folders there are."""
    return name == POCKET or name in PACKAGED


def _find_folder(name: str) -> Path | None:
    """Return the checkpoint folder that a name means, checked; None for a hub id."""
    if name in PACKAGED:
        return convert_packaged(name)
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
