"""The report: the decision, its numbers and its words, as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sentei.monitors.records import DriftResult
from sentei.monitors.store import Store
from sentei.monitors.tables import EVENTS
from sentei.pipeline.reports.figures import audit_overhead, quality_figures, savings, slice_figures
from sentei.pipeline.reports.rollout_report import (
    ReportError,
    build_report,
    proven_range,
    render_html,
    render_json,
    save_report,
)
from sentei.pipeline.rollout.runner import RolloutRunner, RunnerOptions, start_rollout
from tests.fakes_records import POLICY, ROLLOUT, START_S, make_audit, make_request

EVALUATION = {
    "model": "pocket",
    "rungs": [{"rung": "medium", "density": 0.11, "nll_delta": 0.012, "nll_delta_ci": [0.009, 0.015]}],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file of its own."""
    with Store.open(f"sqlite:///{tmp_path}/state.db") as opened:
        yield opened


def play(store: Store, seconds: int, **changes: Any) -> None:
    """A rollout with sparse twice as fast as dense."""
    start_rollout(store, POLICY, now_s=START_S, rollout_id=ROLLOUT, about={"model": "<b>pocket</b>"})
    runner = RolloutRunner.open(store, ROLLOUT, RunnerOptions("me"))
    for second in range(seconds):
        for i in range(second * 8, second * 8 + 8):
            is_sparse = i % 2 == 0
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
            store.add_audit(make_audit(i, at_s=START_S + second, **changes))
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
    assert report.savings.compute_change == pytest.approx(-0.5)
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


def test_few_requests_give_no_percentile() -> None:
    """A handful of requests is counted and not summed up."""
    figures = slice_figures(rows(3), ["long"])

    assert figures[0].sparse.requests == 3
    assert figures[0].sparse.ttft_ms_p95 is None
    assert savings(figures, []).ttft_p50_change is None


def test_failures_are_counted_and_left_out_of_times() -> None:
    """A slow rescue does not make sparse look slow, and it does not vanish."""
    figures = slice_figures([*rows(30), *rows(2, outcome="fallback_mid", ttft_ms=99999.0)], ["long"])

    sparse = figures[0].sparse
    assert (sparse.requests, sparse.failed, sparse.fallbacks, sparse.ttft_ms_p95) == (32, 2, 2, 400.0)


def test_nothing_measured_is_no_figure() -> None:
    """No audits and no requests give empty figures, not zeros."""
    assert quality_figures([]) == ()
    assert audit_overhead([], []).share is None
    assert slice_figures([], ["long"])[0].dense.compute_s_per_1k_tokens is None
