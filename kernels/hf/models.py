"""Which Hugging Face decoders can be retrofitted, and where their attention layers are.

RetrofitError
├── ModelError      the model, its cache or its padding is not supported
└── AdapterError    an adapter folder is broken, or belongs to another model
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sentei.errors import SenteiError
from sentei.kernels.scorer.features import RotaryTable


class RetrofitError(SenteiError, RuntimeError):
    """Base of what goes wrong between Sentei and a Hugging Face model."""


class ModelError(RetrofitError):
    """A model, cache or padding that is not supported; the message names what is."""


class AdapterError(RetrofitError):
    """An adapter folder that is broken, or that belongs to another model."""


@dataclass(frozen=True, slots=True)
class SupportedFamily:
    """One family of decoders whose attention goes through Transformers' attention interface."""

    name: str
    model_types: tuple[str, ...]
    rotary_takes_layer_type: bool = False


SUPPORTED_FAMILIES = (
    SupportedFamily("Llama", ("llama",)),
    SupportedFamily("Qwen2", ("qwen2",)),
    SupportedFamily("Qwen3", ("qwen3",)),
    SupportedFamily("Mistral", ("mistral",)),
    SupportedFamily("Gemma 3", ("gemma3_text", "gemma3"), rotary_takes_layer_type=True),
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One attention layer that can be thinned: it sees the whole context."""

    index: int
    module: nn.Module
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Who a model is: sampled weights, the configuration that shapes it, and its name for messages."""

    name: str
    weights_sha256: str
    config_sha256: str


def find_family(model: nn.Module) -> SupportedFamily:
    """Return the model's family, or raise ModelError that names the supported ones."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in SUPPORTED_FAMILIES:
        if model_type in family.model_types:
            return family
    names = ", ".join(family.name for family in SUPPORTED_FAMILIES)
    raise ModelError(f"model type {model_type!r} is not supported; supported families are {names}")


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the module that holds `layers` and `rotary_emb`."""
    find_family(model)
    inner = getattr(model, "model", model)
    inner = getattr(inner, "language_model", inner)
    if not (hasattr(inner, "layers") and hasattr(inner, "rotary_emb")):
        raise ModelError(
            f"{type(model).__name__} has no decoder layers where they are expected; "
            "pass the causal language model, not a part of it"
        )
    return inner


def attention_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield (layer index, attention module) for every decoder layer."""
    for index, layer in enumerate(text_decoder(model).layers):  # type: ignore[arg-type]
        yield index, layer.self_attn


def thinnable_layers(model: nn.Module) -> tuple[LayerInfo, ...]:
    """Return the layers with full attention; layers with a sliding window are left alone."""
    config = _text_config(model)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ModelError(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}; only models without it are supported"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("use_bidirectional_attention is set; only causal decoders are supported")
    layers = tuple(
        LayerInfo(
            index=index,
            module=module,
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=int(module.head_dim),  # type: ignore[arg-type]
            scale=float(module.scaling),  # type: ignore[arg-type]
        )
        for index, module in attention_modules(model)
        if layer_window(config, index) is None
    )
    if not layers:
        raise ModelError(
            f"every layer of this {config.model_type!r} model has a sliding window of "
            f"{config.sliding_window} tokens; there is no full attention to thin"
        )
    return layers


def layer_window(config: Any, index: int) -> int | None:
    """Return the sliding window of a layer in tokens, or None where it sees everything."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return int(config.sliding_window) if kinds[index] == "sliding_attention" else None
    window = getattr(config, "sliding_window", None)
    return int(window) if window is not None else None


def rotary_table(model: nn.Module, length: int, device: torch.device | str = "cpu") -> RotaryTable:
    """Return cosines and sines, in fp32, of the full-attention layers in a text of `length` tokens.

    A copy is asked: dynamic types (NTK, LongRoPE) keep the longest text that they were called for.
    """
    rotary: Any = copy.deepcopy(text_decoder(model).rotary_emb)
    positions = torch.arange(length, device=device)[None]
    example = torch.empty(0, dtype=torch.float32, device=device)
    extra = {"layer_type": "full_attention"} if find_family(model).rotary_takes_layer_type else {}
    cos, sin = rotary(example, position_ids=positions, **extra)
    return RotaryTable(cos[0].float(), sin[0].float())


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends an answer: both of a model's configs and the tokenizer may name some."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        named = getattr(source, "eos_token_id", None)
        found.update([named] if isinstance(named, int) else named or ())
    return frozenset(found)


def fingerprint(model: nn.Module, name: str) -> Fingerprint:
    """Identify a model by up to 4096 evenly spaced values of each weight, taken in bf16.

    Any fine-tune or other quantisation changes them; loading in another precision does not.
    """
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        sample = flat[::step].to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return Fingerprint(name, digest.hexdigest(), _config_sha256(model))


def _text_config(model: nn.Module) -> Any:
    find_family(model)
    return model.config.get_text_config()  # type: ignore[union-attr, operator]


def _config_sha256(model: nn.Module) -> str:
    config = _text_config(model).to_dict()
    shape = {k: v for k, v in config.items() if not k.startswith("_") and k not in _CONFIG_NOISE}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()


# Says how a model was loaded or stored, not what it computes.
_CONFIG_NOISE = frozenset({"dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"})
