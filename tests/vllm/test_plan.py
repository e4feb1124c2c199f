"""Rows, chunks and accounts of the vLLM plugin: plain Python, tested without vLLM."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentei.kernels.hf.ladder import NEVER, Ladder, Rung
from sentei.serving.engine.attention_use import LayerUse
from sentei.serving.engine.request import Sampling
from sentei.serving.errors import ConfigError
from sentei.serving.vllm.asked import Asked, read_asked
from sentei.serving.vllm.meter import TICKETS_KEPT, Use, UseMeter
from sentei.serving.vllm.options import LADDER_FILE, SCHEDULERS, EngineOptions, check_engine
from sentei.serving.vllm.plan import Part, StepPlan, measured_rows, plan_step
from sentei.serving.vllm.state import steps_of_batch

DENSE, BOLD = Rung("dense"), Rung("bold", break_even_tokens=256)


def part(first: int, last: int, rung: Rung = BOLD, index: int = 0, token: int = 0) -> Part:
    """A row of a batch."""
    return Part(index, f"r{index}", rung, token, first, last)


def plan_of(*parts: Part, end: int = 1000) -> StepPlan:
    """A plan in layers that `bold` thins, all prompts of one length."""
    return plan_step(parts, [end] * len(parts), {"bold"}, block_q=16)


def spans(parts: tuple[Part, ...]) -> list[tuple[int, int]]:
    """Where parts begin and end."""
    return [(p.first, p.last) for p in parts]


def test_a_rung_that_thins_nothing_here_is_dense_and_keeps_no_features() -> None:
    """Dense requests, and rungs that leave this layer alone, run as in vLLM itself."""
    plan = plan_of(part(0, 512, DENSE), part(0, 512, Rung("mild"), 1, 512))

    assert len(plan.dense) == 2
    assert plan.fed == ()
    assert plan.thins_nothing


def test_a_short_row_is_dense_but_its_features_are_kept() -> None:
    """Below the break-even nothing is thinned; the keys are scored once the sequence is longer."""
    plan = plan_of(part(0, 255), part(254, 255, index=1, token=255), end=255)

    assert spans(plan.dense) == [(0, 255), (254, 255)]
    assert len(plan.fed) == 2
    assert plan.thins_nothing


def test_the_last_rows_of_a_prompt_are_dense_wherever_it_was_cut() -> None:
    """Whole query blocks up to the prompt's end, which is known from its first piece on."""
    asking = replace(BOLD, dense_last_tokens=40)

    whole = plan_of(part(0, 1003, asking), end=1000)
    last = plan_of(part(976, 1003, asking), end=1000)
    early = plan_of(part(512, 960, asking), end=1000)

    assert (spans(whole.prompts), spans(whole.dense)) == ([(0, 960)], [(960, 1000)])
    assert (spans(last.prompts), spans(last.dense)) == ([], [(976, 1000)])
    assert (spans(early.prompts), spans(early.dense)) == ([(512, 960)], [])
    assert spans(last.singles) == [(1000, 1001), (1001, 1002), (1002, 1003)]


def test_rows_behind_the_prompt_choose_alone() -> None:
    """A resumed request computes prompt and answer at once: blocks to the prompt's end, then one by one."""
    plan = plan_of(part(960, 1003, token=7), end=1000)

    assert spans(plan.prompts) == [(960, 1000)]
    assert spans(plan.singles) == [(1000, 1001), (1001, 1002), (1002, 1003)]
    assert [p.token for p in plan.singles] == [47, 48, 49]


def test_single_tokens_open_at_the_break_even() -> None:
    """The token that sees 256 keys is the first that may drop some."""
    plan = plan_of(part(250, 260), end=200)

    assert spans(plan.dense) == [(250, 255)]
    assert spans(plan.singles)[0] == (255, 256)


def test_a_decode_step_has_a_break_even_of_its_own() -> None:
    """As on the built-in engine: calibration measures it apart from that of a prompt."""
    rung = replace(BOLD, decode_break_even_tokens={1: 512})
    plan = plan_of(part(508, 514, rung), part(600, 700, rung, 1, 6), end=500)

    assert spans(plan.dense) == [(508, 511)]
    assert [p.first for p in plan.singles[:4]] == [511, 512, 513, 600]
    assert plan_of(part(0, 500, rung), end=500).prompts
    assert not plan_of(part(2000, 2001, replace(rung, decode_break_even_tokens={1: NEVER})), end=500).singles


def test_steps_have_the_break_even_of_the_most_that_run_at_once() -> None:
    """Whoever is in the step: else an answer would depend on its company."""
    timed = replace(BOLD, decode_break_even_tokens={1: NEVER, 8: 2048})
    ladder = Ladder((DENSE, timed, replace(BOLD, id="mild")), ())

    alone, many = (steps_of_batch(ladder, batch).rungs[1] for batch in (4, 16))
    untimed = steps_of_batch(ladder, 16).rungs[2]

    assert not alone.covers_step(8000)
    assert many.covers_step(2048)
    assert not many.covers_step(2047)
    assert untimed.covers_step(256)


def test_the_scheduler_learns_from_the_ladder_what_was_verified(tmp_path: Path) -> None:
    """By rung, where it is known; an engine without an adapter has nothing to know."""
    rungs = (DENSE, replace(BOLD, verified_tokens=800), replace(BOLD, id="mild"))
    folder = tmp_path / LADDER_FILE
    folder.write_text(json.dumps(Ladder(rungs, (), 16).to_dict()), encoding="utf-8")

    options = EngineOptions("e", str(tmp_path))

    assert options.verified_tokens() == {"bold": 800}
    assert options.query_block_tokens() == 16
    assert EngineOptions("e").verified_tokens() == {}
    assert EngineOptions("e").query_block_tokens() == 1


def test_what_is_longer_than_was_verified_is_dense() -> None:
    """A prompt as a whole, wherever it is cut; an answer from the token on that nobody looked at."""
    rung = replace(BOLD, verified_tokens=800)

    assert plan_of(part(0, 512, rung), end=801).thins_nothing
    assert plan_of(part(0, 512, rung), end=800).prompts
    plan = plan_of(part(798, 802, rung), end=700)
    assert spans(plan.singles) == [(798, 799), (799, 800)]
    assert spans(plan.dense) == [(800, 802)]


def test_measured_rows_are_the_prompts_last_and_some_of_the_answers() -> None:
    """However the sequence is cut; parts take those among their own positions along."""
    where = {"closing": 100, "end": 100, "served": 64}
    whole = measured_rows(0, 164, **where)

    assert whole == (*range(84, 100), *range(100, 164, 4))
    assert measured_rows(0, 90, **where) + measured_rows(90, 164, **where) == whole
    assert measured_rows(0, 101, closing=64, end=100, served=1) == (*range(48, 64), 100)
    plan = plan_of(replace(part(250, 300), measured=(260, 270, 290)), end=280)
    assert [p.measured for p in plan.prompts] == [(260, 270)]
    assert [p.first for p in plan.singles if p.measured] == [290]


def test_causal_blocks_are_those_of_a_mask() -> None:
    """A ragged last query block, and a single token."""
    assert part(64, 100).causal_blocks(16, 64) == 2 + 2 + 2
    assert part(112, 150).causal_blocks(16, 64) == 2 + 3 + 3
    assert part(127, 128).causal_blocks(16, 64) == 2
    assert part(128, 129).causal_blocks(1, 64) == 3


@given(
    end=st.integers(1, 600),
    cuts=st.lists(st.integers(1, 700), max_size=6),
    length=st.integers(1, 700),
    last=st.sampled_from([0, 1, 40]),
)
def test_how_a_sequence_is_cut_changes_nothing(end: int, cuts: list[int], length: int, last: int) -> None:
    """Each position is handled as in one piece, if pieces of a prompt end at query blocks."""
    rung = replace(BOLD, dense_last_tokens=last)
    borders = sorted({0, length, *(c // 16 * 16 if c < end else c for c in cuts if c < length)})

    def kinds(pieces: list[Part]) -> dict[int, str]:
        found = {}
        for piece in pieces:
            plan = plan_of(piece, end=end)
            for name in ("dense", "prompts", "singles"):
                for p in getattr(plan, name):
                    for i in range(p.first, p.last):
                        # Inside a prompt a block before the break-even keeps everything, thinned call or not.
                        is_closed = name == "prompts" and i // 16 * 16 + 1 < BOLD.break_even_tokens
                        found[i] = "dense" if is_closed else name
        return found

    whole = kinds([part(0, length, rung)])
    cut = kinds([part(a, b, rung, token=a) for a, b in itertools.pairwise(borders)])

    assert cut == whole
    assert sorted(whole) == list(range(length))


@pytest.mark.parametrize("bad", [{"chunk_tokens": 0}, {"prompt_tokens": -1}, {"size": 3}, 7])
def test_wishes_that_do_not_fit_are_refused_by_name(bad: object) -> None:
    """What a request may ask is a closed list."""
    with pytest.raises(ValueError, match="extra_args sentei"):
        read_asked({"sentei": bad})


def test_wishes_survive_the_way_through_vllm() -> None:
    """What is put into SamplingParams comes out in the worker; no wishes mean dense."""
    sampling = Sampling(0.5, 0.9, logit_bias=((3, 1.5),), seed=4, json_schema="{}")
    asked = Asked("bold", "t", 5, 200, (1, 2), sampling)

    assert read_asked(asked.to_extra_args()) == asked
    assert not asked.takes_the_best
    assert Asked(sampling=Sampling(seed=3, num_top_logprobs=5)).takes_the_best
    assert not Asked(sampling=Sampling(repetition_penalty=1.1)).takes_the_best
    assert read_asked({"sentei": "bold"}) == Asked("bold")
    assert read_asked(None).is_dense


class Clock:
    """A clock that is moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_step_is_shared_by_tokens_and_attention_by_who_caused_it() -> None:
    """Ten seconds: four of attention, all for `a`; the other six by tokens, 1 to 2."""
    clock = Clock()
    meter = UseMeter(clock)

    meter.begin_step()
    meter.set_rows({"a": 1, "b": 2})
    clock.now_s = 2.0
    with meter.attention({"a": 5.0}):
        clock.now_s = 6.0
    clock.now_s = 10.0
    meter.end_step()

    assert meter.read("a").compute_s == pytest.approx(6.0)
    assert meter.read("b").compute_s == pytest.approx(4.0)


def test_a_density_weighs_pieces_by_their_blocks() -> None:
    """A prompt in two pieces has the density of the whole; single tokens count apart."""
    meter = UseMeter()
    meter.note_blocks("a", 3, kept=10, causal=10, is_single=False)
    meter.note_blocks("a", 3, kept=15, causal=90, is_single=False)
    meter.note_dense(3, [("a", 8.0, True)])

    use = meter.take("a")

    assert use.attention is not None
    assert use.attention.layers == (LayerUse(3, 0.25, 1.0),)
    assert (use.attention.sparse_calls, use.attention.dense_calls) == (2, 1)
    assert Use.from_dict(use.to_dict()) == use
    assert meter.read("a") == Use()


def test_what_is_measured_beside_a_step_costs_nobody() -> None:
    """A replay's dropped mass needs all keys: that is no part of what the rung takes."""
    clock = Clock()
    meter = UseMeter(clock)

    meter.begin_step()
    meter.set_rows({"a": 1})
    with meter.unpaid():
        clock.now_s = 3.0
    meter.note_dropped("a", [0.1, 0.0])
    clock.now_s = 4.0
    meter.end_step()

    assert meter.read("a").compute_s == pytest.approx(1.0)
    assert Use.from_dict(meter.take("a").to_dict()).dropped_mass == (0.1, 0.0)


def test_accounts_that_nobody_asks_for_are_forgotten() -> None:
    """Clients that leave cannot fill a worker's memory."""
    meter = UseMeter()
    for i in range(TICKETS_KEPT + 10):
        meter.note_bad_logits(str(i))

    assert not meter.read("9").has_bad_logits
    assert meter.read("10").has_bad_logits


def set_up(**changes: Any) -> SimpleNamespace:
    """What `check_engine` reads of a VllmConfig, fit for the plugin but for some values."""
    room, _, name = SCHEDULERS[0].rpartition(".")
    scheduler = changes.get("scheduler", type(name, (), {"__module__": room}))
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: scheduler),
        parallel_config=SimpleNamespace(pipeline_parallel_size=changes.get("stages", 1)),
        speculative_config=changes.get("speculative"),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache", "auto")),
        model_config=SimpleNamespace(dtype=changes.get("dtype", "torch.bfloat16")),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheduler": dict}, "scheduler_cls is builtins.dict: .* set sentei.serving.vllm.scheduler"),
        ({"stages": 2}, "pipeline_parallel_size is 2; the plugin was built for 1"),
        ({"speculative": object()}, "speculative decoding is set"),
        ({"cache": "fp8_e5m2"}, "the KV cache is fp8; .* use 'auto'"),
        ({"dtype": "torch.float16"}, "dtype is float16, .* set bfloat16 or float32"),
    ],
)
def test_an_engine_that_would_answer_wrongly_does_not_start(changes: dict[str, Any], told: str) -> None:
    """Each is refused by its name and with the way out."""
    with pytest.raises(ConfigError, match=told):
        check_engine(set_up(**changes))


def test_an_engine_set_up_as_the_plugin_asks_starts() -> None:
    """Nothing is raised."""
    check_engine(set_up())
