"""The pocket model before training: a small Llama whose first two layers start as an induction circuit.

Left to chance, copying by content takes longer to appear than the training lasts on a CPU. So one head
of the first layer starts by looking one token back, and two heads of the second by looking for their own
token among those and copying what came after. Training changes every weight from there.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITIONS = 16_384
WIDTH, HEAD = 192, 64
ROPE_THETA = 1e7
# The residual stream at the start: a constant, the token itself, the token before it.
CONSTANT, TOKEN, BEFORE = 0, slice(1, 128), slice(128, 192)
# Rotation pairs of a head: fast ones tell neighbours apart, slow ones hardly turn within 8192 tokens.
FAST_PAIRS, SLOW_PAIRS = range(12), range(18, 32)


def make_model(vocab_size: int, pad_id: int, bos_id: int, eos_id: int) -> Any:
    """Build the model: 4 layers of 192, 4 query heads and 2 key heads of 64, with its starting circuit."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=MAX_POSITIONS,
        # Slow rotations leave dimensions in which a key looks the same from any distance.
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _start_embeddings(model.model.embed_tokens.weight)
        projection = _start_previous_head(model.model.layers[0].self_attn)
        _start_induction_heads(model.model.layers[1].self_attn, projection)
    return model


def _start_embeddings(weight: torch.Tensor) -> None:
    weight.zero_()
    weight[:, TOKEN] = 0.073 * torch.randn(weight.shape[0], 127)
    weight[:, CONSTANT] = 0.24


def _start_previous_head(attention: Any) -> torch.Tensor:
    """Let head 0 look one token back and write 64 mixtures of that token; return these, [64, 127]."""
    gain = 1.6
    attention.q_proj.weight[:HEAD] = 0.0
    attention.k_proj.weight[:HEAD] = 0.0
    for pair in FAST_PAIRS:
        turn = torch.tensor(ROPE_THETA ** (-pair / 32))
        attention.q_proj.weight[pair, CONSTANT] = gain
        attention.k_proj.weight[pair, CONSTANT] = gain * torch.cos(turn)
        attention.k_proj.weight[pair + 32, CONSTANT] = gain * torch.sin(turn)
    projection: torch.Tensor = torch.linalg.qr(torch.randn(127, HEAD)).Q.T
    attention.v_proj.weight[:HEAD] = 0.0
    attention.v_proj.weight[:HEAD, TOKEN] = projection
    attention.o_proj.weight[:, :HEAD] = 0.0
    attention.o_proj.weight[BEFORE, :HEAD] = 0.1 * torch.eye(HEAD)
    return projection


def _start_induction_heads(attention: Any, projection: torch.Tensor) -> None:
    """Let heads 0 and 2 find their own token among the tokens before, and copy the one that followed it."""
    gain = 4.0
    slow = [*SLOW_PAIRS, *(pair + 32 for pair in SLOW_PAIRS)]
    for head, group in ((0, 0), (2, 1)):
        query, key = slice(head * HEAD, (head + 1) * HEAD), slice(group * HEAD, (group + 1) * HEAD)
        attention.q_proj.weight[query] = 0.0
        attention.k_proj.weight[key] = 0.0
        attention.v_proj.weight[key] = 0.0
        attention.o_proj.weight[:, query] = 0.0
        for i, dim in enumerate(slow):
            mixed = group * len(slow) + i
            attention.q_proj.weight[query][dim, TOKEN] = gain * projection[mixed]
            attention.k_proj.weight[key][dim, BEFORE.start + mixed] = gain
        for i in range(HEAD if group == 0 else HEAD - 1):
            place = TOKEN.start + group * HEAD + i
            attention.v_proj.weight[key][i, place] = 1.0
            attention.o_proj.weight[place, head * HEAD + i] = 0.27
