"""The report: the decision, its numbers and its words, as a page and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sentei.monitors.records import DriftResult
from sentei.monitors.store import Store
from sentei.monitors.tables import EVENTS
from sentei.pipeline.reports.figures import (
    audit_overhead,
    newest_quality,
    quality_figures,
    savings,
    slice_figures,
)
from sentei.pipeline.reports.rollout_report import (
    ReportError,
    build_report,
    proven_range,
    render_html,
    render_json,
    save_report,
)
from sentei.pipeline.reports.wording import headline
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from tests.fakes_records import POLICY, ROLLOUT, START_S, WITH_BENEFIT, make_audit, make_request

EVALUATION = {
    "model": "pocket",
    "rungs": [{"rung": "medium", "density": 0.11, "nll_delta": 0.012, "nll_delta_ci": [0.009, 0.015]}],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


PRICED = {
    "model": "pocket",
    "window_tokens": 4000,
    "costs": {
        "machine": {"device": "cpu", "cpus": 2},
        "rows": [],
        "setup_s": 0.0,
        "assumptions": {"one_off_usd": 0, "tokens_per_day": 1, "audited_share": 0.05},
        "not_measured": [],
    },
    "rungs": [
        {"rung": "dense", "density": 1.0, "peak_mib": 100.0},
        {"rung": "medium", "density": 0.1, "peak_mib": 80.0, "ppl_cost_pct": 1.2},
    ],
}


def play(
    store: Store, seconds: int, *, policy: str = POLICY, variant: str | None = None, **changes: Any
) -> None:
    """A rollout with sparse twice as fast as dense; `variant` serves all of it, else both take turns."""
    start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT, about={"model": "<b>pocket</b>"})
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    for second in range(seconds):
        for i in range(second * 8, second * 8 + 8):
            is_sparse = i % 2 == 0 if variant is None else variant == "sparse"
            store.add_request(
                make_request(
                    i,
                    at_s=START_S + second,
                    share=0.5,
                    variant_assigned="sparse" if is_sparse else "dense",
                    ttft_ms=500.0 if is_sparse else 1000.0,
                    compute_s=1.0 if is_sparse else 2.0,
                )
            )
            store.add_audit(make_audit(i, at_s=START_S + second, prompt_tokens=4000, **changes))
        runner.tick(START_S + second + 0.5)


def rows(num_rows: int, **changes: Any) -> list[dict[str, Any]]:
    """Request rows as plain dicts."""
    request = make_request(0, **changes)
    return [{name: getattr(request, name) for name in request.__dataclass_fields__}] * num_rows


def test_promoted_rollout_in_numbers(store: Store) -> None:
    """The report says what was decided, that it is safe, and what it saved."""
    play(store, 15)

    report = build_report(store, ROLLOUT)

    assert (report.outcome, report.share_now, report.chain) == ("promoted", 0.95, "verified")
    assert report.savings.ttft_p50_change == pytest.approx(-0.5)
    assert report.savings.paired_compute_change == pytest.approx(-0.4)
    assert [v["verdict"] for v in report.verdicts] == ["safe"]
    assert [entry.kind for entry in report.timeline] == ["started", "advance", "advance", "promote"]
    assert "serves 95% of the routed sessions, with 40% less model time" in report.headline


def test_rolled_back_rollout_names_the_guardrail(store: Store) -> None:
    """Why it failed stands in the report, and nothing is on sparse any more."""
    play(store, 10, token_disagreement=0.6)

    report = build_report(store, ROLLOUT)

    assert (report.outcome, report.by, report.share_now) == ("rolled_back", "agree", 0.0)
    assert "every request is answered by dense" in report.headline
    assert "over bound 0.1" in report.reason


def test_page_is_whole_escaped_and_shows_every_section(store: Store) -> None:
    """One file, no script, nothing from elsewhere; foreign text cannot become markup."""
    play(store, 15)
    store.add_drift(DriftResult(ROLLOUT, "kl_drift", START_S, "drift", 3.0, 2.0, 10, 1, "kl <high>"))

    page = render_html(build_report(store, ROLLOUT, evaluation=EVALUATION))

    for section in ("decision", "safe", "timeline", "saved", "quality", "slices", "audit", "evaluation"):
        assert f'id="{section}"' in page
    assert "<svg" in page
    assert "<script" not in page
    assert "http" not in page
    assert "<b>pocket" not in page
    assert "kl &lt;high&gt;" in page
    assert "Promoted" in page


def test_json_holds_the_same_and_no_broken_numbers(store: Store) -> None:
    """The JSON document can be read by anything."""
    play(store, 2, kl=float("nan"))

    document = json.loads(render_json(build_report(store, ROLLOUT)))

    assert document["outcome"] == "running"
    assert document["quality"][0]["kl"] is None


def test_report_of_an_event_ignores_what_came_later(store: Store) -> None:
    """Made late, it says the same as made at once."""
    play(store, 15)
    last = build_report(store, ROLLOUT).timeline[-1].seq
    early = render_json(build_report(store, ROLLOUT, upto_event=last))
    for i in range(500, 520):
        store.add_request(make_request(i, outcome="failed"))

    assert render_json(build_report(store, ROLLOUT, upto_event=last)) == early


def test_figures_end_where_the_next_rollout_begins(store: Store) -> None:
    """An audit that comes late, and was replayed in another rollout's time, is in nobody's figures."""
    play(store, 15)
    before = build_report(store, ROLLOUT)
    start_rollout(store, POLICY, now_s=START_S + 20, rollout_id="r2", replaces=True)
    for i in range(500, 504):
        store.add_request(make_request(i, at_s=START_S + 20, share=0.5))
        store.add_audit(make_audit(i, at_s=START_S + 21, token_disagreement=1.0))

    after = build_report(store, ROLLOUT)

    assert after.quality == before.quality
    assert after.audit == before.audit
    assert after.slices == before.slices


@pytest.mark.parametrize(
    ("verdict", "interval"),
    [("safe", (-0.1, 0.1)), ("harm", (0.1, 0.15)), ("undecided", (-0.1, 0.15))],
)
def test_the_interval_agrees_with_the_verdict(verdict: str, interval: tuple[float, float]) -> None:
    """What is proven to lie on one side of its bound is not shown on the other."""
    found = {"verdict": verdict, "low": -0.1, "high": 0.15, "bound": 0.1, "log_e_harm": 9.0, "threshold": 5.0}

    shown = {**found, **proven_range(found)}

    assert (shown["low"], shown["high"]) == interval


def test_broken_log_is_said_loudly(store: Store) -> None:
    """A report on a changed history says so."""
    play(store, 3)
    with store.write("forgery") as connection:
        connection.execute(sa.update(EVENTS).where(EVENTS.c.seq == 1).values(payload_json="{}"))

    report = build_report(store, ROLLOUT)

    assert "event 1 is broken" in report.chain
    assert "BROKEN" in render_html(report)


def test_report_before_the_first_tick_has_nothing_to_say(store: Store) -> None:
    """An unknown rollout is named together with the known ones."""
    start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT)

    with pytest.raises(ReportError, match=r"'nope' has no events in .*: 'r1'"):
        build_report(store, "nope")


def test_report_is_saved_as_page_and_json(store: Store, tmp_path: Path) -> None:
    """Both files carry the rollout's id."""
    play(store, 2)

    html_path, json_path = save_report(build_report(store, ROLLOUT), tmp_path / "reports")

    assert (html_path.name, json_path.name) == ("r1.html", "r1.json")
    assert html_path.read_text().startswith("<!doctype html>")


def test_totals_compare_slices_and_not_arms() -> None:
    """With sparse only on short prompts, adding up arms would call it faster; slice by slice it is not."""
    requests = [
        *rows(90, slice_id="short", variant_assigned="sparse", ttft_ms=100.0),
        *rows(20, slice_id="short", variant_assigned="dense", ttft_ms=100.0),
        *rows(20, slice_id="long", variant_assigned="sparse", ttft_ms=1000.0),
        *rows(90, slice_id="long", variant_assigned="dense", ttft_ms=1000.0),
    ]

    saved = savings(slice_figures(requests, ["short", "long"]), [])

    assert saved.ttft_p50_change == pytest.approx(0.0)
    assert saved.slices_compared == 2


def test_few_answers_show_their_median_and_their_slowest_and_are_said_to_be_few() -> None:
    """18 sparse answers once showed no latency at all, for want of 20."""
    slow = rows(1, ttft_ms=900.0)
    figures = slice_figures([*rows(17), *slow, *rows(30, variant_assigned="dense")], ["long"])
    sparse, dense = figures[0].sparse, figures[0].dense

    assert (sparse.answered, sparse.ttft_ms_p50, sparse.ttft_ms_p95) == (18, 400.0, 900.0)
    assert (sparse.is_few, dense.is_few) == (True, False)
    saved = savings(figures, [])
    assert (saved.ttft_p50_change, saved.is_few) == (pytest.approx(0.0), True)
    assert savings(slice_figures(rows(3), ["long"]), []).ttft_p50_change is None  # no dense answer


def test_the_saving_is_that_of_the_newest_rung() -> None:
    """A mild rung that was climbed past says nothing of what is served now."""
    mild = [audit_row(i, rung_id="mild", sparse_compute_s=1.4) for i in range(30)]
    bold = [audit_row(i, rung_id="bold", sparse_compute_s=0.5) for i in range(10)]

    newest = newest_quality(quality_figures([*mild, *bold]))
    assert savings([], newest).paired_compute_change == pytest.approx(-0.5)


def test_the_rung_is_the_one_of_the_newest_score_in_figures_words_and_evaluation(store: Store) -> None:
    """Two slices climb, each in its turn; a late audit of the mild rung has no score: it counts nowhere."""
    policy = POLICY.replace("ladder: [{id: medium}]", "ladder: [{id: mild}, {id: medium}]").replace(
        "buckets: [{id: long, range: [0, 32768]}]",
        "buckets: [{id: long, range: [0, 32768]}, {id: huge, range: [32768, 65536]}]",
    )
    start_rollout(store, policy, now_s=START_S, rollout_id=ROLLOUT)
    audits = [("long", "mild"), ("huge", "mild"), ("long", "medium"), ("huge", "mild")]
    for i, (slice_id, rung_id) in enumerate(audits):
        is_last = i == len(audits) - 1
        store.add_audit(
            make_audit(i, slice_id=slice_id, rung_id=rung_id, status="missing" if is_last else "scored")
        )
    RolloutRunner.open(store, ROLLOUT, RunnerOptions("me")).tick(START_S + 9)

    report = build_report(store, ROLLOUT, evaluation=PRICED)

    assert report.rung_id == "medium"
    assert report.evaluated_rung == PRICED["rungs"][1]
    saved = {item.key: item for item in report.first_screen.saved}
    assert saved["memory"].words == "offline, rung medium"
    assert report.savings.paired_compute_change == pytest.approx(-0.4)
    assert saved["model_time"].ratio == pytest.approx(0.6)


def test_the_headline_speaks_of_the_same_requests_only_where_they_were_replayed() -> None:
    """Two arms of different requests prove nothing of one request."""
    faster = [*rows(30, compute_s=1.0), *rows(30, variant_assigned="dense", compute_s=2.0)]

    saved = savings(slice_figures(faster, ["long"]), ())

    assert headline("promoted", 0.95, saved) == (
        "Sparse attention passed every gate and serves 95% of the routed sessions."
    )


def audit_row(i: int, **changes: Any) -> dict[str, Any]:
    """An audit's row as a plain dict."""
    audit = make_audit(i, **changes)
    return {name: getattr(audit, name) for name in audit.__dataclass_fields__}


def test_the_first_screen_answers_three_questions(store: Store) -> None:
    """What it saved, what it cost in quality, whether that is proven: as lines, in words and as a picture."""
    play(store, 15, policy=WITH_BENEFIT)

    report = build_report(store, ROLLOUT, evaluation=PRICED)
    screen = report.first_screen

    saved = {item.name: item for item in screen.saved}
    assert [*saved] == ["Model time", "First token", "Answer speed", "Money", "Memory at peak"]
    time = saved["Model time"]
    assert (time.dense, time.sparse, time.proof) == (1.0, pytest.approx(0.6), "proven")
    assert time.ratio == pytest.approx(0.6)
    assert "0.6 times dense per session" in time.words
    assert "proven below 0.9" in time.words
    assert (saved["First token"].dense, saved["First token"].sparse) == (1000.0, 500.0)
    assert saved["Answer speed"].sparse == pytest.approx(1000 / 30)
    money = saved["Money"]
    assert money.dense == pytest.approx(0.0816 / 2 / 3600 * 1e6 * 1.0 / 4050)
    assert money.ratio == pytest.approx(0.6)
    assert (saved["Memory at peak"].dense, saved["Memory at peak"].sparse) == (100.0, 80.0)
    spent = {item.name: item for item in screen.spent}
    assert spent["tokens that dense would not pick"].proof == "proven"
    assert spent["perplexity"].measured == 1.2
    assert screen.saving_in_words.startswith("The saving is proven (long: 0.6 times")
    assert screen.safety_in_words == "It is safe: agree is proven within its bound."
    page = render_html(report)
    first = page[: page.index('id="safe"')]
    assert "<svg" in first
    assert "–" not in first
    assert "proven below 0.9" in first


def test_a_first_screen_without_a_served_answer_says_so(store: Store) -> None:
    """In shadow nobody waits for sparse: no dash, a reason."""
    play(store, 1, policy=WITH_BENEFIT, variant="dense")

    report = build_report(store, ROLLOUT)

    words = {item.name: item.words for item in report.first_screen.saved}
    assert words["First token"] == "sparse served nobody yet"
    assert words["Money"] == "no price: no evaluation is at hand"
    assert {item.name: item.about for item in report.first_screen.saved}["Money"] == "per million tokens"
    assert "Memory at peak" not in words
    page = render_html(report)
    assert "–" not in page[: page.index('id="safe"')]


def test_a_held_rollout_says_that_it_does_not_pay(store: Store) -> None:
    """The heading, the words and the reason with the ratio and its bounds."""
    play(store, 12, policy=WITH_BENEFIT, sparse_compute_s=1.3)

    report = build_report(store, ROLLOUT)
    page = render_html(report)

    assert (report.outcome, report.decided, report.by) == ("held", "held", "compute")
    assert "compute in long at medium: no gain: 1.3 times dense's model time (" in report.reason
    assert "Held: no gain" in page
    assert "Sparse attention does not pay here, with 30% more model time on the same requests" in page
    assert report.first_screen.saving_in_words.startswith("There is no saving (long: 1.3 times")
    assert report.first_screen.saved[0].proof == "against"
    assert re.search(r'<circle class="hold" [^>]*><title>held</title>', page)


def test_a_resumed_rollout_is_not_told_by_the_end_that_was_undone(store: Store) -> None:
    """Held for want of a gain and resumed: it goes on, and its verdicts are the newest."""
    play(store, 12, policy=WITH_BENEFIT, sparse_compute_s=1.3)
    store.add_command(ROLLOUT, "resume", by="ann", at_s=START_S + 12)
    RolloutRunner.open(store, ROLLOUT, RunnerOptions("me")).tick(START_S + 12.5)

    report = build_report(store, ROLLOUT)

    assert report.outcome == "running"
    assert [item["verdict"] for item in report.gains] == ["undecided"]
    assert report.first_screen.saving_in_words.startswith("The saving is not proven")


def test_a_retried_rollout_is_told_by_its_own_try(store: Store) -> None:
    """Nothing is judged until the second try has evidence; then its own verdicts are shown."""
    retry = POLICY + "  rollback: {retry: {max: 3, cool_off: 0s}}\n"
    play(store, 10, policy=retry, token_disagreement=0.6)
    first = build_report(store, ROLLOUT)
    store.add_command(ROLLOUT, "retry", by="ann", at_s=START_S + 11)
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    runner.tick(START_S + 12)
    retried = build_report(store, ROLLOUT)
    for i in range(200, 208):
        store.add_request(make_request(i, at_s=START_S + 13, variant_assigned="dense"))
        store.add_audit(make_audit(i, at_s=START_S + 13, variant_served="dense"))
    runner.tick(START_S + 14)
    second_try = build_report(store, ROLLOUT)
    store.add_command(ROLLOUT, "abort", by="ann", at_s=START_S + 15)
    runner.tick(START_S + 16)
    aborted = build_report(store, ROLLOUT)

    assert [item["verdict"] for item in first.verdicts] == ["harm"]
    assert (retried.outcome, retried.verdicts) == ("running", ())
    assert retried.first_screen.safety_in_words == "Whether it is safe was not judged yet."
    assert (second_try.outcome, second_try.verdicts[0]["units"]) == ("running", 8)
    assert (aborted.outcome, aborted.verdicts[0]["units"]) == ("rolled_back", 8)


def test_a_promoted_rollout_that_was_replaced_is_still_told_as_promoted(store: Store) -> None:
    """What it decided stands; that another took its place is a remark."""
    play(store, 15)
    start_rollout(store, POLICY, now_s=START_S + 40, rollout_id="r2", replaces=True)
    RolloutRunner.open(store, "r2", RunnerOptions("me")).tick(START_S + 40)

    report = build_report(store, ROLLOUT)

    assert (report.outcome, report.decided) == ("replaced", "promoted")
    assert "serves 95% of the routed sessions" in report.headline
    assert "A newer rollout has taken its place since." in render_html(report)


def test_failures_are_counted_and_left_out_of_times() -> None:
    """A slow rescue does not make sparse look slow, and it does not vanish."""
    figures = slice_figures([*rows(30), *rows(2, outcome="fallback_mid", ttft_ms=99999.0)], ["long"])

    sparse = figures[0].sparse
    assert (sparse.requests, sparse.failed, sparse.fallbacks, sparse.ttft_ms_p95) == (32, 2, 2, 400.0)


def test_model_time_is_compared_on_the_same_requests_only() -> None:
    """A slice whose replays have the time of one variant alone is no part of the comparison."""
    both = [audit_row(i, dense_compute_s=2.0, sparse_compute_s=1.0) for i in range(10)]
    half = [audit_row(i, slice_id="mid", dense_compute_s=8.0, sparse_compute_s=0.0) for i in range(10)]

    saved = savings([], newest_quality(quality_figures([*both, *half])))

    assert saved.paired_compute_change == pytest.approx(-0.5)


def test_nothing_measured_is_no_figure() -> None:
    """No audits and no requests give empty figures, not zeros."""
    assert quality_figures([]) == ()
    assert audit_overhead([], []).share is None
    assert slice_figures([], ["long"])[0].dense.compute_s_per_1k_tokens is None
