"""Choices seen from outside: a retrofit's observer, `sentei explain`, the record of a served request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sentei.kernels.hf.adapter import Adapter, new_adapter, save_adapter
from sentei.kernels.hf.models import thinnable_layers
from sentei.kernels.hf.observe import Selection
from sentei.kernels.hf.retrofit import retrofit
from sentei.kernels.scorer.faults import Fault
from sentei.pipeline.cli.app import app
from sentei.pipeline.measure.choices import ExplainError, explain_prompt
from sentei.pipeline.models import LoadedModel, resolve_model
from sentei.serving.engine.request import EngineRequest
from sentei.serving.engine.runner import ModelRunner
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"), pytest.mark.timeout(600)]

PROMPT = "".join(f"line {i}: the naïve cat <b>sat</b> & 猫 slept\n" for i in range(60))


def make_adapter(model: Any, name: str = "tiny") -> Adapter:
    """An untrained adapter with a rung that drops about half."""
    adapter = new_adapter(model, name, rank=4)
    return adapter.with_ladder(uncalibrated_ladder(adapter, {"bold": 0.5}))


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a pass without a cache."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_the_observer_sees_what_ran_and_changes_nothing(make: Any) -> None:
    """Each thinned layer is shown once, with the mask that was counted; the output keeps its bits."""
    model, ids, seen = make(), make_ids(400), list[Selection]()
    with retrofit(model, make_adapter(model), "bold") as handle:
        expected = run(model, ids)
        handle.reset_stats()
        with handle.watching(seen.append):
            found = run(model, ids)
        densities = {call.layer: call.density for call in handle.stats().calls}
        run(model, ids)

    assert torch.equal(found, expected)
    assert max(densities.values()) < 1
    assert [item.layer.index for item in seen] == [layer.index for layer in thinnable_layers(model)]
    for item in seen:
        assert item.mask.density() == pytest.approx(densities[item.layer.index])
        kept = item.mask.to_dense() & torch.isfinite(item.log_shares)
        assert torch.equal(kept, item.log_shares > item.log_thresholds[..., None])


def test_the_observer_goes_after_an_error() -> None:
    """An observer that raises ends the pass with its error, and is off afterwards."""

    def fail(_: Selection) -> None:
        raise KeyError("seen")

    model, ids = make_llama(), make_ids(200)
    with retrofit(model, make_adapter(model), "bold") as handle:
        with pytest.raises(KeyError, match="seen"), handle.watching(fail):
            run(model, ids)
        assert torch.isfinite(run(model, ids)).all()


def test_a_planted_fault_is_seen_as_it_struck() -> None:
    """The shares shown are those that the choice was made from, the fault included."""
    model, ids, seen = make_llama(), make_ids(400), list[Selection]()
    with retrofit(model, make_adapter(model), "bold") as handle:
        handle.set_fault(Fault("pooled_keys_lost", 128))
        with handle.watching(seen.append):
            run(model, ids)

    assert torch.isneginf(seen[0].log_shares[:, :, 2:]).all()
    assert seen[0].mask.counts[:, :, 2:].max() == 2


@pytest.fixture(scope="module")
def pocket() -> LoadedModel:
    """The shipped model."""
    return resolve_model("pocket")


def test_token_in_focus_and_errors_name_the_way_out(pocket: LoadedModel) -> None:
    """A token's block is in focus; a position past the end, an empty and a too long prompt are refused."""
    adapter = make_adapter(pocket.model, "pocket")

    found = explain_prompt(pocket, adapter, PROMPT, rung="bold", token=130)

    assert (found.query_block, found.rung) == (2, "bold")
    assert found.prompt_tokens == len(pocket.tokenizer(PROMPT)["input_ids"])
    assert "".join(PROMPT[begin:end] for begin, end in found.block_chars) == PROMPT
    for text, token, words in (
        (PROMPT, found.prompt_tokens, "the prompt's tokens are 0 to"),
        ("", None, "write some text"),
        (PROMPT * 40, None, "shorten it"),
    ):
        with pytest.raises(ExplainError, match=words):
            explain_prompt(pocket, adapter, text, rung="bold", token=token)


def test_below_break_even_nothing_is_recorded(pocket: LoadedModel) -> None:
    """A prompt that the rung leaves dense has no choices, and its record says which layers stayed dense."""
    adapter = make_adapter(pocket.model, "pocket")
    dense, bold = adapter.ladder.rungs
    adapter = adapter.with_ladder(
        replace(adapter.ladder, rungs=(dense, replace(bold, break_even_tokens=9999)))
    )

    found = explain_prompt(pocket, adapter, PROMPT, rung="bold")

    assert found.layers == ()
    assert list(found.dense_layers) == [layer.index for layer in thinnable_layers(pocket.model)]
    assert json.loads(json.dumps(found.to_dict()))["layers"] == []


def test_command_writes_record_and_page(pocket: LoadedModel, tmp_path: Path) -> None:
    """`sentei explain - --json` reads standard input, prints one document, and writes what it names."""
    folder = tmp_path / "adapter"
    save_adapter(make_adapter(pocket.model, "pocket"), folder)
    options = ["--adapter", str(folder), "--rung", "bold", "--out", str(tmp_path / "out"), "--json"]

    done = CliRunner().invoke(app, ["explain", "-", *options], input=PROMPT)

    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    record = json.loads(Path(document["record"]).read_text())
    page = Path(document["page"]).read_text()
    assert [layer["layer"] for layer in document["layers"]] == [layer["layer"] for layer in record["layers"]]
    assert 0 < document["layers"][0]["density"] < 1
    assert "naïve" not in json.dumps(record, ensure_ascii=False)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_a_served_request_has_its_calls_counted() -> None:
    """Prefill and decode of a real retrofitted model give sparse calls and densities per layer."""
    model = make_llama()
    with retrofit(model, make_adapter(model), "bold") as handle:
        runner = ModelRunner(model, handle)
        runner.prefill(EngineRequest("a", tuple(make_ids(400)[0].tolist()), 3, rung_id="bold"))
        runner.decode("a")
        use = runner.attention("a")

    assert use is not None
    assert (use.sparse_calls, use.dense_calls) == (4, 0)
    for layer in use.layers:
        assert layer.prefill_density is not None
        assert 0 < layer.prefill_density < 1
        assert layer.decode_density is not None
