"""The trade-off, drawn: what each rung saves against what it costs in quality."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sentei.kernels.bench.run import Row
from sentei.kernels.hf.ladder import DENSE
from sentei.pipeline.evaluation.evaluate import Evaluation
from sentei.pipeline.experiments.study import StudyRow
from sentei.pipeline.measure.budget import Budget


def save_trade_off(evaluation: Evaluation, path: Path) -> Path:
    """Write one HTML page: perplexity cost by density and by prefill time, with baselines and intervals."""
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=("Quality cost by density", "Quality cost by prefill time")
    )
    rungs = [rung for rung in evaluation.rungs if rung.rung != DENSE]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [rung.nll_delta_ci[1] - rung.nll_delta for rung in rungs],
        "arrayminus": [rung.nll_delta - rung.nll_delta_ci[0] for rung in rungs],
    }
    for col, x in ((1, [rung.density for rung in rungs]), (2, [rung.prefill_s for rung in rungs])):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[rung.nll_delta for rung in rungs],
                error_y=error,
                text=[rung.rung for rung in rungs],
                mode="lines+markers+text",
                textposition="top center",
                name="Sentei",
                showlegend=col == 1,
                line={"color": "#1f5f4a"},
            ),
            row=1,
            col=col,
        )
    for kind in dict.fromkeys(baseline.kind for baseline in evaluation.baselines):
        points = [baseline for baseline in evaluation.baselines if baseline.kind == kind]
        figure.add_trace(
            go.Scatter(
                x=[point.density for point in points],
                y=[point.nll_delta for point in points],
                mode="markers+lines",
                name=kind,
                marker={"size": 10},
                line={"dash": "dot"},
            ),
            row=1,
            col=1,
        )
    if rungs:
        for name, seconds in rungs[0].prefill_s_by_baseline.items():
            figure.add_vline(x=seconds, line_dash="dot", annotation_text=name, row=1, col=2)
    figure.add_hline(y=0, line_color="#888888")
    figure.update_xaxes(title_text="blocks kept, share of causal", row=1, col=1)
    figure.update_xaxes(title_text=f"prefill of {evaluation.window_tokens} tokens, s", row=1, col=2)
    figure.update_yaxes(title_text="NLL against dense, nats per token", row=1, col=1)
    figure.update_layout(
        title=f"{evaluation.model}: what sparse attention saves and costs, with 95% intervals",
        template="plotly_white",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path


def save_budgets(budgets: Sequence[Budget], title: str, path: Path) -> Path:
    """Write one HTML page: each variant's seconds as a bar of its parts, and its floor as a bar beneath."""
    figure = go.Figure()
    names = [name for budget in budgets for name in (budget.variant, f"{budget.variant}, floor")]
    colors = ("#1f5f4a", "#5b8a78", "#b07a3a", "#d9a860", "#e8cfa0", "#5a6b9c", "#8f9cc4", "#8a8a8a")
    parts = [part for part in budgets[0].seconds if any(budget.seconds[part] for budget in budgets)]
    for place, part in enumerate(parts):
        lengths = [
            value for budget in budgets for value in (budget.seconds[part], budget.floor_s.get(part, 0.0))
        ]
        figure.add_trace(
            go.Bar(y=names, x=lengths, name=part, orientation="h", marker_color=colors[place % len(colors)])
        )
    figure.update_layout(barmode="stack", title=title, template="plotly_white")
    figure.update_xaxes(title_text="seconds; the floor is what the matrix products take at the measured peak")
    figure.update_yaxes(autorange="reversed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path


def save_study(rows: Sequence[StudyRow], path: Path) -> Path:
    """Write one HTML page: what each scorer form must keep and what it misses, layer by layer."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    sizes = list(dict.fromkeys(row.query_block for row in rows))
    missed, density = max(rows[0].density, key=float), min(rows[0].at_density, key=float)
    figure = make_subplots(
        rows=2,
        cols=len(layers),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.12,
        subplot_titles=[
            *(f"layer {i}: kept to miss {float(missed):.1%} of needles" for i in layers),
            *(f"layer {i}: needles missed at {float(density):.0%}" for i in layers),
        ],
    )
    colors = dict(zip(sizes, ("#b07a3a", "#1f5f4a", "#5a6b9c", "#888888"), strict=False))
    for col, layer in enumerate(layers, start=1):
        for size in sizes:
            mine = [row for row in rows if row.layer == layer and row.query_block == size]
            kept = [row.density[missed] for row in mine]
            lost = [row.at_density[density].needles_missed for row in mine]
            for line, values in ((1, kept), (2, lost)):
                figure.add_trace(
                    go.Bar(
                        x=values,
                        y=[row.form for row in mine],
                        orientation="h",
                        name=f"query blocks of {size}",
                        legendgroup=str(size),
                        showlegend=col == line == 1,
                        marker_color=colors.get(size),
                    ),
                    row=line,
                    col=col,
                )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(
        title="Scorer forms on held-out text: shorter bars are better",
        template="plotly_white",
        height=300 + 60 * len({row.form for row in rows}),
        barmode="group",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path


def save_speedups(rows: Sequence[Row], path: Path) -> Path:
    """Write one HTML page: speed-up by density against the fastest dense baseline, and the line 1/density."""
    best: dict[tuple[str, float], float] = {}
    for row in rows:
        if row.op not in ("prefill", "decode"):
            continue
        name = f"{row.op} {row.tokens}, head {row.head_dim}, block {row.block}"
        key = (name + (", with scorer" if row.with_scorer else ""), row.density)
        best[key] = min(best.get(key, row.speedup), row.speedup)
    figure = go.Figure()
    for name in dict.fromkeys(key for key, _ in best):
        points = sorted((density, value) for (key, density), value in best.items() if key == name)
        figure.add_trace(
            go.Scatter(
                x=[density for density, _ in points],
                y=[value for _, value in points],
                mode="lines+markers",
                name=name,
            )
        )
    if best:
        low = min(density for _, density in best)
        steps = [low * (1 / low) ** (i / 40) for i in range(41)]
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=[1 / step for step in steps],
                mode="lines",
                name="1/density",
                line={"dash": "dot", "color": "#888888"},
            )
        )
    figure.update_xaxes(title_text="blocks kept, share of causal", type="log")
    figure.update_yaxes(
        title_text="times faster than the fastest dense: SDPA, FlexAttention or native", type="log"
    )
    figure.update_layout(title="Speed-up of block-sparse attention", template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path
