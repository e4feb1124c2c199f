"""What a tick writes down: edits with their text, evidence now and then, and looks that are no history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sentei.monitors.events import EventLog
from sentei.pipeline.reports.rollout_report import build_report
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.pipeline.rollout.runner import event_kind, read_look, start_rollout
from sentei.pipeline.tracking.mirror import Mirror
from sentei.policies.schema.load import load_policy
from tests.fakes_records import POLICY, ROLLOUT, START_S, FakeTracker, FlakyStore, make_audit, make_request
from tests.stories_rollout import begin, run, serve
from tests.strategies_policy import EXAMPLES, Story, make_policy


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlakyStore]:
    """A store in a file of its own."""
    with FlakyStore.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


SAFER = POLICY.replace("bake: 2s", "bake: 9s")
BOLDER = POLICY.replace("share: 50%", "share: 60%")


def test_a_safer_edit_is_an_event_and_decides_from_then_on(store: FlakyStore) -> None:
    """The log holds the edited text, the next controller decides under it, and the edit is taken once."""
    runner = begin(store)
    serve(store, 0)
    runner.tick(START_S + 1)
    seq = store.add_revision(ROLLOUT, SAFER, by="ann", at_s=START_S + 1)

    runner.tick(START_S + 2)
    other = begin(store, "a")
    assert not other.tick(START_S + 3).error

    (edit,) = [event for event in EventLog(store).read(ROLLOUT) if event.kind == "edit"]
    assert edit.payload["policy_text"] == SAFER
    assert edit.payload["reason"] == "policy edited by ann: spec.stages[full].bake: 2.0 -> 9.0"
    assert (runner.policy, other.policy) == (load_policy(SAFER), load_policy(SAFER))
    state = other.state()
    assert state is not None
    assert (state.revision, state.policy_digest) == (seq, load_policy(SAFER).digest)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOLDER, "spec.stages[half].share: 0.5 -> 0.6 may only fall"),
        ("x: 1", "unknown key"),
        (POLICY, "nothing would"),
    ],
)
def test_an_edit_that_is_not_safer_is_refused_once_by_field(
    store: FlakyStore, text: str, reason: str
) -> None:
    """The refusal is an event with its reasons; the running policy goes on."""
    runner = begin(store)
    runner.tick(START_S)
    store.add_revision(ROLLOUT, text, by="ann", at_s=START_S)

    for second in (1, 2):
        assert not runner.tick(START_S + second).error

    (refused,) = [event for event in EventLog(store).read(ROLLOUT) if event.kind == "refuse"]
    assert refused.payload["reason"].startswith("edit by ann refused")
    assert reason in refused.payload["reason"]
    assert runner.policy == load_policy(POLICY)


def test_mirror_and_report_use_the_policy_of_each_moment(store: FlakyStore) -> None:
    """After an edit the shares of before are still those of before."""
    less = POLICY.replace("share: 50%", "share: 20%")
    runner = begin(store)
    for second in range(8):
        serve(store, second)
        if second == 6:
            store.add_revision(ROLLOUT, less, by="ann", at_s=START_S + second)
        runner.tick(START_S + second + 0.5)
    tracker = FakeTracker()

    assert Mirror(store, tracker).run_once().reason == ""

    points = tracker.runs[f"sentei-rollouts/rollout:{ROLLOUT}:course"]["metrics"]
    shares = [p.value for p in sorted(points, key=lambda p: p.step) if p.name == "policy/share"]
    report = [share for _, share in build_report(store, ROLLOUT).shares]
    assert shares == report
    assert list(dict.fromkeys(report)) in ([0.0, 0.5, 0.2, 0.95], [0.0, 0.5, 0.2])


def test_evidence_alone_is_written_down_now_and_then(store: FlakyStore) -> None:
    """Between two events the same sessions are read again: few events, and nothing is lost."""
    slow = POLICY.replace("min_units: 20", "min_units: 500")
    start_rollout(store, slow, now_s=START_S, rollout_id=ROLLOUT)
    runner = begin(store)
    for second in range(25):
        serve(store, second, num_sessions=2)
        last = runner.tick(START_S + second + 0.5)

    events = list(EventLog(store).read(ROLLOUT))
    assert [(e.kind, e.at_s - START_S) for e in events] == [
        ("started", 0.5),
        ("hold", 0.5),
        ("evidence", 10.5),
        ("evidence", 20.5),
    ]
    assert last.decision is not None
    cell = last.decision.state.cell("agree", "long", "medium")
    assert cell is not None
    assert cell.units == 50


def test_state_is_the_same_whether_evidence_was_kept_or_read_again(tmp_path: Path) -> None:
    """Writing down every tick or only those that must be leads to the same bytes."""
    found = []
    for keep_ticks in (1, 10):
        with (
            pytest.MonkeyPatch.context() as patch,
            FlakyStore.open(f"sqlite:///{tmp_path}/{keep_ticks}.db") as store,
        ):
            patch.setattr("sentei.pipeline.rollout.runner.KEEP_TICKS", keep_ticks)
            run(store, 20)
            found.append(
                [e.state for e in EventLog(store).read(ROLLOUT) if e.kind not in ("evidence", "hold")]
            )
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_many_numbers_are_written_down_before_they_are_too_many(
    store: FlakyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to be read again at each tick is bounded, whatever the traffic."""
    monkeypatch.setattr("sentei.pipeline.rollout.runner.KEEP_NUMBERS", 20)
    start_rollout(store, POLICY.replace("min_units: 20", "min_units: 500"), now_s=START_S, rollout_id=ROLLOUT)
    runner = begin(store)
    for second in range(4):
        serve(store, second)
        runner.tick(START_S + second + 0.5)

    counts = [event.kind for event in EventLog(store).read(ROLLOUT)]
    assert counts == ["started", "hold", "evidence"]


def test_what_the_newest_tick_saw_can_be_shown(store: FlakyStore) -> None:
    """A tick that is not written down leaves a look, which the next event makes old."""
    runner = begin(store)
    serve(store, 0)
    runner.tick(START_S + 0.5)
    assert read_look(store, ROLLOUT, after_s=0.0) is None
    serve(store, 1)
    result = runner.tick(START_S + 1.5)

    look = read_look(store, ROLLOUT, after_s=START_S + 0.5)

    assert result.event is None
    assert look is not None
    assert look["verdicts"][0]["units"] == 16
    assert read_look(store, ROLLOUT, after_s=START_S + 1.5) is None


def test_a_policy_that_the_store_does_not_have_is_named(store: FlakyStore) -> None:
    """A digest without a text is an error with both names, not a guess."""
    begin(store)

    with pytest.raises(LookupError, match=r"rollout 'r1' has no policy of digest abc"):
        PolicyBook(store).find(ROLLOUT, "abc")


def test_an_hour_of_the_cautious_policy_keeps_twelve_snapshots(store: FlakyStore) -> None:
    """What docs/guides/records.md says that the log costs: events per hour, and bytes per event."""
    text = (EXAMPLES / "cautious.yaml").read_text(encoding="utf-8")
    start_rollout(store, text, now_s=START_S, rollout_id=ROLLOUT)
    runner = begin(store)
    for minute in range(61):
        for i, slice_id in enumerate(("mid", "long")):
            place = {"slice_id": slice_id, "rung_id": "mild", "at_s": START_S + 60 * minute}
            store.add_request(make_request(2 * minute + i, share=0.0, **place))
            store.add_audit(make_audit(2 * minute + i, kl=0.003 + minute / 7e4, kl_floor=0.001, **place))
        runner.tick(START_S + 60 * minute + 1)

    events = [event for event in EventLog(store).read(ROLLOUT) if event.kind == "evidence"]
    sizes = [len(event.state) + len(json.dumps(event.payload)) for event in events]
    daily_mb = 24 * len(events) * sizes[-1] / 1e6
    print(f"{len(events)} events an hour of {sizes[-1]} bytes, {daily_mb:.1f} MB a day")
    assert len(events) == 12
    assert max(sizes) < 22_000


def test_an_event_is_named_after_its_deed_and_not_after_a_refusal() -> None:
    """A slice that falls gives the event its kind, whatever order was refused in the same tick."""
    story = Story(make_policy())
    story.run_to("half-medium")
    bad = story.audits(30, excess=0.6, slices=("long",), value_name="audit.token_disagreement")

    fell = story.tick(bad, commands=story.order("approve"))
    refused = story.tick(commands=story.order("retry"))

    assert [item.kind for item in fell.actions] == ["rung_down", "refuse"]
    assert (event_kind(fell), event_kind(refused)) == ("rung_down", "refuse")
