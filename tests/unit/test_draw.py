"""The draw of audits: known probability at every place, nothing to steer it by, no more than can be done."""

from __future__ import annotations

import random

import pytest

from sentei.serving.ingress.draw import AuditBudget, AuditDraws, draw_audit
from sentei.serving.ingress.router import assign
from sentei.serving.ports import AuditLoad
from tests.fakes_serving import make_table


@pytest.mark.parametrize("probability", [1.0, 0.7, 0.4, 0.1, 1 / 38])
def test_every_place_of_a_conversation_is_drawn_alike(probability: float) -> None:
    """First, tenth or last request: each is drawn with the probability that is recorded."""
    draws, counts, num = AuditDraws(random.Random(1)), [0] * 60, 4000
    for session in range(num):
        for place in range(60):
            counts[place] += draws.draw(session, probability)

    off = 4.5 * (probability * (1 - probability) / num) ** 0.5
    assert all(abs(count / num - probability) <= off for count in counts)


@pytest.mark.parametrize("way", ["in turn", "by lot", "first here, then there", "by length"])
def test_probability_is_that_of_the_record_whichever_ingress_takes_a_request(way: str) -> None:
    """Each ingress has windows of its own; no way of sending requests to them changes what any is drawn with.

    So the recorded probability is the right weight with any number of ingresses. What they do not share is
    that a window has exactly one: two may draw two of a session's requests, or none.
    """
    ingresses = [AuditDraws(random.Random(seed)) for seed in range(3)]
    probability, num, places, lots = 0.25, 4000, 12, random.Random(9)
    counts, seen = [0] * places, [0] * places
    for session in range(num):
        for place in range(places):
            chosen = {
                "in turn": place % 3,
                "by lot": lots.randrange(3),
                "first here, then there": min(place, 1),
                "by length": place // 5,
            }[way]
            counts[place] += ingresses[chosen].draw(session, probability)
            seen[place] += 1

    off = 4.5 * (probability * (1 - probability) / num) ** 0.5
    assert all(abs(count / of - probability) <= off for count, of in zip(counts, seen, strict=True))


def test_each_window_has_one() -> None:
    """A quarter means one in each four of a session's requests, so no session is left out."""
    draws = AuditDraws(random.Random(1))

    found = [sum(draws.draw("s", 0.25) for _ in range(4)) for _ in range(50)]

    assert found == [1] * 50


def test_growing_conversations_are_audited_as_they_are_served() -> None:
    """Audits fall on long prompts as often as requests do, not on the short first ones."""
    rng, draws = random.Random(0), AuditDraws(random.Random(1))
    served, audited = list[int](), list[int]()
    for session in range(4000):
        tokens = rng.randrange(200, 3000)
        for _ in range(rng.randrange(5, 60)):
            served.append(tokens)
            if draws.draw(session, 0.05):
                audited.append(tokens)
            tokens += int(rng.expovariate(1 / 1500))

    for length in (16_384, 24_000, 48_000):
        of_served = sum(t >= length for t in served) / len(served)
        of_audited = sum(t >= length for t in audited) / len(audited)
        assert of_audited == pytest.approx(of_served, abs=0.025)


def test_memory_of_streams_is_bounded() -> None:
    """Many sessions push out the oldest, and a session that comes back starts a window of its own."""
    draws = AuditDraws(random.Random(1), max_streams=2)
    for session in range(100):
        draws.draw(session, 0.1)

    assert len(draws._streams) == 2


def test_budget_is_open_until_an_auditor_speaks_and_when_it_is_away() -> None:
    """Without word from an auditor nothing is left out: what is lost must show as missing."""
    budget = AuditBudget(wait_s=10.0)
    budget.take()
    silent = budget.has_room(0.0)
    budget.observe(AuditLoad(waiting=99, jobs_per_s=0.1), 1.0)
    busy = budget.has_room(1.0)
    budget.observe(None, 2.0)

    assert (silent, busy, budget.has_room(2.0)) == (True, False, True)


def test_budget_fills_at_the_pace_of_the_auditor() -> None:
    """Of a request a second an auditor that does one in four seconds gets one in four, after its reserve."""
    budget, taken = AuditBudget(wait_s=8.0), 0
    budget.observe(AuditLoad(waiting=0, jobs_per_s=0.25), 0.0)
    for second in range(400):
        if budget.has_room(float(second)):
            budget.take()
            taken += 1

    assert 100 <= taken <= 103


def test_audit_that_came_to_nothing_makes_room_for_another() -> None:
    """A drawn request that got no answer costs the auditor nothing, so another one may be drawn."""
    budget = AuditBudget(wait_s=1.0)
    budget.observe(AuditLoad(waiting=0, jobs_per_s=0.1), 0.0)
    budget.take()
    is_full = not budget.has_room(0.0)

    budget.give_back()

    assert (is_full, budget.has_room(0.0)) == (True, True)


def test_what_no_replay_would_be_in_time_for_has_probability_zero() -> None:
    """The rate that was really reached stands in the records; a drawn request keeps its probability."""
    draws, budget = AuditDraws(random.Random(1)), AuditBudget(wait_s=10.0)
    wanted = assign(make_table(audit_share=1.0), prompt_tokens=9, unit="s")
    drawn = draw_audit(wanted, "s", draws=draws, budget=budget, now_s=0.0)
    budget.observe(AuditLoad(waiting=99, jobs_per_s=0.1), 0.0)

    left_out = draw_audit(wanted, "s", draws=draws, budget=budget, now_s=0.0)

    assert (drawn.is_audited, drawn.audit_probability) == (True, 1.0)
    assert (left_out.is_audited, left_out.audit_probability) == (False, 0.0)
    assert 0.0 <= drawn.span_place < 1.0
