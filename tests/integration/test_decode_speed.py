"""Timing decode steps on a tiny random model: who runs, in which context, and what is counted."""

from dataclasses import replace

import pytest
import torch

from sentei.kernels.bench.machine import Machine
from sentei.kernels.hf.adapter import Adapter, new_adapter
from sentei.kernels.hf.ladder import DENSE, NEVER
from sentei.kernels.hf.models import fingerprint
from sentei.kernels.hf.parts import FEATURES, FULL_ATTENTION, HEAD, MLP, SCORING
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.ladder.break_even import (
    BreakEven,
    decode_lengths,
    measure_decode_break_even,
    shortest_that_pays,
)
from sentei.pipeline.measure.decode import Steps, decode_budgets, fill_cache, take_turn, time_decodes
from sentei.pipeline.measure.latency import BEST_DENSE
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import silent
from tests.fakes_models import make_gemma, make_ids, make_llama
from tests.trial_ladders import uncalibrated_ladder

MACHINE = Machine(
    device="x", threads=1, torch_version="2", gflops=100.0, bf16_gflops=400.0, gbytes_per_s=10.0
)


def make_bench(make: object = make_llama) -> tuple[LoadedModel, Adapter]:
    """A model with two rungs that thin at any length."""
    model = make()  # type: ignore[operator]
    adapter = new_adapter(model, "tiny", rank=4)
    ladder = uncalibrated_ladder(adapter, {"all": 1e-30, "bold": 0.5})
    return LoadedModel("tiny", model, None, fingerprint(model, "tiny")), adapter.with_ladder(ladder)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_dense_and_every_rung_decode_in_the_same_context(make: object) -> None:
    """Tokens per second count the batch; dense has no density, a rung its own."""
    loaded, adapter = make_bench(make)

    found = time_decodes(loaded, adapter, make_ids(300)[0], Steps(2, 3), batch=2, progress=silent)

    assert list(found) == [BEST_DENSE, "all", "bold"]
    assert found[BEST_DENSE].density is None
    bold = found["bold"]
    assert bold.density is not None
    assert bold.density < 1.0
    assert bold.lowest_tokens_per_s <= bold.median_tokens_per_s <= bold.highest_tokens_per_s
    assert bold.median_tokens_per_s == pytest.approx(2 / (bold.step_ms / 1e3))
    assert bold.runs == 3


def test_a_rung_below_its_decode_break_even_is_timed_dense() -> None:
    """The bench shows what a server would do at this length."""
    loaded, adapter = make_bench()
    rungs = tuple(replace(rung, decode_break_even_tokens={1: 301}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))

    found = time_decodes(loaded, adapter, make_ids(300)[0], Steps(2, 1), batch=1, progress=silent)

    assert found["bold"].density is None


def test_a_step_that_runs_dense_pays_for_no_features() -> None:
    """Neither scored nor pooled: under a rung that never decodes sparse a step is dense's own."""
    loaded, adapter = make_bench()
    rungs = tuple(replace(rung, decode_break_even_tokens={1: NEVER}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))

    found = decode_budgets(loaded, adapter, make_ids(300)[0], MACHINE, Steps(2, 1), batch=1, progress=silent)

    assert [budget.variant for budget in found] == [BEST_DENSE, "all", "bold"]
    assert {budget.seconds[part] for budget in found for part in (FEATURES, SCORING)} == {0.0}


def test_a_turn_decodes_as_one_pass_would_and_leaves_the_cache_alone() -> None:
    """Greedy steps on a copy: the last context holds the prompt, the warm-up step and the steps."""
    loaded, _ = make_bench()
    ids = make_ids(100)
    filled = fill_cache(loaded, ids[0], batch=2)
    seen: list[int] = []
    with retrofit(loaded.model, None, DENSE, base="best") as handle:
        hook = loaded.model.register_forward_hook(lambda *_: seen.append(1))
        seconds = take_turn(handle, filled, ids[:, -1:].expand(2, 1), 3)
        hook.remove()
        assert len(handle.stats().calls) == 3 * len({call.layer for call in handle.stats().calls})

    assert seconds > 0.0
    assert len(seen) == 4
    assert filled.get_seq_length() == 100


def test_parts_of_a_step_are_clocked_beside_the_bytes_they_read() -> None:
    """A rung scores, dense does not; weights are read once whatever the batch, keys once per sequence."""
    loaded, adapter = make_bench()

    one, four = (
        decode_budgets(loaded, adapter, make_ids(300)[0], MACHINE, Steps(2, 1), batch=batch, progress=silent)[
            0
        ]
        for batch in (1, 4)
    )

    assert one.seconds[SCORING] == 0.0 < one.seconds[FULL_ATTENTION]
    assert four.floor_s[FULL_ATTENTION] == pytest.approx(4 * one.floor_s[FULL_ATTENTION])
    assert four.floor_s[MLP] == one.floor_s[MLP] > 0.0
    assert four.floor_s[HEAD] > 0.0


def test_more_steps_than_text_are_refused() -> None:
    """A turn needs a prompt before it."""
    loaded, adapter = make_bench()

    with pytest.raises(ValueError, match="needs more than 10 tokens"):
        time_decodes(loaded, adapter, make_ids(10)[0], Steps(9, 1), batch=1, progress=silent)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({1024: (1.0, 1.0), 2048: (2.0, 1.5)}, 1024),
        ({1024: (1.0, 0.5), 2048: (2.0, 2.1), 4096: (4.0, 3.0)}, 4096),
        ({1024: (1.0, 0.5), 2048: (2.0, 2.1)}, NEVER),
        ({}, NEVER),
    ],
)
def test_the_break_even_holds_at_every_longer_length(
    seconds: dict[int, tuple[float, float]], found: int
) -> None:
    """One longer length that does not pay moves it behind that one; the longest that does not, to never."""
    assert shortest_that_pays(seconds) == found


def test_lengths_double_up_to_the_longest() -> None:
    """A text below the shortest length is not timed."""
    assert decode_lengths(1023) == []
    assert decode_lengths(1024) == [1024]
    assert decode_lengths(5000) == [1024, 2048, 4096, 5000]


def test_every_rung_gets_a_measured_break_even_by_batch_and_dense_none() -> None:
    """Measured at lengths that the text has; a shorter text leaves the ladder as it was."""
    loaded, adapter = make_bench()
    text = torch.cat([make_ids(512, seed=seed)[0] for seed in range(2)])

    how = BreakEven(Steps(1, 1), batches=(1, 3))
    ladder = measure_decode_break_even(loaded, adapter, text, how, silent)
    same = measure_decode_break_even(loaded, adapter, text[:1000], how, silent)

    dense, *rungs = ladder.rungs
    assert dense.decode_break_even_tokens == {}
    for rung in rungs:
        assert list(rung.decode_break_even_tokens) == [1, 3]
        assert set(rung.decode_break_even_tokens.values()) <= {1024, NEVER}
    assert same == adapter.ladder


def test_a_larger_batch_may_decode_sparse_where_one_sequence_does_not() -> None:
    """The bench shows what a server would do with so many sequences in one step."""
    loaded, adapter = make_bench()
    rungs = tuple(replace(rung, decode_break_even_tokens={1: NEVER, 2: 256}) for rung in adapter.ladder.rungs)
    adapter = adapter.with_ladder(replace(adapter.ladder, rungs=rungs))

    one, three = (
        time_decodes(loaded, adapter, make_ids(300)[0], Steps(2, 1), batch=batch, progress=silent)["bold"]
        for batch in (1, 3)
    )

    assert one.density is None
    assert three.density is not None
