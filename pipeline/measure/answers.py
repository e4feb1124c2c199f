"""A live model's answers to a prompt: greedy text, or the likeliest of several choices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from sentei.kernels.hf.models import end_tokens
from sentei.kernels.hf.versions import cache_argument
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.text.corpus import encode_text


@dataclass(frozen=True, slots=True)
class Answer:
    """What came after a prompt; `is_cut` says that the limit ended it, not the model."""

    text: str
    tokens: int
    is_cut: bool


@torch.no_grad()
def answer_greedily(loaded: LoadedModel, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> Answer:
    """Continue a prompt until the model ends, a stop text appears or `max_tokens` are reached.

    The text ends before the first stop text; the end token is not counted.
    """
    ids = encode_prompt(loaded, prompt)[None].to(loaded.device)
    ends = end_tokens(loaded.model, loaded.tokenizer)
    cache = DynamicCache(config=loaded.model.config)
    found: list[int] = []
    text = ""
    while len(found) < max_tokens:
        output = loaded.model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())  # the one thing that a step reads off a GPU
        if token in ends:
            return Answer(text, len(found), is_cut=False)
        found.append(token)
        text = str(loaded.tokenizer.decode(found, skip_special_tokens=True))
        places = [text.index(mark) for mark in stop if mark in text]
        if places:
            return Answer(text[: min(places)], len(found), is_cut=False)
        ids = torch.tensor([[token]], device=loaded.device)
    return Answer(text, len(found), is_cut=True)


@torch.no_grad()
def choose(loaded: LoadedModel, prompt: str, choices: Sequence[str]) -> int:
    """Return the index of the choice with the highest log-likelihood after the prompt.

    A choice continues the prompt after a space, unless one of the two brings white space along.
    """
    head = encode_prompt(loaded, prompt)
    scores = []
    for choice in choices:
        is_joined = prompt[-1:].isspace() or choice[:1].isspace()
        tail = torch.tensor(encode_text(loaded.tokenizer, choice if is_joined else f" {choice}"))
        ids = torch.cat([head, tail])[None].to(loaded.device)
        logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=len(tail) + 1).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), tail.to(loaded.device), reduction="sum")
        scores.append(-float(loss))
    return scores.index(max(scores))


def encode_prompt(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    """Return a prompt's token ids, with the special tokens that the tokenizer adds."""
    return torch.tensor(loaded.tokenizer(prompt, verbose=False)["input_ids"])
