"""The list of metrics: names that say their unit, and a guide that has the same list."""

from __future__ import annotations

import re
from pathlib import Path

from sentei.policies.machine import Phase
from sentei.serving.errors import VariantError
from sentei.serving.metrics.counts import REASONS
from sentei.serving.metrics.names import MAX_SERIES, METRICS, OTHER, Page, Words

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "metrics.md").read_text(encoding="utf-8")


def test_guide_has_the_same_list() -> None:
    """Each line of the guide's table is a metric as the code has it, in its order, and none is left out."""
    line = re.compile(r"^\| `(sentei_\w+)` \| (\w+) \| (.*?) \| (\w+) \| (.*?) \|$", flags=re.MULTILINE)
    rows = [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), source, text)
        for name, kind, labels, source, text in line.findall(GUIDE)
    ]

    assert rows == [(spec.name, spec.kind, spec.labels, spec.source.value, spec.text) for spec in METRICS]


def test_names_say_what_they_are() -> None:
    """A counter ends in `_total`, times are in seconds, shares are ratios; nothing is there twice."""
    names = [spec.name for spec in METRICS]

    assert len(set(names)) == len(names)
    for spec in METRICS:
        assert (spec.kind == "counter") == spec.name.endswith("_total"), spec.name
        assert not re.search(r"_(ms|percent|pct|milliseconds)\b", spec.name), spec.name
        assert len(set(spec.labels)) == len(spec.labels)
        if spec.kind == "histogram":
            assert spec.name.endswith(("_seconds", "_ratio")), spec.name


def test_reasons_of_fallbacks_are_those_of_the_code() -> None:
    """Each reason that serving gives a VariantError is in the list, and the list has no other."""
    files = [*(ROOT / "serving").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if "/metrics/" not in str(path))
    used = set(re.findall(r'VariantError\(\s*[\w.]+,\s*"(\w+)"', text)) | {"error", "crash"}

    assert used == set(REASONS)
    assert VariantError("sparse", "crash").reason in REASONS


def test_words_let_few_through() -> None:
    """The first values stay what they are, also later; others, and what is no word, become `other`."""
    words = Words(limit=2)

    first = [words(text) for text in ("long", "short", "third", "long", "", 'a"b', "a\nb", "x" * 65)]

    assert first == ["long", "short", OTHER, "long", OTHER, OTHER, OTHER, OTHER]


def test_page_takes_only_what_is_on_the_list() -> None:
    """Unknown names, other labels, a series twice and more series than allowed are left out."""
    page = Page()
    page.add("sentei_rollout_phase", 1.0, phase=Phase.RUNNING)
    page.add("sentei_rollout_phase", 0.0, phase=Phase.RUNNING)
    page.add("sentei_rollout_phase", 1.0, phase="running", session="s1")
    page.add("sentei_sessions", 1.0)
    for i in range(MAX_SERIES + 5):
        page.add("sentei_share_ratio", 0.5, slice=f"s{i}", rung="mild")

    found = {metric.name: metric.samples for metric in page.collect()}

    assert [sample.value for sample in found["sentei_rollout_phase"]] == [1.0]
    assert {name: len(samples) for name, samples in found.items()} == {
        "sentei_rollout_phase": 1,
        "sentei_share_ratio": MAX_SERIES,
    }
