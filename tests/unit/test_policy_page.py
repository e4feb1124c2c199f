"""`sentei policy explain`: the picture of a policy says what its numbers say."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sentei.pipeline.reports.policy_page import save_explanation
from sentei.pipeline.reports.share_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from sentei.policies.review.forecast import Expected, best_s, forecast
from sentei.policies.schema.load import load_policy
from sentei.policies.schema.policy import Policy
from tests.strategies_policy import EXAMPLES, make_policy

TRAFFIC = Expected(3600.0)


def page_of(policy: Policy, folder: Path, expected: Expected = TRAFFIC) -> str:
    """The page as text."""
    return save_explanation(policy, expected, folder / "page.html").read_text(encoding="utf-8")


def steps_of(page: str) -> list[tuple[float, float]]:
    """The step line back in seconds' parts of the whole and in shares."""
    points = re.search(r'<polyline class="line" points="([^"]+)"', page)
    assert points is not None
    found = []
    for point in points[1].split(" "):
        x, y = (float(number) for number in point.split(","))
        found.append(((x - LEFT) / (WIDTH - LEFT - RIGHT), (HEIGHT - BOTTOM - y) / (HEIGHT - TOP - BOTTOM)))
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_the_picture_is_the_forecast(name: str, tmp_path: Path) -> None:
    """Each share is as high as it is large, and each stage as wide as it is long at best."""
    policy = load_policy((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    stages, whole_s = forecast(policy, TRAFFIC), best_s(forecast(policy, TRAFFIC))

    steps = steps_of(page_of(policy, tmp_path))

    shares = [stage.share for stage in stages]
    heights = [share for _, share in steps]
    wanted = [shares[0], *(new for old, new in pairwise(shares) if new != old)]
    assert [new for old, new in pairwise([-1.0, *heights]) if abs(new - old) > 0.004] == pytest.approx(
        wanted, abs=0.005
    )
    begins, at_s = [], 0.0
    for before, stage in zip([None, *stages], stages, strict=False):
        if before is not None and before.share != stage.share:
            begins.append(at_s / whole_s)
        at_s += stage.best_s
    rises = [x for (x, low), (_, high) in pairwise(steps) if high - low > 0.004]
    assert rises == pytest.approx(begins, abs=0.002)


def test_the_picture_names_stages_and_times(tmp_path: Path) -> None:
    """Stages that are wide enough have their names, the axis has its times, and each stage its row."""
    policy = make_policy()
    page = page_of(policy, tmp_path)

    for stage in policy.spec.stages:
        assert f"<td>{stage.id}</td>" in page
        assert re.search(rf'<text class="name"[^>]*>{stage.id}</text>', page)
    assert re.search(r"<text[^>]*>0 s</text>", page)
    assert len(re.findall(r'<line class="stage"', page)) == len(policy.spec.stages)


def test_a_stage_without_an_end_is_drawn_and_said(tmp_path: Path) -> None:
    """A policy that can never end has a picture all the same, and the remark that says so."""

    def endless(document: dict[str, Any]) -> None:
        spec = document["spec"]
        spec["stages"] = [spec["stages"][1], spec["stages"][3] | {"rung": "mild"}]
        spec["guardrails"]["items"] = [spec["guardrails"]["items"][2] | {"advance": "all_safe"}]
        spec["signals"] = []

    page = page_of(make_policy(endless), tmp_path)

    assert steps_of(page)[0][1] == pytest.approx(0.5, abs=0.005)
    assert "Probably not meant" in page
    assert "can never end" in page
    assert "never enough" in page
