"""Alerts and dashboard: metrics that exist, series on which each fires, a healthy one on which none does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sentei.monitors.records import AuditStatus, Missing, Outcome
from sentei.policies.machine import Phase, Wait
from sentei.policies.signals import Verdict
from sentei.serving.metrics.counts import REASONS, VARIANTS
from sentei.serving.metrics.names import METRICS, Spec
from tests.infra.tools import INFRA, ROOT, load_package, read_yaml, run_tool

RULES = {
    rule["alert"]: rule for group in read_yaml("prometheus/rules.yaml")["groups"] for rule in group["rules"]
}
TESTS = read_yaml("prometheus/rules_test.yaml")["tests"]
DASHBOARD = json.loads((INFRA / "grafana" / "sentei.json").read_text(encoding="utf-8"))
QUERIES = [
    (panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]
SERIES = [(test["name"], series["series"]) for test in TESTS for series in test["input_series"]]
RUNBOOK = (ROOT / "docs" / "guides" / "runbook.md").read_text(encoding="utf-8")
SAMPLES: dict[str, Spec] = {spec.name + suffix: spec for spec in METRICS for suffix in spec.suffixes}
# What a label may say, where that is a fixed set of the code.
VALUES: dict[tuple[str, str], set[str]] = {
    ("sentei_rollout_phase", "phase"): {"waiting", *Phase},
    ("sentei_rollout_waits_for", "reason"): {*Wait},
    ("sentei_requests_total", "outcome"): {*Outcome},
    ("sentei_requests_total", "variant"): {*VARIANTS},
    ("sentei_ttft_seconds", "variant"): {*VARIANTS},
    ("sentei_fallbacks_total", "reason"): {*REASONS},
    ("sentei_audits_total", "status"): {*AuditStatus},
    ("sentei_audits_total", "reason"): {"", *Missing},
    ("sentei_guardrail_verdict", "verdict"): {*Verdict},
    ("sentei_guardrail_log_evidence", "of"): {"harm", "safe"},
    ("sentei_guardrail_log_evidence_bound", "of"): {"harm", "safe"},
    ("sentei_worker_up", "worker"): {"controller", "auditor"},
}


def complaints(query: str) -> list[str]:
    """What is wrong with the metrics, labels and values that a query names."""
    found, used = [], set[str]()
    for name, matchers in re.findall(r"\b(sentei_\w+)(?:\{([^}]*)\})?", query):
        spec = SAMPLES.get(name)
        if spec is None:
            found.append(f"{name} is no metric")
            continue
        used |= {*spec.labels, "le"}
        for label, text in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers):
            if label not in (*spec.labels, "le"):
                found.append(f"{name} has no label {label}")
            allowed = VALUES.get((spec.name, label))
            if allowed is not None and not set(text.split("|")) <= allowed:
                found.append(f"{label} of {name} is never {text}")
    for labels in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query):
        found += [
            f"nothing has the label {label}" for label in re.findall(r"\w+", labels) if label not in used
        ]
    return found


@pytest.mark.parametrize(("place", "query"), [*((n, r["expr"]) for n, r in RULES.items()), *QUERIES, *SERIES])
def test_metrics_of_rules_and_dashboard_exist(place: str, query: str) -> None:
    """Each metric, label and value that an alert, a panel or a planted series names is in the app's list."""
    assert complaints(query) == []


def test_wrong_names_would_be_found() -> None:
    """The test above sees a metric, a label, a value and a grouping that do not exist."""
    query = 'sum by (session) (sentei_requests{a="b"}) + sentei_rollout_phase{phase="lost", slice="x"}'

    assert complaints(query) == [
        "sentei_requests is no metric",
        "phase of sentei_rollout_phase is never lost",
        "sentei_rollout_phase has no label slice",
        "nothing has the label session",
    ]


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    """What is worth counting is worth seeing."""
    text = "\n".join([*(rule["expr"] for rule in RULES.values()), *(query for _, query in QUERIES)])

    assert [
        spec.name for spec in METRICS if not re.search(rf"\b{spec.name}(_bucket|_sum|_count)?\b", text)
    ] == []


def test_rules_are_rules_to_prometheus() -> None:
    """promtool takes the file."""
    done = run_tool("promtool", "check", "rules", "prometheus/rules.yaml")

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in done.stdout


def test_each_alert_fires_on_its_series_and_on_no_healthy_one() -> None:
    """promtool plays all series; each alert is expected once with its words, not before, not in health."""
    done = run_tool("promtool", "test", "rules", "prometheus/rules_test.yaml")
    healthy, *planted = TESTS
    asked: dict[str, list[list[Any]]] = {
        test["name"]: [each["exp_alerts"] for each in test["alert_rule_test"]] for test in planted
    }

    assert done.returncode == 0, done.stdout
    assert "SUCCESS" in done.stdout
    assert healthy["name"] == "healthy"
    assert {test["alertname"] for test in healthy["alert_rule_test"]} == set(RULES)
    assert all(test["exp_alerts"] == [] for test in healthy["alert_rule_test"])
    assert list(asked) == list(RULES)
    for name, expected in asked.items():
        assert expected[0] == [], name
        assert [len(alerts) for alerts in expected[1:]] == [1], name


def test_health_knows_every_metric_that_an_alert_reads() -> None:
    """No alert is silent in health because its series are not there."""
    read = {name for rule in RULES.values() for name in re.findall(r"\b(?:sentei_\w+|up)\b", rule["expr"])}
    there = {re.split(r"[{ ]", series["series"])[0] for series in TESTS[0]["input_series"]}

    assert read - {"sentei"} <= there


@pytest.mark.parametrize("name", RULES)
def test_alert_has_its_page(name: str) -> None:
    """The runbook says of each alert what it means, what to look at and what to do."""
    page = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOK, flags=re.MULTILINE | re.DOTALL)

    assert RULES[name]["annotations"]["runbook"] == f"docs/guides/runbook.md#{name.lower()}"
    assert RULES[name]["labels"]["severity"] in ("page", "ticket")
    assert page is not None
    assert re.findall(r"^\*\*(.+?)\.\*\*", page[1], flags=re.MULTILINE) == ["Means", "Look", "Do"]


def test_runbook_has_no_page_without_an_alert() -> None:
    """A page that nobody is sent to is not kept."""
    assert re.findall(r"^## (Sentei\w+)", RUNBOOK, flags=re.MULTILINE) == list(RULES)


def test_queries_of_the_dashboard_are_queries(tmp_path: Path) -> None:
    """Prometheus' own parser takes each of them."""
    rules = [
        {"record": f"panel:{i}", "expr": query.replace("$__rate_interval", "5m")}
        for i, (_, query) in enumerate(QUERIES)
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")

    done = run_tool("promtool", "check", "rules", path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(QUERIES) >= 30


def test_dashboard_is_one_to_grafana() -> None:
    """Grafana's own types read the dashboard and write it again as it was: no field is unknown to them."""
    dashboard = load_package("grafana_foundation_sdk.models.dashboard").Dashboard
    encoder = load_package("grafana_foundation_sdk.cog.encoder").JSONEncoder
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in DASHBOARD["panels"]]

    again = json.loads(encoder().encode(dashboard.from_json(DASHBOARD)))

    assert without_absent(DASHBOARD, again) == DASHBOARD
    assert len(set(places)) == len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert all(x + w <= 24 for x, _, w, _ in places)


def without_absent(given: Any, again: Any) -> Any:
    """What was written again, without the defaults that were added."""
    if isinstance(given, dict) and isinstance(again, dict):
        return {key: without_absent(given[key], again[key]) for key in given if key in again}
    if isinstance(given, list) and isinstance(again, list) and len(given) == len(again):
        return [without_absent(*pair) for pair in zip(given, again, strict=True)]
    return again
