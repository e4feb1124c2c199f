"""Recording, calibrating, evaluating and timing on a GPU that is none: what is read, and what moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch

from sentei.kernels.hf.low_rank import new_low_rank
from sentei.kernels.hf.models import rotary_table
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.kernels.hf.stats import read_calls
from sentei.kernels.ops.block_mass import block_mass
from sentei.pipeline.experiments.joint import Lesson
from sentei.pipeline.experiments.joint import divergence as lesson_divergence
from sentei.pipeline.ladder.calibrate import CalibrateOptions, fit_ladder
from sentei.pipeline.ladder.targets import density_targets
from sentei.pipeline.ladder.verify import VerifyOptions, verify_ladder
from sentei.pipeline.measure import capture as capturing
from sentei.pipeline.measure.baselines import KINDS, RankSelector
from sentei.pipeline.measure.capture import Sampling, capture
from sentei.pipeline.measure.decode import fill_cache, take_turn
from sentei.pipeline.measure.needs import scorers_beside_records
from sentei.pipeline.measure.rungs import Variant, losses_by_variant, run_each, rung_variants
from sentei.pipeline.measure.scores import hidden_at, pick_positions, score_variants
from sentei.pipeline.measure.texts import Text
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import silent
from tests.card.models import MAKERS, adding_an_item, as_loaded, make_adapter, on_card
from tests.card.pretend import CARD, CardTensor, PretendCard, Waits, put_on_card
from tests.fakes_models import make_ids

TOKENS = 384
SAMPLING = Sampling(3, 0)
RECORD = "pipeline/measure/capture.py:record_layer"
# Without a cache Transformers looks once for each kind of mask whether positions start anew; and it moves the
# rotary frequencies to where a table is asked for.
THEIRS = {
    "masking_utils.py:find_packed_sequence_indices",
    "modeling_llama.py:forward",
    "modeling_gemma3.py:forward",
}


def ours(waits: Waits) -> Counter[str]:
    """How often our own code read where; what Transformers does is looked at by name."""
    found = Counter(waits.places("read"))
    theirs = {place for place in found if place.startswith("transformers/")}
    assert {place.rsplit("/", 1)[-1] for place in theirs} <= THEIRS
    return Counter({place: times for place, times in found.items() if place not in theirs})


def make_texts(num: int = 2) -> list[Text]:
    """Random tokens, on the CPU, as a tokenizer leaves them."""
    return [Text(make_ids(TOKENS, seed=i)[0]) for i in range(num)]


def make_case(family: str) -> tuple[LoadedModel, Any]:
    """A model and its adapter on the card."""
    model = MAKERS[family]()
    adapter = make_adapter(model)
    return as_loaded(put_on_card(model)), on_card(adapter)


@pytest.mark.parametrize("family", MAKERS)
def test_records_come_to_the_cpu_as_they_are_made(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Each record is moved once, tensor by tensor, and holds what the CPU would have recorded."""
    loaded, adapter = make_case(family)
    plain = as_loaded(MAKERS[family]())
    shapes = adapter.manifest.shapes

    with card.counting() as waits:
        found = capture(loaded, make_texts(), shapes, SAMPLING, label="x", progress=silent)

    assert ours(waits) == {RECORD: 4 * 2 * len(shapes)}
    expected = capture(plain, make_texts(), shapes, SAMPLING, label="x", progress=silent)
    for index in shapes:
        for made, known in zip(found[index], expected[index], strict=True):
            pairs = [
                (getattr(made, f.name), getattr(known, f.name)) for f in fields(made) if f.name != "table"
            ]
            for one, other in pairs:
                assert not isinstance(one, CardTensor)
                torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-3)
    monkeypatch.setattr(capturing, "block_mass", adding_an_item(block_mass))
    with card.counting() as waits:
        capture(loaded, make_texts(), shapes, SAMPLING, label="x", progress=silent)
    assert len(waits.places("read")) > 4 * 2 * len(shapes), "a value that is read in each layer goes unseen"


@pytest.mark.parametrize("family", MAKERS)
def test_calibrating_counts_beside_its_records(card: PretendCard, family: str) -> None:
    """Thresholds are fitted on the CPU without asking the card; verifying runs on it."""
    loaded, adapter = make_case(family)
    records = capture(loaded, make_texts(), adapter.manifest.shapes, SAMPLING, label="x", progress=silent)
    scorers = scorers_beside_records(adapter.scorers)
    targets = (*CalibrateOptions().targets, *density_targets([0.8], 1.0))
    options = CalibrateOptions(bin_edges_tokens=(128,), break_even_tokens=0, targets=targets, dense_above=1.1)

    with card.counting() as waits:
        ladder = fit_ladder(scorers, records, options, loaded.device.type)
    assert waits.found == []
    assert ladder.query_block_tokens == 64  # what suits a GPU

    windows = [text.ids for text in make_texts()]
    how = VerifyOptions(TOKENS, (192,), 2, max_positions=64, first_position=32, blocks_per_window=3)
    verified = verify_ladder(loaded, adapter.with_ladder(ladder), windows, how, silent)

    assert all(rung.verified is not None for rung in verified.rungs[1:])


@pytest.mark.parametrize("family", MAKERS)
def test_losses_are_read_once_for_each_text_and_rung(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A text's losses come off the card together; what attention kept is read when it is told."""
    loaded, adapter = make_case(family)
    windows, positions = [text.ids for text in make_texts()], pick_positions(TOKENS, first=64, most=100)

    def places(own: LoadedModel) -> tuple[Any, Counter[str]]:
        with card.counting() as waits:
            losses = losses_by_variant(own, adapter, windows, positions, label="x", progress=silent)
        return losses, ours(waits)

    losses, found = places(loaded)
    runs = len(windows) * len(adapter.ladder.rungs)

    expected = {"pipeline/measure/scores.py:token_losses": runs}
    # All densities of a sparse run come in one read; the dense ones have told already.
    expected["kernels/hf/stats.py:read_calls"] = len(windows) * (len(adapter.ladder.rungs) - 1)
    assert found == expected
    assert all(0 < losses[rung.id].density < 1 for rung in adapter.ladder.rungs[1:])
    monkeypatch.setattr(Retrofit, "_record", adding_an_item(Retrofit._record))
    assert places(loaded)[1] != expected


@pytest.mark.parametrize("family", MAKERS)
def test_other_choices_of_blocks_run_on_the_card(card: PretendCard, family: str) -> None:
    """Every baseline chooses where the model is; scores against dense come to the CPU."""
    del card
    loaded, adapter = make_case(family)
    text, positions = make_texts()[0].ids, pick_positions(TOKENS, first=64, most=50)
    table = rotary_table(loaded.model, TOKENS, loaded.device)

    def chooser(kind: str) -> Any:
        return lambda kept: RankSelector(kind, kept, adapter.manifest.shapes, table, 64)

    others = [Variant(kind, "mild", chooser=chooser(kind)) for kind in KINDS]
    turns = run_each(
        loaded,
        adapter,
        [text],
        lambda ids: hidden_at(loaded, ids, positions),
        variants=[*rung_variants(adapter), *others],
        label="x",
        progress=silent,
    )
    ((_, found),) = turns
    scores = score_variants(
        loaded, text, positions, {name: run.result for name, run in found.items()}, "dense"
    )

    assert {score.loss.device.type for score in scores.values()} == {"cpu"}
    assert len(scores) == len(adapter.ladder.rungs) + len(KINDS)


@pytest.mark.parametrize("family", MAKERS)
def test_timed_decode_steps_wait_at_both_ends_alone(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Greedy steps that nobody reads run without the host: a clock waits before and after them."""
    loaded, adapter = make_case(family)
    text = make_texts()[0].ids
    filled, first = fill_cache(loaded, text[:-4]), text[-4][None, None].to(CARD)

    def places(rung: str) -> list[str]:
        with retrofit(loaded.model, adapter, rung, base="best") as handle:
            take_turn(handle, filled, first, 1)  # a rung's thresholds are placed at their first use
            with card.counting() as waits:
                take_turn(handle, filled, first, 3)
            calls = list(handle.stats().calls)
        assert len(read_calls(calls)) == 3 * len(adapter.scorers)
        assert waits.places("upload") == []
        return waits.places("read")

    rungs = [rung.id for rung in adapter.ladder.rungs]
    assert {rung: places(rung) for rung in rungs} == {
        rung: ["kernels/placement.py:synchronize"] * 2 for rung in rungs
    }
    monkeypatch.setattr(Retrofit, "_record", adding_an_item(Retrofit._record))
    assert all(len(places(rung)) > 2 for rung in rungs)


@pytest.mark.parametrize("family", MAKERS)
def test_a_fine_tune_learns_on_the_card_from_lessons_on_the_cpu(card: PretendCard, family: str) -> None:
    """What the dense model said moves back for a step; gradients reach the weights beside the model."""
    del card
    model = MAKERS[family]()
    adapter = make_adapter(model)
    low_rank = new_low_rank(put_on_card(model), rank=2, rung="bold")
    loaded, adapter = as_loaded(model), on_card(adapter).with_low_rank(low_rank)
    (text, *_) = make_texts()
    with retrofit(model, adapter, "dense") as handle:
        with torch.no_grad():
            lesson = Lesson(text.ids, loaded.last_states(text.ids).cpu())
        handle.set_rung("bold")
        handle.set_low_rank(True)
        handle.set_differentiable(True)
        for weight in low_rank.parameters():
            weight.requires_grad_(True)

        loss = lesson_divergence(loaded, lesson, 64)
        loss.backward()

    assert float(loss.detach()) > 0
    assert all(weight.grad is not None for weight in low_rank.parameters())


@pytest.mark.parametrize("kind", ["prompt", "index", "copy"])
def test_what_torch_would_move_in_silence_is_an_error_here(card: PretendCard, kind: str) -> None:
    """The card refuses what the tests above must not contain: tensors of the CPU beside its own."""
    loaded, _ = make_case("llama")
    here, there = torch.arange(4), torch.arange(4).to(CARD)
    wrong = {
        "prompt": lambda: loaded.model(input_ids=here[None]),
        "index": lambda: there[here],
        "copy": lambda: there.copy_(here),
    }

    with pytest.raises(AssertionError, match="CPU tensors"):
        wrong[kind]()


def test_every_way_of_reading_is_seen(card: PretendCard) -> None:
    """Items, lists, truth, comparisons, places of a mask, a mask as an index, repeats by a tensor, a move."""
    x = torch.arange(4).to(CARD)
    ways = (
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: bool(x.any()),
        lambda: torch.equal(x, x),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.masked_select(x > 1),
        lambda: torch.repeat_interleave(x, x),
        lambda: int(x.max()),
        lambda: x.cpu(),
        lambda: torch.unique(x),
    )

    for way in ways:
        with card.counting() as waits:
            way()
        assert len(waits.places("read")) == 1
    with card.counting() as waits:
        _ = (x + 1, x.max(), torch.where(x > 1, x, 0), x.to(CARD), x.sort(), x * 2.0)
    assert waits.found == []
