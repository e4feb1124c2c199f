"""The state of a rollout: its bytes, its policy, the version of its routes."""

from __future__ import annotations

import pytest

from sentei.policies.engine import PolicyStateError, decide, state_from_json, state_to_json
from sentei.policies.signals import Signals
from tests.stories_engine import in_shadow
from tests.strategies_policy import Story, make_policy, monday, sparse_health, without_approval


def test_a_version_grows_only_when_routes_change() -> None:
    """The routing table's version is a fence: it grows with every change of a route and with nothing else."""
    story = in_shadow()

    same = story.tick(story.audits(5)).state.version
    grown = story.good_tick().state.version

    assert (same, grown) == (1, 2)


def test_a_state_of_another_policy_is_refused() -> None:
    """An edited policy never judges the old one's evidence."""
    story = in_shadow()

    with pytest.raises(PolicyStateError, match="an edited policy starts a new rollout"):
        decide(make_policy(without_approval), story.state, Signals(), monday())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schema":2}', b'{"schema":1}', b"\xff"])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    """Whatever the bytes are, the error is ours and says so."""
    with pytest.raises(PolicyStateError, match="rollout state"):
        state_from_json(data)


def test_a_restart_at_every_tick_gives_the_same_bytes() -> None:
    """Going through the bytes after every tick changes nothing, to the last bit."""
    straight, restarted = Story(make_policy()), Story(make_policy())
    for index in range(30):
        for story in (straight, restarted):
            commands = story.order("approve") if index % 3 == 0 else ()
            story.good_tick(count=3, after_s=7.0, commands=commands, health=sparse_health(30, 1))
        restarted.state = state_from_json(state_to_json(restarted.state))

    assert state_to_json(straight.state) == state_to_json(restarted.state)
    assert straight.state.stage_id != "shadow"
