"""A rollout on a store, told second by second: begin it, write its traffic, run its ticks."""

from __future__ import annotations

from sentei.monitors.store import Store
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, TickResult, start_rollout
from sentei.policies.state import RolloutState
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request


def begin(store: Store, owner: str = "a") -> RolloutRunner:
    """Start the rollout of this module, or take it up."""
    if store.read_rollout(ROLLOUT) is None:
        start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT)
    return RolloutRunner.open(store, ROLLOUT, RunnerOptions(owner))


def serve(store: Store, second: int, *, disagreement: float = 0.0, num_sessions: int = 8) -> None:
    """Write what one second of traffic leaves behind."""
    for i in range(second * num_sessions, (second + 1) * num_sessions):
        store.add_request(make_request(i, at_s=START_S + second, share=0.5))
        store.add_audit(make_audit(i, at_s=START_S + second, token_disagreement=disagreement))


def run(store: Store, seconds: int, **traffic: float) -> list[TickResult]:
    """Traffic and one tick per second with one runner."""
    runner, results = begin(store), []
    for second in range(seconds):
        serve(store, second, **traffic)  # type: ignore[arg-type]
        results.append(runner.tick(START_S + second + 0.5))
    return results


class AskingStory:
    """A rollout whose policy has others asked: traffic and a tick each second, and a question beside it."""

    def __init__(self, store: Store, policy: str) -> None:
        start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT)
        self.store, self.second = store, 0
        self.runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("a"))

    def before(self, now_s: float) -> None:
        """What happens just before a tick."""

    def after(self, now_s: float) -> None:
        """What happens just after it."""

    def run(self, seconds: int) -> RolloutState:
        """Where it stands then."""
        for _ in range(seconds):
            serve(self.store, self.second)
            self.before(START_S + self.second + 0.3)
            self.runner.tick(START_S + self.second + 0.5)
            self.after(START_S + self.second + 0.6)
            self.second += 1
        state = self.runner.state()
        assert state is not None
        return state
