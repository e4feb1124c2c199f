"""A variant's model, with its retrofit, and the faults that a drill plants in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sentei.serving.engine.request import NEUTRAL, Sampling
from sentei.serving.errors import ConfigError
from sentei.serving.settings import VariantOptions


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model ready to run, with what the wire and the engine must know about it."""

    model: Any
    fingerprint: str
    max_context_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    tokenizer: Any
    sampling: Sampling = NEUTRAL


def load_served_model(options: VariantOptions, *, to_read: bool = False) -> ServedModel:
    """Load a variant's model onto its device; `to_read`, for another engine to run, onto the CPU."""
    import torch

    from sentei.kernels.hf.models import end_tokens
    from sentei.pipeline.models import place_model, resolve_model

    # Asked for, not cast: values that were rounded to bf16 on the way stay rounded.
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    placement = place_model(options.model, dtype=dtype, device=options.device)
    device = "cpu" if to_read else options.device
    loaded = resolve_model(options.model, dtype=placement.dtype, device=device)
    model = loaded.model
    config = model.config.get_text_config()
    return ServedModel(
        model=model,
        fingerprint=loaded.fingerprint.weights_sha256[:16],
        max_context_tokens=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_ids=tuple(sorted(end_tokens(model, loaded.tokenizer))),
        tokenizer=loaded.tokenizer,
        sampling=default_sampling(getattr(model, "generation_config", None)),
    )


def default_sampling(config: Any) -> Sampling:
    """Return what Transformers' `generate` does by itself: greedy, unless the config says `do_sample`."""

    def named(field: str, neutral: Any) -> Any:
        value = getattr(config, field, None)
        return neutral if value is None else value

    penalty = float(named("repetition_penalty", 1.0))
    if not named("do_sample", False):
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=float(named("temperature", 1.0)),
        top_p=float(named("top_p", 1.0)),
        top_k=int(named("top_k", 0)) or None,
        min_p=float(named("min_p", 0.0)),
        repetition_penalty=penalty,
    )


def attach_retrofit(model: Any, options: VariantOptions) -> Any:
    """Put the sparse path, or our compiled dense one, on a model; None where it runs as it is."""
    if options.variant == "dense" and options.attention == "sdpa":
        return None
    from sentei.kernels.hf.adapter import load_adapter
    from sentei.kernels.hf.retrofit import attach

    adapter = load_adapter(options.adapter, model) if options.adapter is not None else None
    if options.variant == "sparse" and adapter is None:
        raise ConfigError(
            "variant 'sparse' has no adapter; give `adapter`, a folder made by `sentei distill`"
        )
    return attach(model, adapter, base=options.attention)


def artifact_digest(adapter_digest: str, numerics: str, model: Any) -> str:
    """Return what a sparse replica runs as one digest: model, adapter and ladder, engine and precision.

    `numerics` is the engine's name and the version of what it computes, not of its release.
    """
    if not adapter_digest:
        return ""
    parts = (adapter_digest, numerics, str(model.dtype).removeprefix("torch."))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def make_fault(fault: dict[str, Any] | None) -> Any:
    """Turn a fault's fields into the type that the scorer understands; None stays None."""
    if fault is None:
        return None
    from sentei.kernels.scorer.faults import Fault

    try:
        return Fault(**fault)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"fault is {fault!r}: {error}; its fields are kind and past_tokens") from error
