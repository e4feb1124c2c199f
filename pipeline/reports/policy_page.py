"""A policy on one page: its stages over time, and what it does in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sentei.pipeline.reports.pages import render_template
from sentei.pipeline.reports.share_chart import draw_share
from sentei.policies.review.advice import find_advice, readable, said
from sentei.policies.review.forecast import Expected, StageForecast, best_s, forecast
from sentei.policies.review.sentences import explain
from sentei.policies.schema.policy import Policy

_SHOWN_S = 1.0  # a stage without any known length is drawn so long


@dataclass(frozen=True, slots=True)
class StageMark:
    """Where a stage begins, for the chart."""

    at_s: float
    kind: str
    share: float
    stage_id: str


def save_explanation(policy: Policy, expected: Expected, path: Path) -> Path:
    """Write the page and return where it is."""
    stages = forecast(policy, expected)
    marks = _marks(stages)
    shares = [(mark.at_s, mark.share) for mark in marks]
    page = render_template(
        "policy.html",
        name=policy.metadata.name,
        digest=policy.digest,
        chart=draw_share([*shares, (_end_s(stages), shares[-1][1])], marks),
        sentences=explain(policy, stages),
        stages=stages,
        advice=[said(item) for item in find_advice(policy, expected)],
        readable=readable,
        traffic=expected.sessions_per_hour,
        best=readable(best_s(stages)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _marks(stages: tuple[StageForecast, ...]) -> list[StageMark]:
    at_s, marks = 0.0, []
    for stage in stages:
        marks.append(StageMark(at_s, "advance", stage.share, stage.stage_id))
        at_s += stage.best_s if math.isfinite(stage.best_s) else _SHOWN_S
    return marks


def _end_s(stages: tuple[StageForecast, ...]) -> float:
    return sum(stage.best_s if math.isfinite(stage.best_s) else _SHOWN_S for stage in stages)
