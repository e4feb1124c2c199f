"""decide(): no share grows before its gain is proven, and a gain that is absent ends the waiting (F17)."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sentei.policies.engine import decide, initial_state, routing, state_from_json, state_to_json
from sentei.policies.evidence import units_to_prove
from sentei.policies.intake import GAIN_CUT, RATIO_CAP
from sentei.policies.review.advice import find_advice
from sentei.policies.review.forecast import Expected
from sentei.policies.schema.budget import no_gain_alpha, try_alpha
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from sentei.policies.signals import Observation, Signals, Verdict
from sentei.policies.state import ALL, SERVED, SliceState
from sentei.policies.steps.tick import effective_rung
from tests.evidence_paths import betting_paths
from tests.stories_engine import at_ratio, in_no_gain, staged
from tests.strategies_policy import EXAMPLES, Story, make_policy, put, sparse_health, twice, without_approval


def in_shadow(policy: Policy | None = None) -> Story:
    """A rollout in its first stage."""
    return Story(policy or make_policy(without_approval))


def gain(story: Story, slice_id: str = "mid") -> Verdict:
    """What the newest tick says of the gain in a slice."""
    decision = decide(story.policy, story.state, Signals(cursor=story.seq), story.now_s)
    return next(v.verdict for v in decision.verdicts if (v.id, v.slice_id) == ("gain", slice_id))


def test_safe_without_a_proven_gain_does_not_grow() -> None:
    """Everything is proven safe, and sparse takes about as long as it may: the share stays."""
    story = in_shadow()

    decision = at_ratio(story, 0.88, count=60)

    assert story.state.stage_id == "shadow"
    assert decision.state.waits_for == "benefit"
    assert "gain in mid at mild: 0.88 times dense's model time" in decision.reason
    assert "in 60 sessions; at most 0.9 is not proven, log e" in decision.reason
    assert "more sessions like these decide (and 1 more)" in decision.reason


def test_a_proven_gain_lets_the_share_grow() -> None:
    """The same with 0.6: the next stage."""
    story = in_shadow()

    assert at_ratio(story, 0.6).state.stage_id == "half"


def test_a_gain_that_nobody_measured_does_not_grow() -> None:
    """No ratio at all is no gain."""
    story = in_shadow()
    story.now_s += 30.0
    seen = tuple(o for o in story.audits(60) if o.value_name != "audit.compute_ratio")

    decision = story.tick(seen, after_s=0.0)

    assert decision.state.waits_for == "benefit"
    assert "no model time compared yet; at most 0.9 must be proven" in decision.reason


def test_no_gain_holds_with_the_ratio_and_its_bounds() -> None:
    """Paused, outcome held, by the benefit; shares stay, and the reason has the numbers."""
    story = in_no_gain()
    state = story.state

    assert (state.phase, state.outcome, state.by, state.ended_s) == ("paused", "held", "gain", story.now_s)
    assert "gain in mid at medium: no gain: 1.6 times dense's model time (" in state.reason
    assert "with 95%) in 40 sessions, proven above 0.9" in state.reason
    assert [route.share for route in routing(story.policy, state).routes] == [0.0, 0.5, 0.5]
    assert state_from_json(state_to_json(state)) == state


def test_no_gain_is_said_before_safety_is_decided() -> None:
    """Waiting for proof of safety would not help: the gain is what is missing for good."""
    story = in_shadow()
    story.now_s += 30.0
    seen = story.audits(12, excess=0.15)
    dear = tuple(replace(o, value=1.9) if o.value_name == "audit.compute_ratio" else o for o in seen)

    decision = story.tick(dear, after_s=0.0)

    assert decision.state.outcome == "held"
    assert [action.kind for action in decision.actions] == ["held"]


def test_no_gain_is_said_before_a_signal_has_its_first_window() -> None:
    """What waits for a drift check would wait for nothing."""
    policy = make_policy(twice(without_approval, put("signals.0.no_data", "hold")))
    story = Story(policy)

    assert "no full window yet" in story.good_tick(after_s=0.0, count=1).reason
    assert at_ratio(story, 1.6).state.outcome == "held"


def test_no_gain_is_not_said_on_data_that_is_in_doubt() -> None:
    """While sparse has no replica, whose times they are is not plain: it waits for that first."""
    story = staged()
    story.now_s += 30.0
    seen = story.audits(40) + story.served(40)
    dear = tuple(replace(o, value=1.6) if o.value_name == "audit.compute_ratio" else o for o in seen)

    decision = story.tick(dear, after_s=0.0, health=sparse_health(replicas=0))

    assert (decision.state.phase, decision.state.waits_for) == ("running", "replicas")


def test_a_step_to_a_bolder_rung_does_not_ask_the_mild_one_to_pay() -> None:
    """half -> half-medium keeps the share, so only what follows it must show its gain."""
    story = Story(make_policy(without_approval))
    story.run_to("half")

    assert at_ratio(story, 1.6).state.stage_id == "half-medium"
    assert "no gain" in at_ratio(story, 1.6).reason
    assert story.state.outcome == "held"


def test_where_sparse_serves_the_gain_is_proven_by_what_it_served() -> None:
    """Audits of what dense served prove nothing for a stage that routes; in shadow they do."""
    story = staged()
    story.now_s += 30.0
    of_dense = tuple(replace(o, variant="dense") for o in story.audits(60))
    story.tick(of_dense, after_s=0.0)

    assert gain(story) is Verdict.NO_DATA
    assert at_ratio(story, 0.5).state.waits_for == "approval"
    assert gain(story) is Verdict.GAIN


def test_a_stage_that_leaves_the_proof_to_a_later_one_goes_by_all_that_the_rung_has_shown() -> None:
    """need: no_harm: the gain that shadow proved at this rung is enough; the last stage proves it anew."""
    policy = make_policy(
        twice(
            without_approval,
            put("stages.1.need", "no_harm"),
            put("stages.2.rung", "mild"),
            put("stages.2.share", 0.7),
            put("stages.3.rung", "mild"),
            put("advance.min_units", 60),
        )
    )
    story = Story(policy)
    assert at_ratio(story, 0.6, count=60).state.stage_id == "half"
    cell = story.state.cell("gain", "mid", "mild", ALL)
    assert cell is not None
    assert cell.phase_units == 60

    assert at_ratio(story, 0.95, count=8).state.stage_id == "half-medium"
    for _ in range(2):
        at_ratio(story, 0.95, count=4)
    served = story.state.cell("gain", "mid", "mild", SERVED)
    assert served is not None
    assert served.phase_units == 8


def test_a_missing_audit_counts_as_twice_dense() -> None:
    """Safe and gained only if any values in the place of the missing ones would not change it."""
    story = in_shadow()
    story.now_s += 30.0
    seen = story.audits(24)
    lost = [o.session_id for o in seen if o.value_name == "audit.kl" and o.slice_id == "mid"][:8]
    told = tuple(
        replace(o, missing=True) if o.session_id in lost and o.value_name == "audit.compute_ratio" else o
        for o in seen
    )
    story.tick(told, after_s=0.0)

    assert gain(story, "mid") is Verdict.UNDECIDED
    assert gain(story, "long") is Verdict.GAIN


def test_an_operator_resumes_what_was_held_and_the_proof_is_not_started_again() -> None:
    """Resumed, the alarm starts afresh; what speaks for a gain goes on, or each resume would be a new try."""
    story = in_no_gain()
    before = story.state.cell("gain", "mid", "medium", SERVED)

    decision = story.tick(commands=story.order("resume"))

    assert (decision.state.phase, decision.state.outcome, decision.state.ended_s) == ("running", None, None)
    after = decision.state.cell("gain", "mid", "medium", SERVED)
    assert before is not None
    assert after is not None
    assert (after.safe, after.harm.units) == (before.safe, 0)


def test_a_held_rollout_still_falls_back_and_can_be_aborted() -> None:
    """Held stops growth and nothing else."""
    for given in ({"commands": "abort"}, {"health": sparse_health(20, 15)}):
        story = in_no_gain()
        signals = {k: story.order(v) if k == "commands" else v for k, v in given.items()}
        assert story.tick(**signals).state.outcome == "rolled_back"


def test_once_promoted_the_gain_is_shown_and_holds_nothing() -> None:
    """The watch goes on: no gain after promotion is a verdict for people, not an act."""
    story = Story(make_policy(without_approval))
    while story.state.outcome is None:
        story.good_tick()

    at_ratio(story, 1.9)

    assert (story.state.phase, story.state.outcome) == ("promoted", "promoted")
    assert gain(story) is Verdict.UNDECIDED


def test_not_disproved_is_enough_where_the_policy_says_so_and_lint_warns() -> None:
    """The weaker need is that of before; it is legal, and said to be weak."""
    policy = make_policy(twice(without_approval, put("benefit.0.need", "not_disproved")))
    story = Story(policy)

    assert at_ratio(story, 0.88).state.stage_id == "half"
    remarks = [remark for remark in find_advice(policy, Expected()) if remark.path[0] == "benefit"]
    assert [remark.path for remark in remarks] == [("benefit", 0, "need")]


def test_lint_warns_where_no_gain_is_asked_for() -> None:
    """Also of a want that is none."""
    none = make_policy(lambda document: document["spec"].pop("benefit"))
    weak = make_policy(put("benefit.0.want.max", 1.2))

    messages = [(r.path, r.message) for p in (none, weak) for r in find_advice(p, Expected())]
    found = [(path, text) for path, text in messages if path[0] == "benefit"]
    assert found[0][0] == ("benefit",)
    assert "a rung that saves nothing is promoted" in found[0][1]
    assert found[1] == (("benefit", 0, "want", "max"), "is no gain: sparse may take as long as dense")


@pytest.mark.parametrize(("direction", "mean"), [("safe", 0.9), ("harm", 0.9)])
def test_gain_and_its_absence_keep_their_error_at_the_bound(direction: str, mean: float) -> None:
    """1,000 streams of 600 sessions at 0.9 times dense's model time, looked at after every one."""
    policy = make_policy()
    alpha = try_alpha(policy) if direction == "safe" else no_gain_alpha(policy)
    rng = np.random.default_rng(5)
    scaled = mean / RATIO_CAP
    values = rng.beta(20 * scaled, 20 * (1 - scaled), (1000, 600))

    log_e = betting_paths(values, bound=scaled, direction=direction, alpha=alpha, cut=GAIN_CUT)  # type: ignore[arg-type]

    share = float((log_e.max(axis=1) >= -np.log(alpha)).mean())
    assert share <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 1000)


def places_of_a_gain(policy: Policy) -> set[tuple[str, str, str, str]]:
    """Benefit, slice, rung and arm wherever a gain can be judged: at each stage, and after each fall."""
    state = initial_state(policy, "r1", 0.0)
    falls = any(item.action == "previous_rung" for item in policy.spec.guardrails.items)
    ceilings = (None, *policy.rung_ids) if falls else (None,)
    arms = (ALL, SERVED) if policy.spec.mode == "enforce" else (ALL,)
    places = set()
    for stage, item, ceiling in product(policy.spec.stages, policy.routed_slices, ceilings):
        fallen = replace(state, stage_id=stage.id).with_slice(SliceState(item.id, ceiling))
        rung = effective_rung(policy, fallen, item.id)
        places |= {(gain.id, item.id, rung, arm) for gain in policy.spec.benefit for arm in arms}
    return places


def test_the_budget_of_absence_is_never_overspent() -> None:
    """Over slices, arms and rungs together what the try may spend, over all tries alpha_total."""
    policy = make_policy()
    places = len(places_of_a_gain(policy))

    assert no_gain_alpha(policy) * places == pytest.approx(try_alpha(policy))
    assert sum(no_gain_alpha(policy, number) * places for number in range(1, 40)) <= 0.05


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_policy_overspends_on_the_absence_of_a_gain(path: Path) -> None:
    """Also where a breach costs one rung, and the rungs below those of the stages come into play."""
    policy = load_policy(path.read_text(encoding="utf-8"))

    places = len(places_of_a_gain(policy))

    assert no_gain_alpha(policy) * places <= try_alpha(policy) * (1 + 1e-9)


def test_a_rung_that_only_a_fall_leads_to_has_its_part_of_the_budget() -> None:
    """`cost-first` begins at the middle rung of three: one benefit, two slices, two arms, three rungs."""
    policy = load_policy((EXAMPLES / "cost-first.yaml").read_text(encoding="utf-8"))

    rungs = {rung for _, _, rung, _ in places_of_a_gain(policy)}

    assert rungs == {"mild", "medium", "bold"}
    assert no_gain_alpha(policy) * 1 * 2 * 2 * 3 == pytest.approx(try_alpha(policy))


def test_the_table_of_sessions_is_computed() -> None:
    """Every number of the table in docs/statistics.md, F17: one benefit, one slice, one rung, both arms."""
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    head, *rows = re.findall(
        r"^\| (`want.max`|0\.\d+) \|(.*)\|$", text[text.index("## F17") : text.index("## Measured")], re.M
    )
    ratios = [float(cell) for cell in re.findall(r"\d\.\d+", head[1])]

    assert len(rows) == 3
    for want, cells in rows:
        bound = float(want) / RATIO_CAP
        found = []
        for place, ratio in enumerate(ratios):
            direction, alpha = ("safe", 0.025) if place < len(ratios) - 2 else ("harm", 0.0125)
            found.append(
                units_to_prove(
                    ratio / RATIO_CAP,
                    bound=bound,
                    direction=direction,  # type: ignore[arg-type]
                    alpha=alpha,
                    cut=GAIN_CUT,
                )
            )
        assert [cell.strip() for cell in cells.split("|")] == [str(n) if n else "never" for n in found]


def test_a_gain_of_a_rollout_that_was_begun_before_is_not_asked_for_proof() -> None:
    """Cells without a proof, as older states have them, go on under `not_disproved`."""
    policy = make_policy(twice(without_approval, put("benefit.0.need", "not_disproved")))
    state = initial_state(policy, "r1", 0.0)
    seen = (Observation(1, "audit.compute_ratio", "mid", "mild", "s1", "dense", 1.0, 0.5),)
    state = decide(policy, state, Signals(seen, cursor=1, newest_data_at_s=1.0), 1.0).state
    old = replace(state, cells=tuple(replace(cell, safe=None, interval=None) for cell in state.cells))

    after = decide(policy, old, Signals(cursor=1, newest_data_at_s=2.0), 2.0)

    assert after.state.cells == old.cells
    assert next(v.verdict for v in after.verdicts if v.id == "gain") is Verdict.UNDECIDED
