"""A prompt's forward pass in pieces: what a piece makes on its way fits into the processor's caches.

Over a whole prompt temporary tensors are tens of megabytes, which the C library takes from the operating
system and gives back each time. SmolLM2-135M in bf16, 16,384 tokens, one thread: a layer's MLP takes 288 ms
at once and 209 in pieces of 2,048, a norm 64 ms and 7 (docs/measured/2026-11-28.md).
"""

from collections.abc import Iterator
from typing import Any

import torch

from sentei.kernels.hf.versions import cache_argument

PIECE_TOKENS = 2048  # whole query blocks of every size
LEAST_TOKENS = 256  # a shorter rest goes with the piece before it: the last rows of a prompt stay together


def cut_pieces(tokens: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Yield where each piece of a prompt begins and ends; one piece where no size is given."""
    begin = 0
    while begin < tokens:
        end = tokens if size is None or tokens - begin < size + LEAST_TOKENS else begin + size
        yield begin, end
        begin = end


def run_in_pieces(
    model: Any, ids: torch.Tensor, cache: Any, *, size: int | None, keep: int = 1
) -> torch.Tensor:
    """Run a model over ids [B, T] and add them to `cache`; return the last logits, [B, keep, V].

    `size` says `Retrofit.piece_tokens`, which has to be told before where the prompt ends; None: one pass.
    """
    found: list[torch.Tensor] = []
    tokens, body = ids.shape[1], getattr(model, "base_model", model)
    for begin, end in cut_pieces(tokens, size):
        wanted = end - max(begin, tokens - keep)
        passed = {"input_ids": ids[:, begin:end], **cache_argument(cache), "use_cache": True}
        if wanted > 0:
            found.append(model(**passed, logits_to_keep=wanted).logits)
        elif body is not model:
            body(**passed)  # no logits: one row of them reads all of a vocabulary's weights
        else:
            model(**passed, logits_to_keep=1)
    if not found:
        return torch.empty(ids.shape[0], 0, 0, device=ids.device)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
