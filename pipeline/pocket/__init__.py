"""The pocket model: a small Llama trained on a CPU that recalls far text, shipped with the code."""

from pathlib import Path
from typing import Any

import torch

POCKET_DIR: Path = Path(__file__).resolve().parent / "model"


class PocketError(RuntimeError):
    """The shipped model is missing; the message says how to make it."""


def load_pocket(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) from this package's folder, offline, safetensors only."""
    # Loading Transformers takes seconds, so it waits until somebody wants the model.
    from transformers import AutoTokenizer, LlamaForCausalLM

    if not (POCKET_DIR / "model.safetensors").is_file():
        raise PocketError(
            f"no model.safetensors in {POCKET_DIR}; "
            f"train it with `python -m sentei.pipeline.pocket.train --out {POCKET_DIR}`"
        )
    model = LlamaForCausalLM.from_pretrained(
        POCKET_DIR, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(POCKET_DIR, local_files_only=True)
    return model.eval(), tokenizer
