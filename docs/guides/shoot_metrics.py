"""Take the picture of docs/guides/metrics.md: two panels of the dashboard over planted series.

python docs/guides/shoot_metrics.py [--into docs/images]

Needs Prometheus, whose own page draws them, and Chromium (Debian: apt-get install prometheus chromium) and
Pillow. The series are made up: a rollout in four stages whose quality turns bad, and which is rolled back in
the tick after harm is proven. The queries are those of infra/grafana/sentei.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pictures import free_port, take, wait  # beside this file

ROOT = Path(__file__).resolve().parents[2]
PANELS = ("Share of sparse", "Evidence of harm over its bound")
STEP_S, LENGTH_S = 15, 3 * 3600
STAGES = ((0, 0.0), (2400, 0.05), (4800, 0.25), (7200, 0.5))  # begins after so many seconds, with this share
TURNS_BAD_S = 8400
HARM_BOUND = 5.3  # log e-value
WIDTH, HEADER, PANEL = 1100, 104, 698  # pixels


def main() -> None:
    """Plant, serve, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "images")
    into = parser.parse_args().into
    end_s = int(time.time()) // STEP_S * STEP_S
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "series.om").write_text("".join(series(end_s)), encoding="utf-8")
        (folder / "prometheus.yml").write_text("global: {}\n", encoding="utf-8")
        plant = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "series.om", "data"]
        subprocess.run(plant, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        server = subprocess.Popen([*command, f"--web.listen-address={address}"], cwd=folder)
        try:
            wait(f"http://{address}/-/ready")
            height = HEADER + PANEL * len(PANELS)
            take(
                page(address, end_s),
                into / "dashboard-planted.png",
                size=(WIDTH, height),
                crop=(0, HEADER, WIDTH, height),
                settle_ms=15_000,
                colours=64,
            )
        finally:
            server.terminate()
            server.wait(30)


def series(end_s: int) -> Iterator[str]:
    """The planted series, as OpenMetrics: of each metric all its points, in order of time."""
    rng = random.Random(7)
    evidence = {"agree": 0.0, "quality": 0.0}
    share: list[str] = []
    harm: dict[str, list[str]] = {guardrail: [] for guardrail in evidence}
    bound: dict[str, list[str]] = {guardrail: [] for guardrail in evidence}
    of_slice = 'slice="long",rung="mild"'
    for since_s in range(0, LENGTH_S + 1, STEP_S):
        at_s = end_s - LENGTH_S + since_s
        is_over = max(evidence.values()) >= HARM_BOUND
        planned = max(value for begin_s, value in STAGES if since_s >= begin_s)
        share.append(f"sentei_share_ratio{{{of_slice}}} {0.0 if is_over else planned} {at_s}\n")
        for guardrail in evidence:
            if not is_over:
                drift = 0.09 if guardrail == "quality" and since_s > TURNS_BAD_S else -0.03
                evidence[guardrail] = max(0.0, evidence[guardrail] + drift + rng.gauss(0, 0.05))
            labels = f'{{guardrail="{guardrail}",{of_slice},of="harm"}}'
            harm[guardrail].append(
                f"sentei_guardrail_log_evidence{labels} {evidence[guardrail]:.4f} {at_s}\n"
            )
            bound[guardrail].append(f"sentei_guardrail_log_evidence_bound{labels} {HARM_BOUND} {at_s}\n")
    yield from ("# TYPE sentei_share_ratio gauge\n", *share)
    yield from ("# TYPE sentei_guardrail_log_evidence gauge\n", *chain.from_iterable(harm.values()))
    yield from ("# TYPE sentei_guardrail_log_evidence_bound gauge\n", *chain.from_iterable(bound.values()))
    yield "# EOF\n"


def page(address: str, end_s: int) -> str:
    """The page of Debian's Prometheus with the panels' queries, below each other."""
    dashboard = json.loads((ROOT / "infra" / "grafana" / "sentei.json").read_text(encoding="utf-8"))
    panels = {panel["title"]: panel for panel in dashboard["panels"]}
    words: list[tuple[str, str]] = []
    for i, title in enumerate(PANELS):
        [target] = panels[title]["targets"]
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(end_s))
        words += [(f"g{i}.range_input", "3h"), (f"g{i}.end_input", until), (f"g{i}.tab", "0")]
        words.append((f"g{i}.expr", target["expr"]))
    return f"http://{address}/classic/graph?{urllib.parse.urlencode(words, quote_via=urllib.parse.quote)}"


if __name__ == "__main__":
    main()
