"""Builders and Hypothesis strategies for policies, states and signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from sentei.policies.engine import Decision, RolloutState, decide, initial_state
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy, to_document
from sentei.policies.signals import Command, DriftSignal, Observation, Signals, SliceTraffic, VariantHealth

EXAMPLES = Path(__file__).parents[1] / "policies" / "examples"

TWO_SLICES = """
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {name: two-slices}
spec:
  ladder: [{id: mild}, {id: medium}]
  slices:
    buckets:
      - {id: short, range: [0, 100], pin: control}
      - {id: mid, range: [100, 200]}
      - {id: long, range: [200, 400]}
  assignment: {salt: test}
  stages:
    - {id: shadow, share: 0, rung: mild}
    - {id: half, share: 50%, rung: mild, hold_min: 10s, max: 1h}
    - {id: half-medium, share: 50%, rung: medium, hold_min: 10s, approval: {by: [ann]}}
    - {id: full, share: 90%, rung: medium, bake: 20s}
  advance: {need: all_safe, min_units: 10}
  audit: {select: {fraction: 1.0}}
  guardrails:
    items:
      - {id: agree, value: audit.token_disagreement, bound: {excess_over_floor: 0.2, floor_cap: 0.1},
         test: betting_paired, action: previous_rung}
      - {id: quality, value: audit.kl, bound: {excess_over_floor: 0.4, floor_cap: 0.2}, test: betting_paired,
         action: rollback_slice}
      - {id: errors, value: serve.failed, bound: {max: 20%}, test: beta_binomial, per: all, action: rollback,
         advance: no_harm}
      - {id: srm, value: assignment, test: split_ramp, alpha: 0.001, action: freeze}
  benefit:
    - {id: gain, value: audit.compute_ratio, want: {max: 0.9}}
  signals:
    - {id: kl_drift, column: kl, action: rollback, consecutive: 2, no_data: ignore}
    - {id: input_drift, column: prompt_tokens, no_data: ignore}
  breaker: {variant: {window: 60s, min_requests: 10, failure_share: 50%, no_replica_for: 5s}}
  data:
    max_age: 60s
    no_data: {grace: 120s, then: hold, after: 300s, finally: rollback}
    monitor_lease: 10s
  rollback: {retry: {max: 1, cool_off: 30s}}
  schedule: {freeze: ["Fri 16:00-Mon 08:00 UTC"]}
  notify:
    webhooks:
      - {id: oncall, url: "https://hooks.example.com/sentei", secret: {file: webhook-key},
         events: [rolled_back, slice_fell, approval_wanted], hold_longer_than: 6h}
      - {id: chat, url_from: {env: SENTEI_CHAT_URL}, format: slack}
"""


def monday(hour: int = 12) -> float:
    """Noon of a Monday, outside the freeze window of TWO_SLICES."""
    return 4 * 86_400.0 + hour * 3600.0


def make_policy(change: Callable[[dict[str, Any]], None] | None = None, text: str = TWO_SLICES) -> Policy:
    """The policy of TWO_SLICES, after `change` has edited its plain values."""
    document = yaml.safe_load(text)
    if change is not None:
        change(document)
    return load_policy(yaml.safe_dump(document), "test.yaml")


def to_text(policy: Policy) -> str:
    """YAML text that loads to an equal policy."""
    text: str = yaml.safe_dump(to_document(policy), sort_keys=False, allow_unicode=True, width=110)
    return text


Change = Callable[[dict[str, Any]], None]


def put(path: str, value: Any) -> Change:
    """An edit of one value; a number in the path is a place in a list."""

    def change(document: dict[str, Any]) -> None:
        *parts, last = path.split(".")
        place: Any = document["spec"]
        for part in parts:
            place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
        if last.isdigit():
            place[int(last)] = value
        else:
            place[last] = value

    return change


def twice(*changes: Change) -> Change:
    """Several edits at once."""

    def change(document: dict[str, Any]) -> None:
        for one in changes:
            one(document)

    return change


def without_approval(document: dict[str, Any]) -> None:
    """Take the human gate out."""
    del document["spec"]["stages"][2]["approval"]


class Story:
    """A rollout that is told tick by tick."""

    def __init__(self, policy: Policy, now_s: float | None = None) -> None:
        self.policy = policy
        self.now_s = monday() if now_s is None else now_s
        self.state = initial_state(policy, "r1", self.now_s)
        self.seq = 0

    def audits(
        self, count: int, *, excess: float = 0.0, slices: tuple[str, ...] = ("mid", "long"), **changes: Any
    ) -> tuple[Observation, ...]:
        """`count` audited sessions per slice: KL (twice the excess), disagreement and compute ratio."""
        stage = self.policy.stage(self.state.stage_id)
        found = []
        for slice_id in slices:
            for _ in range(count):
                self.seq += 1
                base = Observation(
                    seq=self.seq,
                    value_name="audit.kl",
                    slice_id=slice_id,
                    rung_id=stage.rung,
                    session_id=f"s{self.seq}",
                    variant="sparse" if stage.share else "dense",
                    at_s=self.now_s,
                    value=excess * 2 + 0.01,
                    floor=0.01,
                )
                other = replace(base, value_name="audit.token_disagreement", value=excess + 0.01)
                found += [replace(base, **changes), replace(other, **changes)]
                found.append(replace(base, value_name="audit.compute_ratio", value=0.5, floor=None))
        return tuple(found)

    def served(
        self, count: int, *, failed: int = 0, slice_id: str = "long", variant: str = "sparse", **changes: Any
    ) -> tuple[Observation, ...]:
        """`count` sessions that were served, the first `failed` of them without success."""
        found = []
        for index in range(count):
            self.seq += 1
            value = float(index < failed)
            base = Observation(
                self.seq, "serve.failed", slice_id, "mild", f"s{self.seq}", variant, self.now_s, value
            )
            found.append(replace(base, **changes))
        return tuple(found)

    def tick(
        self,
        observations: tuple[Observation, ...] = (),
        *,
        after_s: float = 1.0,
        is_news: bool = True,
        **signals: Any,
    ) -> Decision:
        """Let time go by, decide, and remember the state."""
        self.now_s += after_s
        given: dict[str, Any] = {
            "observations": observations,
            "cursor": self.seq,
            "newest_data_at_s": self.now_s if is_news else None,
        }
        decision = decide(self.policy, self.state, Signals(**(given | signals)), self.now_s)
        self.state = decision.state
        return decision

    def fair_traffic(self, total: int = 20) -> tuple[SliceTraffic, ...]:
        """New sessions that went where they should."""
        share = self.policy.stage(self.state.stage_id).share
        self.seq += 1
        return tuple(SliceTraffic(s, share, round(total * share), total) for s in ("mid", "long"))

    def good_tick(self, count: int = 40, after_s: float = 30.0, **signals: Any) -> Decision:
        """A tick in which everything that can be seen is clean."""
        self.now_s += after_s
        share = self.policy.stage(self.state.stage_id).share
        seen = self.audits(count) + (self.served(count) if share else ())
        return self.tick(seen, after_s=0.0, traffic=self.fair_traffic(), **signals)

    def run_to(self, stage_id: str, limit: int = 12) -> None:
        """Clean ticks until the rollout is in that stage; the human gate is opened on the way."""
        for _ in range(limit):
            if self.state.stage_id == stage_id:
                return
            gate = self.policy.stage(self.state.stage_id).approval
            self.good_tick(commands=self.order("approve", by="ann") if gate else ())
        raise AssertionError(f"{stage_id} was not reached, but {self.state.stage_id}")

    def order(self, kind: str, by: str = "ann", reason: str = "") -> tuple[Command, ...]:
        """One order of an operator."""
        return (Command(self.state.command_seq + 1, kind, by, reason),)


def sparse_health(requests: int = 0, failures: int = 0, replicas: int = 1) -> tuple[VariantHealth, ...]:
    """Health of both variants, the dense one well."""
    return (
        VariantHealth("dense", 60.0, 100, 0, 1),
        VariantHealth("sparse", 60.0, requests, failures, replicas),
    )


DENSE_GONE = (VariantHealth("dense", 60.0, 0, 0, 0), VariantHealth("sparse", 60.0, 50, 0, 1))


def drift(status: str, window_id: int, signal_id: str = "kl_drift") -> tuple[DriftSignal, ...]:
    """One drift check of one window."""
    return (DriftSignal(signal_id, status, 0.5, 0.1, 100, window_id, "kl 0.5 over 0.1"),)


unit_values = st.floats(0.0, 1.0, allow_nan=False)
any_values = st.one_of(unit_values, st.sampled_from([float("nan"), float("inf"), -1.0, 7.0]))


@st.composite
def observation_lists(draw: st.DrawFn, max_size: int = 30) -> tuple[Observation, ...]:
    """Observations of any value, slice, rung and arm, also impossible ones; seq grows from 1."""
    size = draw(st.integers(0, max_size))
    return tuple(
        Observation(
            seq=index + 1,
            value_name=draw(
                st.sampled_from(
                    ["audit.kl", "audit.token_disagreement", "audit.compute_ratio", "serve.failed", "other"]
                )
            ),
            slice_id=draw(st.sampled_from(["short", "mid", "long", "nowhere"])),
            rung_id=draw(st.sampled_from(["mild", "medium", "dense"])),
            session_id=f"s{index}",
            variant=draw(st.sampled_from(["dense", "sparse"])),
            at_s=monday() + index,
            value=draw(any_values),
            floor=draw(st.one_of(st.none(), any_values)),
            missing=draw(st.booleans()),
        )
        for index in range(size)
    )


@st.composite
def signal_lists(draw: st.DrawFn, max_ticks: int = 12, can_lose_dense: bool = True) -> list[Signals]:
    """Any world, tick by tick: data, silence, drift, orders, failures, a dead dense pool, lost leases."""
    ticks = []
    well = sparse_health(50, 1)
    health = [(), well, (), well, well, sparse_health(50, 40), *([DENSE_GONE] if can_lose_dense else [])]
    cursor = command_seq = 0
    for _ in range(draw(st.integers(1, max_ticks))):
        items = draw(observation_lists(max_size=6))
        items = tuple(replace(item, seq=cursor + item.seq) for item in items)
        cursor += len(items) + 1
        kinds = draw(
            st.lists(st.sampled_from(["pause", "resume", "approve", "retry", "abort", "jump"]), max_size=1)
        )
        commands = tuple(Command(command_seq + i + 1, kind, "ann") for i, kind in enumerate(kinds))
        command_seq += len(commands)
        ticks.append(
            Signals(
                observations=items,
                health=draw(st.sampled_from(health)),
                drift=draw(
                    st.sampled_from([(), drift("drift", cursor), drift("clear", cursor), drift("error", 0)])
                ),
                traffic=draw(st.sampled_from([(), (SliceTraffic("mid", 0.5, 5, 10),)])),
                commands=commands,
                cursor=cursor,
                newest_data_at_s=draw(st.sampled_from([None, monday() + cursor])),
                has_lease=draw(st.sampled_from([True, True, True, False])),
                read_error=draw(st.sampled_from([None, None, None, "disk full"])),
            )
        )
    return ticks


def rerun(
    policy: Policy,
    ticks: list[Signals],
    step_s: float = 10.0,
    *,
    state: RolloutState | None = None,
    begin_s: float | None = None,
) -> list[tuple[RolloutState, Decision]]:
    """Decide tick after tick, from the start or from a state; each state with the decision that followed."""
    begin_s = monday() if begin_s is None else begin_s
    state = initial_state(policy, "r1", begin_s) if state is None else state
    told = []
    for index, signals in enumerate(ticks):
        decision = decide(policy, state, signals, begin_s + step_s * (index + 1))
        told.append((state, decision))
        state = decision.state
    return told


TEXTS = [TWO_SLICES, *(path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.yaml")))]

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["30m", "5%", "mild", "dense", "all_safe", "rollback", "audit.kl", "-1s", "1e9d"]),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside plain values."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A good policy with up to three values replaced, dropped or renamed."""
    document = yaml.safe_load(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        place = document
        for part in path[:-1]:
            place = place[part]
        kind = draw(st.sampled_from(["replace", "drop", "rename"]))
        if kind == "replace" or not isinstance(place, dict):
            place[path[-1]] = draw(odd_values)
        elif kind == "drop":
            del place[path[-1]]
        else:
            place[str(path[-1]) + draw(st.sampled_from(["s", "x", ""]))] = place.pop(path[-1])
        if not places(document):
            break
    return yaml.safe_dump(document, sort_keys=False)


# Each alone is a good edit of TWO_SLICES, and a safer one.
SAFER_EDITS: tuple[Change, ...] = (
    twice(put("stages.1.share", 0.3), put("stages.2.share", 0.3)),
    put("stages.3.share", 0.6),
    put("stages.1.hold_min", "25s"),
    put("stages.3.bake", "90s"),
    put("advance.min_units", 25),
    put("advance.on_max", "rollback"),
    put("guardrails.items.0.bound.excess_over_floor", 0.1),
    put("guardrails.items.1.action", "rollback"),
    put("guardrails.items.2.bound.max", 0.1),
    put("slices.buckets.2.max_rung", "mild"),
    put("slices.buckets.1.pin", "control"),
    put("signals.0.consecutive", 1),
    put("data.no_data.after", "200s"),
    put("breaker.variant.failure_share", 0.2),
    put("schedule.freeze", ["Fri 16:00-Mon 08:00 UTC", "Wed 12:00-Wed 13:00 UTC"]),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A good policy: TWO_SLICES with any of its edits, with and without a human gate."""
    chosen = draw(st.lists(st.sampled_from(SAFER_EDITS), max_size=4, unique=True))
    gate = draw(st.sampled_from([without_approval, put("stages.2.approval.when", "any_time")]))
    return make_policy(twice(gate, *chosen))


@st.composite
def edits(draw: st.DrawFn) -> Policy:
    """A safer policy than TWO_SLICES without its human gate."""
    chosen = draw(st.lists(st.sampled_from(SAFER_EDITS), min_size=1, max_size=3, unique=True))
    return make_policy(twice(without_approval, *chosen))
