"""Who answers: slices, sticky nested hash, audit choice, lease, breaker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentei.policies.signals import SliceRoute
from sentei.serving.ingress.router import NO_SLICE, Breaker, Lease, SeenUnits, assign, position
from tests.fakes_serving import make_table

UNITS = [f"session-{i}" for i in range(2000)]


def test_no_table_means_dense() -> None:
    """Without a table that can be trusted everybody gets dense."""
    found = assign(None, prompt_tokens=100, unit="a")

    assert (found.variant, found.serving_rung_id, found.slice_id) == ("dense", "dense", NO_SLICE)
    assert not found.is_audited


@pytest.mark.parametrize(("tokens", "slice_id"), [(0, "short"), (7, "short"), (8, "long"), (10**6, "long")])
def test_slice_borders_are_half_open(tokens: int, slice_id: str) -> None:
    """A slice holds its lower border and not its upper one."""
    assert assign(make_table(), prompt_tokens=tokens, unit="a").slice_id == slice_id


def test_prompt_outside_all_slices_gets_dense() -> None:
    """A prompt that no route covers is served by dense and not audited."""
    found = assign(make_table(audit_share=1.0), prompt_tokens=1 << 21, unit="a")

    assert (found.variant, found.slice_id, found.is_audited) == ("dense", NO_SLICE, False)


def test_pinned_slice_never_gets_sparse() -> None:
    """A slice at rung dense is dense for every session, and is not audited."""
    found = [assign(make_table(audit_share=1.0), prompt_tokens=4, unit=unit) for unit in UNITS]

    assert {f.variant for f in found} == {"dense"}
    assert not any(f.is_audited for f in found)


@given(st.text(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_growing_share_keeps_its_sessions(unit: str, one: float, other: float) -> None:
    """A session that sparse serves at a small share is served by sparse at every larger one."""
    small, large = sorted((one, other))
    at_small = assign(make_table(share=small), prompt_tokens=9, unit=unit)
    at_large = assign(make_table(share=large), prompt_tokens=9, unit=unit)

    assert at_small.variant == "dense" or at_large.variant == "sparse"


@given(st.text(max_size=40), st.text(max_size=10))
def test_position_is_in_the_unit_interval(unit: str, salt: str) -> None:
    """Share 0 takes nobody and share 1 takes everybody."""
    assert 0.0 <= position(unit, salt) < 1.0


def test_share_is_met_and_each_arm_has_its_probability() -> None:
    """A tenth of the sessions go to sparse; requests of either arm carry that arm's audit probability."""
    route = SliceRoute("long", 8, 1 << 20, 0.1, "medium", 0.03, 0.25)
    table = replace(make_table(), routes=(route,))
    found = [assign(table, prompt_tokens=9, unit=u) for u in UNITS]
    sparse = [f for f in found if f.variant == "sparse"]

    assert 0.08 < len(sparse) / len(found) < 0.12
    assert {f.audit_probability for f in sparse} == {0.25}
    assert {f.audit_probability for f in found if f.variant == "dense"} == {0.03}


def test_shadow_audits_the_rung_that_dense_does_not_run() -> None:
    """At share 0 dense serves, and the audit knows which rung to replay."""
    found = assign(make_table(share=0.0, audit_share=1.0), prompt_tokens=9, unit="a")

    assert (found.variant, found.serving_rung_id, found.rung_id) == ("dense", "dense", "medium")
    assert found.audit_probability == 1.0


def test_fresh_lease_trusts_nothing_until_renewed() -> None:
    """A new process obeys a table only after it has seen the renewal count grow."""
    lease = Lease()
    lease.observe(make_table(), 7, now_s=0.0)
    before = lease.table(0.0)

    lease.observe(make_table(), 8, now_s=1.0)

    assert before is None
    assert lease.table(1.0) is not None


def test_lease_runs_out_without_renewals() -> None:
    """Reading the same renewal count again and again does not keep a dead controller's table alive."""
    lease = Lease()
    lease.observe(make_table(lease_s=5.0), 1, now_s=0.0)
    lease.observe(make_table(lease_s=5.0), 2, now_s=1.0)
    for now_s in (3.0, 5.0, 6.0):
        lease.observe(make_table(lease_s=5.0), 2, now_s=now_s)

    assert lease.table(6.0) is not None
    assert lease.table(6.01) is None


def test_lease_comes_back_with_the_controller() -> None:
    """A renewal after the lease ran out is obeyed again."""
    lease = Lease()
    for renewals, now_s in ((1, 0.0), (2, 1.0), (3, 50.0)):
        lease.observe(make_table(), renewals, now_s=now_s)

    assert lease.table(50.0) is not None


def test_falling_renewals_are_a_new_store() -> None:
    """A count that falls belongs to another store, which has to prove itself first."""
    lease = Lease()
    for renewals, now_s in ((5, 0.0), (6, 1.0), (1, 1.5)):
        lease.observe(make_table(), renewals, now_s=now_s)

    assert lease.table(1.5) is None


def test_breaker_opens_and_lets_one_more_try_through() -> None:
    """After three failures in a row requests skip the variant, until the pause ends; a success closes it."""
    breaker = Breaker(max_failures=3, open_s=5.0)
    for now_s in (0.0, 1.0, 2.0):
        assert not breaker.is_open(now_s)
        breaker.record(is_ok=False, unit=f"s{now_s}", now_s=now_s)

    assert breaker.is_open(6.9)
    assert not breaker.is_open(7.0)
    breaker.record(is_ok=True, unit="s", now_s=7.0)
    assert not breaker.is_open(7.1)


def test_one_session_never_opens_the_breaker() -> None:
    """However often one session fails, it takes another one to open the breaker."""
    breaker = Breaker(max_failures=3, open_s=5.0)
    for _ in range(40):
        breaker.record(is_ok=False, unit="one", now_s=0.0)
    alone = breaker.is_open(0.1)

    breaker.record(is_ok=False, unit="other", now_s=0.2)

    assert (alone, breaker.is_open(0.3)) == (False, True)


def test_seen_units_forget_the_oldest() -> None:
    """The memory of sessions is bounded."""
    seen = SeenUnits(max_units=2)

    assert [seen.add(unit) for unit in ("a", "a", "b", "c", "a")] == [True, False, True, True, True]
