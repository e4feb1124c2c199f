"""The one loop over variants, on a tiny random model: mechanics only."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.ladder import Ladder
from sentei.kernels.hf.models import LayerInfo, fingerprint
from sentei.kernels.ops.block_mask import BlockMask
from sentei.pipeline.measure.rungs import Densities, Variant, by_variant, losses_by_variant, run_each
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import silent
from tests.fakes_models import make_ids, make_llama
from tests.trial_ladders import uncalibrated_ladder

# torch 2.13 imports modules of its own that it has deprecated, when FlexAttention is compiled.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bench() -> tuple[LoadedModel, Adapter]:
    """A model with two rungs; the bold one needs 200 tokens."""
    model = make_llama()
    adapter = new_adapter(model, "tiny", rank=4)
    ladder = uncalibrated_ladder(adapter, {"all": 1e-30, "bold": 0.5})
    rungs = (*ladder.rungs[:2], replace(ladder.rungs[2], break_even_tokens=200))
    loaded = LoadedModel("tiny", model, None, fingerprint(model, "tiny"))
    return loaded, adapter.with_ladder(Ladder(rungs, (), ladder.query_block_tokens))


def test_every_rung_runs_on_every_item_and_its_density_is_its_own(bench: tuple[LoadedModel, Adapter]) -> None:
    """Results come by rung and in the order of the items; what ran dense says so, with a density of 1."""
    loaded, adapter = bench
    texts = [make_ids(300)[0], make_ids(150)[0]]
    told: list[tuple[int, int]] = []

    runs = by_variant(
        run_each(
            loaded,
            adapter,
            texts,
            lambda text: len(loaded.last_states(text)),
            label="run",
            progress=lambda _, done, total: told.append((done, total)),
        )
    )

    assert {name: [run.result for run in found] for name, found in runs.items()} == {
        name: [300, 150] for name in ("dense", "all", "bold")
    }
    assert [run.has_run_sparse for run in runs["bold"]] == [True, False]
    assert runs["bold"][0].density < 1.0
    assert runs["bold"][1].density == 1.0
    assert told == [(done, 6) for done in range(7)]


def test_another_choice_of_blocks_is_made_from_its_rungs_densities(
    bench: tuple[LoadedModel, Adapter],
) -> None:
    """A chooser is given what its rung kept on the same item, and its choice is the one that runs."""
    loaded, adapter = bench
    given: list[Densities] = []

    def keep_all(_layer: LayerInfo, q: torch.Tensor, _k: torch.Tensor) -> BlockMask:
        every = BlockMask.causal(q.shape[2]).to_dense().expand(1, q.shape[1], -1, -1)
        return BlockMask.from_dense(every, q_len=q.shape[2], kv_len=q.shape[2])

    def choose(densities: Densities) -> Any:
        given.append(densities)
        return keep_all

    variants = [Variant("bold", "bold"), Variant("everything at bold", "bold", chooser=choose)]
    turns = run_each(
        loaded,
        adapter,
        [make_ids(300)[0]],
        loaded.last_states,
        variants=variants,
        label="run",
        progress=silent,
    )
    runs = by_variant(turns)

    assert given == [runs["bold"][0].density_by_group]
    assert runs["everything at bold"][0].density == 1.0
    assert runs["everything at bold"][0].has_run_sparse


@torch.no_grad()
def test_losses_of_all_texts_come_together_with_the_mean_density(bench: tuple[LoadedModel, Adapter]) -> None:
    """Each variant's losses stand in the order of the texts; one dense text is enough to be told."""
    loaded, adapter = bench
    texts, positions = [make_ids(300)[0], make_ids(150)[0]], torch.tensor([100, 140])

    found = losses_by_variant(loaded, adapter, texts, positions, label="run", progress=silent)

    logits = loaded.model(input_ids=texts[1][None]).logits[0].log_softmax(-1)
    expected = torch.tensor([-float(logits[p, texts[1][p + 1]]) for p in (100, 140)])
    torch.testing.assert_close(found["dense"].loss[2:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bold"].loss[2:], expected, rtol=1e-4, atol=1e-5)
    assert 0.5 < found["bold"].density < 1.0
    assert (found["all"].has_always_run_sparse, found["bold"].has_always_run_sparse) == (True, False)


def test_closing_early_gives_the_model_back(bench: tuple[LoadedModel, Adapter]) -> None:
    """Whoever stops after the first item, or fails there, leaves the model as it was."""
    loaded, adapter = bench
    before = loaded.model.config._attn_implementation
    texts = [make_ids(300)[0]] * 2

    turns = run_each(loaded, adapter, texts, loaded.last_states, label="run", progress=silent)
    with closing(turns):
        next(turns)
        during = loaded.model.config._attn_implementation

    assert during != before
    assert loaded.model.config._attn_implementation == before
