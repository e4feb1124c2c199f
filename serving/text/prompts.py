"""From a checked body to what an engine gets: the prompt's ids, and the room for the answer."""

from __future__ import annotations

from sentei.serving.errors import RequestError
from sentei.serving.openai.requests import ChatRequest, GenerationRequest, TokenizeRequest
from sentei.serving.ports import ModelCard, Tokenizer
from sentei.serving.text.chat import chat_ids
from sentei.serving.text.tools import ToolUse


def prompt_ids(
    request: GenerationRequest, use: ToolUse, tokenizer: Tokenizer, card: ModelCard
) -> tuple[int, ...]:
    """Return a request's prompt as ids; raises RequestError for ids that the model does not have."""
    if isinstance(request, ChatRequest):
        return _known(chat_ids(tokenizer, request.messages, use.shown), tokenizer, card, param="messages")
    prompt = request.single_prompt()
    if isinstance(prompt, str):
        return _known(tokenizer.encode(prompt), tokenizer, card, param="prompt")
    if wrong := [i for i in prompt if not 0 <= i < card.vocab_size]:
        raise RequestError(
            f"prompt has token id {wrong[0]!s:.40}; ids of this model are 0 to {card.vocab_size - 1}",
            code="invalid_value",
            param="prompt",
        )
    return tuple(prompt)


def tokenize(request: TokenizeRequest, tokenizer: Tokenizer, card: ModelCard) -> tuple[int, ...]:
    """Return the ids of a text or of a conversation, as a generation would get them."""
    request.check_one()
    if request.messages is not None:
        ids = chat_ids(tokenizer, request.messages, request.tools or ())
        return _known(ids, tokenizer, card, param="messages")
    is_whole = request.add_special_tokens is not False
    ids = tokenizer.encode(request.prompt or "", add_special_tokens=is_whole)
    return _known(ids, tokenizer, card, param="prompt")


def _known(ids: list[int], tokenizer: Tokenizer, card: ModelCard, *, param: str) -> tuple[int, ...]:
    """Return the ids; raises RequestError where the tokenizer has tokens that the model was never given."""
    if wrong := next((i for i in ids if i >= card.vocab_size), None):
        raise RequestError(
            f"{param} has token {tokenizer.decode([wrong])!r:.80} (id {wrong}), which is beyond this model's "
            f"{card.vocab_size} tokens; leave it out",
            code="invalid_value",
            param=param,
        )
    return tuple(ids)


def check_biases(request: GenerationRequest, card: ModelCard) -> None:
    """Raise RequestError for a bias of a token that the model does not have."""
    if wrong := [i for i in request.logit_bias or () if int(i) >= card.vocab_size]:
        raise RequestError(
            f"logit_bias has token id {wrong[0]}; ids of this model are 0 to {card.vocab_size - 1}",
            code="invalid_value",
            param="logit_bias",
        )


def check_ending(request: GenerationRequest, use: ToolUse) -> None:
    """Raise RequestError where an answer must end by a rule and must not end by itself."""
    if request.ignore_eos and (request.schema_of_answer() is not None or use.must_call):
        raise RequestError(
            "ignore_eos is true, and an answer by a JSON schema ends where the schema does; leave it out",
            code="invalid_value",
            param="ignore_eos",
        )


def room_for_answer(
    request: GenerationRequest, prompt_tokens: int, card: ModelCard, default_max_tokens: int | None
) -> int:
    """Return how many tokens the answer may have; without a wish all that context and setting leave."""
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    room, wanted = card.max_context_tokens - prompt_tokens, request.wanted_tokens()
    if prompt_tokens < 1:
        raise RequestError("the prompt has no tokens; send some text", code="empty_string", param=param)
    if room < 1 or (wanted is not None and wanted > room):
        raise RequestError(
            f"{param} has {prompt_tokens} tokens"
            + (f" and max_tokens is {wanted!s:.40}" if wanted is not None else "")
            + f", but the model's context is {card.max_context_tokens} tokens; shorten one of them",
            code="context_length_exceeded",
            param=param,
        )
    return min(room, default_max_tokens or room) if wanted is None else wanted
