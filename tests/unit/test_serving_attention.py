"""What a request's attention kept: added up pass by pass, and bounded in bytes."""

from __future__ import annotations

import json

from sentei.kernels.hf.stats import LayerCall
from sentei.serving.engine.attention_use import AttentionMeter, to_json


def metered(layers: int = 2) -> AttentionMeter:
    """A prefill of 500 tokens and two decode steps; layer 0 is dense."""
    meter = AttentionMeter()
    for q_tokens, causal, density in ((500, 144, 0.2), (1, 8, 0.1), (1, 8, 0.3)):
        calls = [LayerCall(i, q_tokens, causal, "sparse", (density, density)) for i in range(1, layers)]
        meter.add([LayerCall(0, q_tokens, causal, "dense", (1.0, 1.0)), *calls])
    return meter


def test_prefill_and_decode_are_kept_apart() -> None:
    """Each layer has its mean density in the prefill and in the decode steps."""
    found = metered().read().to_dict(2048)

    assert found == {
        "sparse_calls": 3,
        "dense_calls": 3,
        "prefill_density": 0.6,
        "decode_density": 0.6,
        "layers": {"0": [1.0, 1.0], "1": [0.2, 0.2]},
    }


def test_pieces_of_a_prompt_weigh_what_they_see() -> None:
    """The last piece sees more blocks than the first one, which kept everything."""
    meter = AttentionMeter()
    for causal, kept in ((10, 1.0), (26, 0.5), (42, 0.5), (58, 0.1)):
        meter.add([LayerCall(0, 64, causal, "sparse", (kept,))])

    (layer,) = meter.read().layers

    assert layer.prefill_density == round((10 + 13 + 21 + 5.8) / 136, 4)


def test_record_never_exceeds_its_bytes() -> None:
    """Layers are left out where they do not fit; where nothing fits there is no record."""
    use = metered(layers=100).read()

    whole, cut, none = (use.to_dict(limit) for limit in (4096, 512, 20))

    assert whole is not None
    assert len(whole["layers"]) == 100
    assert cut == {**whole, "layers": None}
    assert len(to_json(cut)) <= 512
    assert json.loads(to_json(cut))["sparse_calls"] == 297
    assert (none, to_json(none)) == (None, "")


def test_a_request_that_was_not_fed_yet_has_an_empty_record() -> None:
    """Before the first pass there are no calls and no densities, and no division by zero."""
    found = AttentionMeter().read().to_dict(2048)

    assert found is not None
    assert (found["sparse_calls"], found["prefill_density"], found["layers"]) == (0, None, {})
