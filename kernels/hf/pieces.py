"""A prompt's forward pass in pieces: what a piece makes on its way fits into the processor's caches.

Over a whole prompt temporary tensors are tens of megabytes, which the C library takes from the operating
system and gives back each time. SmolLM2-135M in bf16, 16,384 tokens, one thread: a layer's MLP takes 288 ms
at once and 209 in pieces of 2,048, a norm 64 ms and 7 (docs/measured/2026-11-28.md).
"""

from typing import Any

import torch

from sentei.kernels.hf.versions import cache_argument

PIECE_TOKENS = 2048  # whole query blocks of every size


def run_in_pieces(model: Any, ids: torch.Tensor, cache: Any, *, keep: int = 1) -> torch.Tensor:
    """Run a model over ids [B, T] and add them to `cache`; return the last logits, [B, keep, V].

    A retrofit has to be told before where the prompt ends: `Retrofit.set_prompt_tokens`.
    """
    found: list[torch.Tensor] = []
    tokens, body = ids.shape[1], getattr(model, "base_model", model)
    for first in range(0, tokens, PIECE_TOKENS):
        piece = ids[:, first : first + PIECE_TOKENS]
        wanted = first + piece.shape[1] - max(first, tokens - keep)
        passed = {"input_ids": piece, **cache_argument(cache), "use_cache": True}
        if wanted > 0:
            found.append(model(**passed, logits_to_keep=wanted).logits)
        elif body is not model:
            body(**passed)  # no logits: one row of them reads all of a vocabulary's weights
        else:
            model(**passed, logits_to_keep=1)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
