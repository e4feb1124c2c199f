"""The versions of Transformers that the retrofit was verified on, and the one word in which they differ."""

import inspect
from typing import Any

import transformers
from transformers.models.llama.modeling_llama import LlamaModel

from sentei.kernels.hf.models import ModelError

OLDEST, NEWEST = (5, 16), (5, 24)  # vLLM 0.32 takes 5.16 to 5.19


def check_transformers(version: str) -> None:
    """Raise ModelError for a version whose attention interface was not verified."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        low, high = (".".join(map(str, edge)) for edge in (OLDEST, NEWEST))
        raise ModelError(
            f"transformers {version} is installed; the retrofit is verified on {low} to {high}: "
            f"another one may give wrong tokens without an error; install transformers {high}"
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return a KV cache as the keyword argument by which the installed version takes it.

    A model swallows the other version's word in silence, and answers as if there were no past.
    """
    return {CACHE_KEYWORD: cache}


def _cache_keyword() -> str:
    known = inspect.signature(LlamaModel.forward).parameters
    found = [name for name in ("cache", "past_key_values") if name in known]
    if len(found) != 1:
        raise ModelError(
            f"transformers {transformers.__version__}: a decoder's forward takes {sorted(known)}, "
            "of which not exactly one is 'cache' or 'past_key_values'; install a verified version"
        )
    return found[0]


check_transformers(transformers.__version__)
CACHE_KEYWORD = _cache_keyword()
