"""The built-in engine on a GPU that is none: what a prefill, a decode step and a replay read and move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sentei.kernels.hf.models import ModelError
from sentei.kernels.hf.retrofit import Retrofit, attach, retrofit
from sentei.kernels.hf.versions import cache_argument
from sentei.kernels.ops.layouts import PagedCache
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.features import RotaryTable
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.pages import ScorerPages, Span
from sentei.kernels.scorer.selection import Thresholds
from sentei.serving.engine.request import EngineRequest, Sampling, ScoreRequest
from sentei.serving.engine.runner import ModelRunner
from sentei.serving.errors import BadLogitsError
from tests.card.models import FORMS, MAKERS, RUNGS, adding_an_item, make_adapter, on_card
from tests.card.pretend import CARD, PretendCard, put_on_card
from tests.strategies_attention import make_paged

PROMPT = tuple(int(x) for x in torch.randint(1, 128, (200,), generator=torch.Generator().manual_seed(5)))
STEPS = 3
READ = "serving/engine/sampler.py:read_logits"
UPLOAD = "serving/engine/runner.py:_forward"
PLACED = "kernels/scorer/selection.py:on"  # a rung's thresholds, at their first use
CACHE = (
    "transformers/cache_utils.py:lazy_initialization"  # Gemma's: a cache with a window begins with a count
)
ALL_RUNGS = ("dense", *RUNGS)


def make_runner(family: str, *, form: str = "residual", base: Any = "sdpa") -> ModelRunner:
    """An engine whose model and scorers are on the card; the mode is entered."""
    model = MAKERS[family]()
    adapter = make_adapter(model, form)
    return ModelRunner(put_on_card(model), attach(model, on_card(adapter), base=base))


def decode_waits(
    card: PretendCard, runner: ModelRunner, rung: str, sampling: Sampling
) -> tuple[list[str], list[str]]:
    """Where some decode steps read, and where they upload."""
    runner.prefill(EngineRequest("a", PROMPT, 99, rung_id=rung, sampling=sampling))
    with card.counting() as waits:
        for _ in range(STEPS):
            runner.decode("a")
    runner.drop("a")
    return waits.places("read"), waits.places("upload")


GREEDY, DRAWN = Sampling(), Sampling(1.0, seed=3, num_top_logprobs=2, presence_penalty=0.5)


@pytest.mark.parametrize(
    ("family", "base", "form", "sampling"),
    [
        ("llama", "sdpa", "residual", GREEDY),
        ("llama", "best", "low_rank", DRAWN),
        ("gemma", "best", "residual", DRAWN),
        ("gemma", "sdpa", "low_rank", GREEDY),
    ],
)
def test_a_decode_step_reads_its_logits_and_nothing_else(
    card: PretendCard,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    base: str,
    form: str,
    sampling: Sampling,
) -> None:
    """On every rung one read a step, where the token is chosen, and one upload: the token before it."""
    runner = make_runner(family, form=form, base=base)

    found = {rung: decode_waits(card, runner, rung, sampling) for rung in ALL_RUNGS}

    assert found == {rung: ([READ] * STEPS, [UPLOAD] * STEPS) for rung in ALL_RUNGS}
    monkeypatch.setattr(Retrofit, "_record", adding_an_item(Retrofit._record))
    for rung in ALL_RUNGS:
        reads, _ = decode_waits(card, runner, rung, sampling)
        assert len(reads) > STEPS, "a value that is read in each layer goes unseen"


@pytest.mark.parametrize("family", MAKERS)
def test_requests_on_several_rungs_take_turns_without_more_reads(card: PretendCard, family: str) -> None:
    """Switching the rung between steps uploads no thresholds anew, and says on request what was kept."""
    runner = make_runner(family)
    for rung in ALL_RUNGS:
        runner.prefill(EngineRequest(rung, PROMPT, 99, rung_id=rung))
        runner.decode(rung)

    with card.counting() as waits:
        for _ in range(STEPS):
            for rung in ALL_RUNGS:
                runner.decode(rung)

    assert waits.places("read") == [READ] * STEPS * len(ALL_RUNGS)
    assert waits.places("upload") == [UPLOAD] * STEPS * len(ALL_RUNGS)
    kept = {rung: runner.attention(rung) for rung in RUNGS}
    assert all(use is not None and use.sparse_calls for use in kept.values())
    densities = [use.layers[0].decode_density for use in kept.values() if use is not None]
    assert all(density is not None and 0 < density < 1 for density in densities)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAKERS)
def test_a_prefill_reads_its_logits_and_nothing_else(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, family: str, form: str
) -> None:
    """The prompt and, at a rung's first use, thresholds are uploaded; one read chooses the first token."""

    def waits(rung: str) -> tuple[list[str], set[str]]:
        with card.counting() as found:
            runner.prefill(EngineRequest(rung, PROMPT, 99, rung_id=rung))
        return found.places("read"), set(found.places("upload")) - {CACHE}

    runner = make_runner(family, form=form)
    found = {rung: waits(rung) for rung in ALL_RUNGS}

    assert found == {rung: ([READ], {UPLOAD} if rung == "dense" else {UPLOAD, PLACED}) for rung in ALL_RUNGS}
    monkeypatch.setattr(Retrofit, "_record", adding_an_item(Retrofit._record))
    assert all(len(waits(rung)[0]) > 1 for rung in ALL_RUNGS)


@pytest.mark.parametrize("family", MAKERS)
def test_a_replay_reads_once_for_each_piece(card: PretendCard, family: str) -> None:
    """Top tokens and log-probabilities come in one read, the dropped mass of a piece in another."""
    runner, request = make_runner(family), ScoreRequest("a", PROMPT, 196, "bold", served_chunk_tokens=1)

    with card.counting() as waits:
        found = runner.score(request)

    scored, dropped = "serving/engine/runner.py:add", "serving/engine/runner.py:score"
    assert len(found.top_ids) == 4
    assert all(0 <= share <= 1 for share in found.dropped_mass)
    # The prompt's piece predicts the first served token; the last served token predicts none.
    pieces = [[scored, dropped]] * 4
    assert waits.places("read")[: 2 * 4] == [place for piece in pieces for place in piece]
    assert set(waits.places("read")[2 * 4 :]) == {"kernels/placement.py:synchronize", dropped}
    assert set(waits.places("upload")) - {CACHE} == {UPLOAD, PLACED}


@pytest.mark.parametrize("family", MAKERS)
def test_the_card_gives_what_the_cpu_gives(card: PretendCard, family: str) -> None:
    """Dense answers are those of the same model on the CPU, token by token."""
    del card
    request, found = EngineRequest("a", PROMPT, 99), []
    for runner in (make_runner(family), ModelRunner(MAKERS[family]())):
        ids = [runner.prefill(request)[0].token_id]
        found.append(ids + [runner.decode("a")[0].token_id for _ in range(STEPS)])

    assert found[0] == found[1]


@pytest.mark.parametrize("rows", ["prefill", "decode"])
@pytest.mark.parametrize("family", MAKERS)
def test_a_broken_scorer_reaches_the_logits(card: PretendCard, family: str, rows: str) -> None:
    """No layer waits to look for NaN: attention carries it to where the step is read anyway."""
    del card
    runner = make_runner(family)
    request = EngineRequest("a", PROMPT, 99, rung_id="bold")
    if rows == "decode":
        runner.prefill(request)
    assert isinstance(runner.retrofit, Retrofit)
    assert runner.retrofit.adapter is not None
    with torch.no_grad():
        for scorer in runner.retrofit.adapter.scorers.values():
            scorer.log_gain.fill_(torch.nan)

    with pytest.raises(BadLogitsError, match="are NaN or infinite"):
        _ = runner.decode("a") if rows == "decode" else runner.prefill(request)


@pytest.mark.parametrize("fault", [None, Fault("pooled_keys_lost", 300)])
def test_paged_decode_reads_nothing(
    card: PretendCard, monkeypatch: pytest.MonkeyPatch, fault: Fault | None
) -> None:
    """Scoring, selection and attention of all rows follow each other without the host, at any lengths."""
    q, cache = make_paged((70, 400, 0, 129), 1, page=64, heads=(4, 2), dim=16, fill=0.0)
    q, keys, values, table, lengths = (
        x.to(CARD) for x in (q[:, :, 0], cache.keys, cache.values, cache.page_table, cache.lengths)
    )
    scorer = put_on_card(BlockScorer(ScorerShape(4, 2, 16, 8, 16), 0.25).requires_grad_(False))
    angles = torch.arange(512, device=CARD)[:, None] * torch.ones(16, device=CARD)
    pages = ScorerPages(scorer, RotaryTable(angles.cos(), angles.sin()), len(keys))
    thresholds = Thresholds(torch.full((2, 2), -1.0), (200,))
    thresholds.on(CARD)
    pages.update(keys, [Span(table[1], 0, 400)])
    out = torch.empty_like(q)

    def places() -> list[str]:
        with card.counting() as waits:
            kept = pages.decode(q, PagedCache(keys, values, table, lengths), thresholds, out, fault=fault)
        assert kept.shape == (4, 4)
        return [wait.place for wait in waits.found]

    assert places() == []
    monkeypatch.setattr(pages, "_check_pages", adding_an_item(pages._check_pages))
    assert len(places()) == 1


@pytest.mark.parametrize("family", MAKERS)
def test_positions_of_ones_own_are_read_once_a_pass(card: PretendCard, family: str) -> None:
    """They may have gaps, which no layer could see; what the model counts by itself is not looked at."""
    model = MAKERS[family]()
    adapter = on_card(make_adapter(model))
    put_on_card(model)
    ids = torch.tensor([PROMPT]).to(CARD)
    told = torch.arange(len(PROMPT), device=CARD)[None]
    read = "kernels/hf/retrofit.py:_check_positions"

    def reads(positions: torch.Tensor | None) -> list[str]:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(), card.counting() as waits:
            model(input_ids=ids, position_ids=positions, **cache_argument(cache), use_cache=True)
        return waits.places("read")

    with retrofit(model, adapter, "bold"):
        assert (reads(told), reads(None)) == ([read], [])
        with pytest.raises(ModelError, match="position_ids end at 200, but the KV cache holds 200"):
            reads(told + 1)
