"""Rungs: what they were made for, where they run, and whether held-out text kept it."""

import json
from dataclasses import replace

import pytest

from sentei.kernels.hf.ladder import DENSE, NEVER, Ladder, LengthCheck, Rung, Verified, ladder_from_dict


def make_rung(**changes: object) -> Rung:
    """A rung that was made for a fifth of the blocks and verified up to 4,096 tokens."""
    checks = (LengthCheck(2048, 0.4, 0.03), LengthCheck(4096, 0.25, 0.05))  # 0.2 past the break-even
    verified = Verified(0.05, 0.4, 0.001, (-0.002, 0.004), 0.19, checks)
    rung = Rung(
        "d20",
        {0: ((0.01, 0.02),)},
        bound_dropped_mass=None,
        break_even_tokens=1024,
        verified=verified,
        target_density=0.2,
        verified_tokens=4096,
    )
    return replace(rung, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "is_sparse"), [(1023, False), (1024, True), (4096, True), (4097, False)])
def test_a_rung_runs_from_break_even_to_the_longest_verified_length(tokens: int, is_sparse: bool) -> None:
    """Shorter contexts do not pay; of longer ones nobody knows what is lost."""
    assert make_rung().covers(tokens) is is_sparse


@pytest.mark.parametrize(
    ("measured", "shortest"), [({}, 1024), ({1: 512}, 1024), ({1: 2048}, 2048), ({1: NEVER}, None)]
)
def test_steps_run_sparse_from_their_own_break_even_on(
    measured: dict[int, int], shortest: int | None
) -> None:
    """As prompts do where none was measured, never earlier than prompts, and never at all by name."""
    rung = make_rung(decode_break_even_tokens=measured)

    sparse = [tokens for tokens in (512, 1023, 1024, 2047, 2048, 4096, 4097) if rung.covers_step(tokens)]

    assert sparse == [tokens for tokens in (1024, 2047, 2048, 4096) if shortest and tokens >= shortest]


@pytest.mark.parametrize(("batch", "shortest"), [(1, None), (3, None), (4, 4096), (15, 4096), (16, 2048)])
def test_a_step_goes_by_the_nearest_timed_batch_below_it(batch: int, shortest: int | None) -> None:
    """What paid for fewer sequences pays for more; the other way round nobody knows, so it runs dense."""
    rung = make_rung(decode_break_even_tokens={1: NEVER, 4: 4096, 16: 2048})

    sparse = [tokens for tokens in (1024, 2048, 4096) if rung.covers_step(tokens, batch)]

    assert sparse == [tokens for tokens in (2048, 4096) if shortest and tokens >= shortest]


def test_a_step_smaller_than_any_that_was_timed_runs_dense() -> None:
    """Nobody looked whether it pays."""
    assert not make_rung(decode_break_even_tokens={4: 1024}).covers_step(4096, 3)


@pytest.mark.parametrize(
    ("asked", "prompt", "first"), [(0, 500, 500), (1, 500, 496), (40, 500, 448), (40, 512, 464), (40, 20, 0)]
)
def test_the_last_rows_begin_with_a_query_block(asked: int, prompt: int, first: int) -> None:
    """At least as many rows as the rung says, whole query blocks of 16; none where it says none."""
    assert make_rung(dense_last_tokens=asked).last_from(prompt, 16) == first


def test_without_limits_a_rung_runs_at_any_length() -> None:
    """For timing alone."""
    ladder = Ladder((Rung(DENSE), make_rung()), (2048,), 16).without_limits()

    assert ladder.find("d20").covers(1_000_000)
    assert not ladder.find(DENSE).covers(1_000_000)


def test_without_limits_steps_are_timed_past_the_lengths_at_which_they_did_not_pay() -> None:
    """Up to the longest verified context they were timed; past it nobody looked."""
    rung = make_rung(decode_break_even_tokens={1: NEVER, 4: 2048})

    free = Ladder((Rung(DENSE), rung), (2048,), 16).without_limits().find("d20")

    assert free.decode_break_even_tokens == {1: 4097, 4: 2048}


# Of 8,192 tokens 1/64 lies before the break-even: 0.234 and 0.193 are 0.222 and 0.18 of the rest.
@pytest.mark.parametrize(
    ("density", "is_kept"), [(0.231, True), (0.194, True), (0.234, False), (0.19, False)]
)
def test_a_density_is_kept_within_a_tenth_at_every_length(density: float, is_kept: bool) -> None:
    """One length that strays is enough to lose the name."""
    rung = make_rung()
    assert rung.verified is not None
    checks = (*rung.verified.by_length, LengthCheck(8192, density, 0.05))

    strayed = replace(rung, verified=replace(rung.verified, by_length=checks))

    assert strayed.is_kept is is_kept


def test_prompts_hardly_longer_than_the_break_even_say_nothing_of_a_density() -> None:
    """What is kept there is kept by the break-even."""
    rung = make_rung()

    assert rung.chosen_density(LengthCheck(1500, 0.6, 0.0)) is None
    assert rung.chosen_density(LengthCheck(2048, 0.4, 0.0)) == pytest.approx(0.2)


@pytest.mark.parametrize(("bound", "is_kept"), [(0.05, True), (0.049, False)])
def test_a_bound_on_dropped_mass_is_kept_where_held_out_text_stays_below_it(
    bound: float, is_kept: bool
) -> None:
    """What was fitted on other text is a bound only if this text keeps it."""
    assert make_rung(target_density=None, bound_dropped_mass=bound).is_kept is is_kept


@pytest.mark.parametrize(("nll", "is_kept"), [(0.004, True), (0.0039, False)])
def test_a_loss_is_kept_where_the_upper_end_of_its_interval_stays_within(nll: float, is_kept: bool) -> None:
    """The mean alone is no proof."""
    assert make_rung(target_density=None, target_nll=nll).is_kept is is_kept


@pytest.mark.parametrize(("measured", "is_kept"), [(1.5, True), (1.49, False), (None, False)])
def test_a_speed_is_kept_where_it_was_measured(measured: float | None, is_kept: bool) -> None:
    """A rung that was not timed has none."""
    rung = make_rung(target_density=None, target_speed=1.5)
    ladder = Ladder((Rung(DENSE), rung), (2048,), 16)

    timed = ladder if measured is None else ladder.with_speeds({"d20": measured})

    assert timed.find("d20").is_kept is is_kept


def test_a_rung_that_nobody_verified_says_neither() -> None:
    """No measurement is no promise kept."""
    assert make_rung(verified=None).is_kept is None


def test_a_ladder_survives_its_file() -> None:
    """Target, lengths and limits are read back as they were written."""
    rung = make_rung(decode_break_even_tokens={1: NEVER, 4: 2048}, target_nll=0.01, target_speed=1.5)
    ladder = Ladder((Rung(DENSE), rung), (2048,), 16).with_speeds({"d20": 1.4})

    assert ladder_from_dict(json.loads(json.dumps(ladder.to_dict()))) == ladder


def test_a_ladder_with_one_break_even_for_steps_is_read_as_one_of_single_sequences() -> None:
    """Ladders of 2026-11-27 hold one number, which was timed with one sequence."""
    data = Ladder((Rung(DENSE), make_rung()), (2048,), 16).to_dict()
    data["rungs"][1]["decode_break_even_tokens"] = 4096

    assert ladder_from_dict(data).find("d20").decode_break_even_tokens == {1: 4096}


def test_a_ladder_of_before_has_no_limit() -> None:
    """Ladders that name no verified length run as they did."""
    data = Ladder((Rung(DENSE), make_rung()), (2048,), 16).to_dict()
    for rung in data["rungs"]:
        for name in ("density", "nll", "speed"):
            del rung[f"target_{name}"]
        del rung["verified_tokens"], rung["decode_break_even_tokens"], rung["dense_last_tokens"]
        if rung["verified"] is not None:
            del rung["verified"]["by_length"], rung["verified"]["prefill_speed"]

    rung = ladder_from_dict(data).find("d20")

    assert rung.covers(1_000_000)
    assert rung.decode_break_even_tokens == {}
    assert rung.verified is not None
    assert rung.verified.by_length == ()
